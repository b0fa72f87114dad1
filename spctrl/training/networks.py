"""The networks of a training run: Stable Diffusion, which stays as it is, and what is trained beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from spctrl.errors import ExpectedError
from spctrl.inference.checkpoints import learned_embeds_file
from spctrl.models import stable_diffusion, tokens
from spctrl.models.controlnet import SpCtrlControlNetModel
from spctrl.training.checkpoints import TOKENS
from spctrl.training.config import TrainingConfig
from spctrl.training.schedule import random_seed
from spctrl.weights import find_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

IMAGE_CHANNELS = 3
ADAPTER_SCALE = 8
"""How much smaller latents are than images, and so the adapter's residuals."""

FOLDERS = {"controlnet": "controlnet", "t2i_adapter": "adapter"}
"""For each model the folder that its weights are saved to."""
NETWORK_FILE = "diffusion_pytorch_model.safetensors"

FROZEN_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}
"""Precision of the frozen networks, and of autocast around the trained ones, by ``mixed_precision``."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What a run loads.

    Attributes:
        tokenizer, text_encoder, unet, vae: Stable Diffusion's; the tokenizer and the text encoder may have keypoint
            tokens. ``vae`` is None where nothing needs it.
        noise: the noise schedule.
        latent_scale: what latents are multiplied by.
        control: the ControlNet or T2I-Adapter that is trained; float32.
        token_rows: (K, D) the keypoint tokens' embeddings that are trained; None where there are none.
        token_table: (V, D) the frozen token embedding where its gradient counts for clipping; else None.
        dataset_name: whose keypoints those are.
        model: as in the configuration.
    """

    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    noise: Any
    latent_scale: float
    control: Any
    token_rows: nn.Parameter | None
    token_table: nn.Parameter | None
    dataset_name: str
    model: str

    def trained_groups(self) -> list[list[nn.Parameter]]:
        """The trained parameters: the control network's, and the token embeddings where they are trained."""
        control = [parameter for parameter in self.control.parameters() if parameter.requires_grad]
        return [control] if self.token_rows is None else [control, [self.token_rows]]

    def save(self, folder: Path) -> None:
        """Write what was trained below a folder: ``controlnet/`` or ``adapter/``, and ``learned_embeds.bin``."""
        self.control.save_pretrained(folder / FOLDERS[self.model])
        if self.token_rows is not None:
            embeds = tokens.learned_embeds(self.tokenizer, self.text_encoder, self.dataset_name)
            tokens.save_learned_embeds(folder / TOKENS, embeds)

    def restore(self, folder: Path) -> None:
        """Take what ``save`` wrote, to the bit."""
        from safetensors.torch import load_file

        saved = load_file(folder / FOLDERS[self.model] / NETWORK_FILE)
        self.control.load_state_dict(saved)
        if self.token_rows is not None:
            embeds = tokens.load_learned_embeds(folder / TOKENS)
            rows = torch.stack(
                [embeds[placeholder] for placeholder in tokens.PLACEHOLDERS[self.dataset_name]]
            )
            with torch.no_grad():
                self.token_rows.copy_(rows)


def trained_files(config: TrainingConfig) -> list[str]:
    """Files of a checkpoint that ``Networks.restore`` reads."""
    network = f"{FOLDERS[config.model]}/{NETWORK_FILE}"
    return [network, TOKENS] if config.enable_learnable_kpttoken else [network]


