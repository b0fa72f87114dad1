"""The training objective (REFERENCE section 10): what one micro-batch costs, in terms that are summed.

Legend: B images of a micro-batch, R side of the crop in pixels, h = w = R / 8 of its latents, T = 77 tokens,
K keypoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from spctrl.losses import denoising_loss, keypoint_concept_loss
from spctrl.models.attention import capture_attention
from spctrl.training.schedule import random_seed

if TYPE_CHECKING:
    from spctrl.models.attention import AttentionMaps
    from spctrl.training.config import TrainingConfig
    from spctrl.training.networks import Networks

LATENT_CHANNELS, LATENT_SCALE = 4, 8

Batch = Mapping[str, Tensor]
"""What ``SpCtrlDataset`` gives, for B images."""


class Draws(NamedTuple):
    """Everything random of a micro-batch but dropout.

    Attributes:
        noise: (B, 4, h, w) that is added to the latents.
        timesteps: (B,) int64.
        encoding: (B, 4, h, w) with which latents are drawn from the autoencoder's posterior.
    """

    noise: Tensor
    timesteps: Tensor
    encoding: Tensor

    def to(self, device: torch.device) -> Draws:
        """The same on a device."""
        return Draws(*(each.to(device, non_blocking=True) for each in self))


def draw(seed: int, *, batch_size: int, resolution: int, num_timesteps: int) -> Draws:
    """Standard normal noise and uniform timesteps; on the processor, so that they are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, LATENT_CHANNELS, resolution // LATENT_SCALE, resolution // LATENT_SCALE)
    return Draws(
        noise=torch.randn(shape, generator=generator),
        timesteps=torch.randint(num_timesteps, (batch_size,), generator=generator),
        encoding=torch.randn(shape, generator=generator),
    )


def step_seed(config: TrainingConfig, step: int, micro_batch: int, process: int) -> int:
    """The seed of everything random in a micro-batch."""
    return random_seed(config.seed, "step", step, micro_batch, process)


@contextmanager
def objective_of(networks: Networks, config: TrainingConfig) -> Iterator[Objective]:
    """The objective of a run; attention maps are kept while the context is open, through the backward pass too."""
    keeps_maps = (
        capture_attention(
            networks.control,
            config.attn_loss_select_layer_type,
            detach_query=config.attn_loss_detach_query,
        )
        if config.add_cross_attn_loss
        else nullcontext()
    )
    with keeps_maps as captured:
        yield Objective(networks, config, captured)


class Objective(nn.Module):
    """The losses of a micro-batch, as one module, so that its gradients are gathered from all processes at once.

    The frozen networks run in their own precision, the trained ones in that of the autocast around this module.
    """

    def __init__(self, networks: Networks, config: TrainingConfig, captured: AttentionMaps | None) -> None:
        super().__init__()
        self.control = networks.control
        self.text_encoder = networks.text_encoder
        self.unet = networks.unet
        self.vae = networks.vae
        self.noise = networks.noise
        self.latent_scale = networks.latent_scale
        self.config = config
        self.captured = captured

    def forward(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Scalars in float32: ``loss``, which is trained on, and its terms.

        Args:
            batch: B images of ``SpCtrlDataset``.
            draws: the same number's.
        """
        noisy_latents = self.noise.add_noise(
            self.latents(batch, draws.encoding), draws.noise, draws.timesteps
        )
        encoder_hidden_states = self.text_encoder(batch["input_ids"])[0]
        noise_pred = self.predict_noise(
            noisy_latents, draws.timesteps, encoder_hidden_states, batch["conditioning_image"]
        )
        denoising = denoising_loss(
            noise_pred.float(), draws.noise, batch.get("heatmaps"), self.config.heatmap_reweight_loss
        )
        if self.captured is None:
            return {"loss": denoising, "denoising": denoising}
        start, end = self.config.timestep_window
        concept = keypoint_concept_loss(
            self.captured.maps(),
            batch["heatmaps"],
            batch["token_mask"],
            batch["keypoint_mask"],
            draws.timesteps,
            kind=self.config.heatmap_type,
            loss=self.config.attn_loss_type,
            start=start,
            end=end,
        )
        loss = denoising + self.config.attn_loss_weight * concept
        return {"loss": loss, "denoising": denoising, "keypoint_concept": concept}

    def latents(self, batch: Batch, encoding: Tensor) -> Tensor:
        """(B, 4, h, w) float32: drawn from the autoencoder's posterior, cached or computed now, and scaled."""
        if "latents_mean" in batch:
            mean, logvar = batch["latents_mean"].float(), batch["latents_logvar"].float()
        else:
            with torch.no_grad(), full_precision(batch["pixel_values"]):
                posterior = self.vae.encode(batch["pixel_values"].to(self.vae.dtype)).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
        return (mean + torch.exp(logvar / 2) * encoding) * self.latent_scale

    def predict_noise(
        self, noisy_latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, condition: Tensor
    ) -> Tensor:
        """(B, 4, h, w): the UNet's prediction with what the control network adds.

        Args:
            noisy_latents: (B, 4, h, w).
            timesteps: (B,).
            encoder_hidden_states: (B, T, D).
            condition: (B, any, R, R) as the control network takes it.
        """
        residuals: dict[str, Any]
        dtype = self.unet.dtype
        if self.config.model == "t2i_adapter":
            added = [each.to(dtype) for each in self.control(condition)]
            residuals = {"down_intrablock_additional_residuals": added}
        else:
            down, mid = self.control(
                noisy_latents, timesteps, encoder_hidden_states, condition, return_dict=False
            )
            residuals = {
                "down_block_additional_residuals": [each.to(dtype) for each in down],
                "mid_block_additional_residual": mid.to(dtype),
            }
        with full_precision(noisy_latents):
            predicted: Tensor = self.unet(
                noisy_latents.to(dtype),
                timesteps,
                encoder_hidden_states.to(dtype),
                return_dict=False,
                **residuals,
            )[0]
        return predicted


def full_precision(tensor: Tensor) -> torch.autocast:
    """No autocast: a network runs in the precision of its own weights."""
    return torch.autocast(tensor.device.type, enabled=False)
