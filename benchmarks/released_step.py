"""A training step in the released manner, written plainly on the networks of ``benchmarks.train_step``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from benchmarks.embedding import loop_over_masks
from benchmarks.train_step import Step, Work, make_step

if TYPE_CHECKING:
    from torch import Tensor

    from spctrl.training.networks import Networks


def released(work: Work) -> Step:
    """A step in the released manner, from images."""
    from spctrl.losses import denoising_loss, keypoint_concept_loss

    networks, config, _, batch, draws = work
    start, end = config.timestep_window

    @contextmanager
    def losses() -> Iterator[dict[str, Tensor]]:
        kept: dict[str, Tensor] = {}
        with _maps_of_all_layers(networks.control, kept), _looping_embedding(networks.control):
            latents = _encode(networks.vae, batch["pixel_values"], draws.encoding) * networks.latent_scale
            noisy = networks.noise.add_noise(latents, draws.noise, draws.timesteps)
            text = networks.text_encoder(batch["input_ids"])[0]
            down, mid = networks.control(
                noisy, draws.timesteps, text, batch["conditioning_image"], return_dict=False
            )
            dtype = networks.unet.dtype
            predicted = _unet(networks, noisy.to(dtype), draws.timesteps, text.to(dtype), down, mid)
            denoising = denoising_loss(predicted.float(), draws.noise)
            concept = keypoint_concept_loss(
                kept,
                batch["large_heatmaps"],
                batch["token_mask"],
                batch["keypoint_mask"],
                draws.timesteps,
                loss=config.attn_loss_type,
                start=start,
                end=end,
                layers=config.attn_loss_select_layer_type,
            )
        loss = denoising + config.attn_loss_weight * concept
        yield {"loss": loss, "denoising": denoising, "keypoint_concept": concept}

    return make_step(work, losses)


def _encode(vae: Any, images: Tensor, encoding: Tensor) -> Tensor:
    import torch

    with torch.no_grad():
        posterior = vae.encode(images.to(vae.dtype)).latent_dist
    return posterior.mean.float() + posterior.std.float() * encoding


@contextmanager
def _looping_embedding(control: Any) -> Iterator[None]:
    """Index maps are embedded value by value, in float32."""
    import torch

    def forward(index_map: Tensor) -> Tensor:
        with torch.autocast(index_map.device.type, enabled=False):
            return loop_over_masks(embedding, index_map)

    embedding = control.spatext_embedding
    embedding.forward = forward
    try:
        yield
    finally:
        del embedding.forward


def _unet(networks: Networks, noisy: Tensor, timesteps: Tensor, text: Tensor, down: Any, mid: Any) -> Tensor:
    import torch

    with torch.autocast(noisy.device.type, enabled=False):
        predicted: Tensor = networks.unet(
            noisy,
            timesteps,
            text,
            down_block_additional_residuals=[each.to(noisy.dtype) for each in down],
            mid_block_additional_residual=mid.to(noisy.dtype),
            return_dict=False,
        )[0]
    return predicted


class _TwiceProcessor:
    """Fused attention for the output, and the probabilities of all heads beside it."""

    def __init__(self, name: str, processor: Any, kept: dict[str, Tensor], detach_query: bool) -> None:
        self.name, self.processor, self.kept, self.detach_query = name, processor, kept, detach_query

    def __call__(
        self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **rest: Any
    ) -> Any:
        query = attention.head_to_batch_dim(attention.to_q(hidden_states))
        key = attention.head_to_batch_dim(attention.to_k(encoder_hidden_states))
        probabilities = attention.get_attention_scores(query.detach() if self.detach_query else query, key)
        side = round(probabilities.shape[1] ** 0.5)
        maps = probabilities.unflatten(0, (-1, attention.heads)).transpose(2, 3)
        self.kept[self.name] = maps.unflatten(3, (side, side))
        return self.processor(attention, hidden_states, encoder_hidden_states, **rest)


@contextmanager
def _maps_of_all_layers(control: Any, kept: dict[str, Tensor]) -> Iterator[None]:
    layers = {name: module for name, module in control.named_modules() if name.endswith("attn2")}
    before = {name: module.processor for name, module in layers.items()}
    for name, module in layers.items():
        module.set_processor(_TwiceProcessor(name, before[name], kept, detach_query=True))
    try:
        yield
    finally:
        for name, module in layers.items():
            module.set_processor(before[name])