def load_networks(config: TrainingConfig, weights: Path, *, with_vae: bool) -> Networks:
    """Load the networks of a run, on the processor and in float32.

    Args:
        config: of the run.
        weights: folder of the entries of weights.yaml.
        with_vae: whether to load the image autoencoder.

    Raises:
        ExpectedError: weights are missing, broken or of another model; says what to get, or which setting to change.
    """
    for quiet in (diffusers_logging, transformers_logging):
        quiet.disable_progress_bar()
    folder = find_weights(config.pretrained_model_name_or_path, weights)
    tokenizer = stable_diffusion.load_tokenizer(folder)
    text_encoder = stable_diffusion.load_text_encoder(folder).requires_grad_(False).eval()
    unet = stable_diffusion.load_unet(folder).requires_grad_(False).eval()
    vae = stable_diffusion.load_vae(folder).requires_grad_(False).eval() if with_vae else None
    start = config.controlnet_model_name_or_path
    start_folder = find_weights(start, weights) if start else None
    with seeded(config.seed, "initial weights"):
        control = _load_control(config, start_folder) if start_folder else _new_control(config, unet)
    _choose_trained(config, control)
    rows = table = None
    if config.enable_learnable_kpttoken:
        ids = tokens.add_keypoint_tokens(tokenizer, text_encoder, config.dataset_name)
        if start_folder and (saved := learned_embeds_file(start_folder)):
            tokens.set_learned_embeds(tokenizer, text_encoder, tokens.load_learned_embeds(saved))
        rows = tokens.trainable_token_rows(text_encoder, ids)
        if config.clip_tokens == "table":
            table = text_encoder.get_input_embeddings().weight.requires_grad_(True)
    return Networks(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=unet,
        vae=vae,
        noise=stable_diffusion.noise_schedule(folder),
        latent_scale=stable_diffusion.latent_scale(folder),
        control=control.train(),
        token_rows=rows,
        token_table=table,
        dataset_name=config.dataset_name,
        model=config.model,
    )


@contextmanager
def seeded(*names: object) -> Iterator[None]:
    """Random numbers of torch that depend on the names alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed(*names))
        yield


def _new_control(config: TrainingConfig, unet: Any) -> Any:
    """A network that starts from the UNet or at random; its condition has no effect yet where it is a ControlNet."""
    from diffusers import ControlNetModel, T2IAdapter

    extra = int(config.use_extra_mask)
    if config.model == "t2i_adapter":
        return T2IAdapter(
            in_channels=IMAGE_CHANNELS + extra,
            channels=list(unet.config.block_out_channels),
            num_res_blocks=2,
            downscale_factor=ADAPTER_SCALE,
        )
    if config.conditioning_mode != "spatext":
        return ControlNetModel.from_unet(unet, conditioning_channels=IMAGE_CHANNELS + extra)
    return SpCtrlControlNetModel.from_unet(
        unet,
        config.spatext_cond_channels,
        config.spatext_skeleton_type,
        learn_keypoints=config.spatext_enable_learn_kpt,
        learn_skeleton=config.spatext_enable_learn_sks,
        detach_links=config.spatext_detach_kpt_grad_from_sks,
        layer_version=config.spatext_layer_version,
        link_table=config.spatext_link_table,
        extra_channels=extra,
        keypoint_init=config.spatext_init_emb,
    )


def _load_control(config: TrainingConfig, folder: Path) -> Any:
    """A trained network to go on with.

    Raises:
        ExpectedError: it is not there, or takes other conditions than the configuration says.
    """
    from spctrl.inference.pipeline import load_network

    control = load_network(config.kind, folder)
    extra = int(config.use_extra_mask)
    expected: dict[str, Any] = {"conditioning_channels": IMAGE_CHANNELS + extra}
    if config.model == "t2i_adapter":
        expected = {"in_channels": IMAGE_CHANNELS + extra}
    elif config.conditioning_mode == "spatext":
        expected = {
            "conditioning_channels": config.spatext_cond_channels + extra,
            "spatext_extra_channels": extra,
            "spatext_skeleton_type": config.spatext_skeleton_type,
            "spatext_layer_version": config.spatext_layer_version,
            "spatext_link_table": config.spatext_link_table,
        }
    found = {name: control.config.get(name) for name in expected}
    if found != expected:
        raise ExpectedError(
            f"controlnet_model_name_or_path: {folder}: expected {_listed(expected)}, as the configuration says, found "
            f"{_listed(found)}. Change the configuration or start from another network"
        )
    return control


def _choose_trained(config: TrainingConfig, control: Any) -> None:
    """Freeze what the configuration does not train."""
    if config.conditioning_mode != "spatext":
        return
    embedding = control.spatext_embedding
    interpolated = config.spatext_skeleton_type == "interp_kpt"
    embedding.keypoint_emb.requires_grad_(config.spatext_enable_learn_kpt)
    embedding.skeleton_emb.requires_grad_(config.spatext_enable_learn_sks and not interpolated)
    if config.spatext_freeze_embedding:
        embedding.requires_grad_(False)


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in settings.items())
