"""The SP-Ctrl ControlNet: diffusers' ``ControlNetModel`` behind a spatial-text embedding (REFERENCE section 9).

Legend: B images of a batch, H and W in pixels, C channels of the embedding, E extra channels.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from spctrl.errors import ExpectedError
from spctrl.io.network_size import within_weights
from spctrl.io.reading_faults import faults_of
from spctrl.models.embedding import (
    LayerVersion,
    LinkTable,
    SkeletonType,
    SpatextEmbedding,
    load_keypoint_init,
)

RELEASED_CLASS = "SpaTextControlNetModel"
"""What the config.json of a released folder calls this model; folders saved here say the same."""

_NOT_RELEASED = {"spatext_link_table": "ap10k", "spatext_extra_channels": 0}
"""Options that released folders do not know, left out of config.json where they have these values."""


def _with_arguments_of_base(init: Callable[..., None]) -> Callable[..., None]:
    """Name the base's arguments in a signature that has them as ``**kwargs``: diffusers reads which there are."""
    base = inspect.signature(ControlNetModel.__init__).parameters.values()
    own = [each for each in inspect.signature(init).parameters.values() if each.kind is each.KEYWORD_ONLY]
    init.__signature__ = inspect.Signature([*base, *own])  # type: ignore[attr-defined]
    return init


class SpCtrlControlNetModel(ControlNetModel):
    """A ControlNet whose ``controlnet_cond`` is an index map at full resolution.

    ``from_unet`` starts one, ``from_pretrained`` loads a folder that was saved here or released, and
    ``save_pretrained`` writes one with the released names. The spatial-text embedding is in ``spatext_embedding``.

    Args:
        spatext_init_emb: a path that released folders carry; never read.
        spatext_skeleton_type, spatext_enable_learn_kpt, spatext_enable_learn_sks,
        spatext_detach_kpt_grad_from_sks, spatext_layer_version, spatext_link_table: as ``skeleton_type``,
            ``learn_keypoints``, ``learn_skeleton``, ``detach_links``, ``layer_version`` and ``link_table`` of
            ``SpatextEmbedding``.
        spatext_extra_channels: E channels that follow the index map and pass by the embedding, such as a mask.
        kwargs: as for ``ControlNetModel``; ``conditioning_channels`` is C + E.
    """

    @register_to_config
    @_with_arguments_of_base
    def __init__(
        self,
        *args: Any,
        spatext_init_emb: str | None = None,
        spatext_skeleton_type: SkeletonType = "one",
        spatext_enable_learn_kpt: bool = False,
        spatext_enable_learn_sks: bool = False,
        spatext_detach_kpt_grad_from_sks: bool = False,
        spatext_layer_version: LayerVersion | None = None,
        spatext_link_table: LinkTable = "ap10k",
        spatext_extra_channels: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.spatext_embedding = SpatextEmbedding(
            self.config.conditioning_channels - spatext_extra_channels,
            spatext_skeleton_type,
            learn_keypoints=spatext_enable_learn_kpt,
            learn_skeleton=spatext_enable_learn_sks,
            detach_links=spatext_detach_kpt_grad_from_sks,
            layer_version=spatext_layer_version,
            link_table=spatext_link_table,
        )

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        conditioning_channels: int = 3,
        skeleton_type: SkeletonType = "one",
        *,
        learn_keypoints: bool = False,
        learn_skeleton: bool = False,
        detach_links: bool = False,
        layer_version: LayerVersion | None = None,
        link_table: LinkTable = "ap10k",
        extra_channels: int = 0,
        keypoint_init: Tensor | str | PathLike[str] | None = None,
        **kwargs: Any,
    ) -> SpCtrlControlNetModel:
        """A ControlNet with the weights of a UNet's encoder, zero convolutions and a new embedding.

        Args:
            unet: Stable Diffusion's.
            conditioning_channels: C.
            extra_channels: E.
            keypoint_init: (17, 768) initial text embeddings of the keypoints, or a file of them; see
                ``load_keypoint_init``. The saved folder does not name the file.
            skeleton_type, learn_keypoints, learn_skeleton, detach_links, layer_version, link_table: as for
                ``SpatextEmbedding``.
            kwargs: as for ``ControlNetModel.from_unet``.

        Raises:
            ExpectedError: an option that does not exist, or initial embeddings that cannot be used.
        """
        if isinstance(keypoint_init, str | PathLike):
            keypoint_init = load_keypoint_init(Path(keypoint_init))
        controlnet: SpCtrlControlNetModel = super().from_unet(
            unet, conditioning_channels=conditioning_channels + extra_channels, **kwargs
        )
        controlnet.spatext_embedding = SpatextEmbedding(
            conditioning_channels,
            skeleton_type,
            learn_keypoints=learn_keypoints,
            learn_skeleton=learn_skeleton,
            detach_links=detach_links,
            layer_version=layer_version,
            link_table=link_table,
            keypoint_init=keypoint_init,
        )
        controlnet.register_to_config(
            spatext_skeleton_type=skeleton_type,
            spatext_enable_learn_kpt=learn_keypoints,
            spatext_enable_learn_sks=learn_skeleton,
            spatext_detach_kpt_grad_from_sks=detach_links,
            spatext_layer_version=layer_version,
            spatext_link_table=link_table,
            spatext_extra_channels=extra_channels,
        )
        return controlnet

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Any:
        """As diffusers', but every weight must be the folder's.

        With ``output_loading_info`` the model and what did not match are returned, and no keys are checked.

        Raises:
            ExpectedError: weights are missing, left over, of another shape, or cannot be loaded.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        expected = f"{pretrained_model_name_or_path}: expected the weights of an SP-Ctrl ControlNet"
        with (
            faults_of(f"{expected}, which cannot be loaded"),
            within_weights(folder) if (folder / "config.json").is_file() else nullcontext(),
        ):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, output_loading_info=True, **kwargs
            )
        if wants_info:
            return model, info
        wrong = {what: info[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched")}
        if any(wrong.values()):
            listed = "; ".join(f"{what} {', '.join(map(str, keys))}" for what, keys in wrong.items() if keys)
            raise ExpectedError(f"{expected}, found {listed}. Is it another model's folder, or cut short?")
        return model

    def to_json_string(self) -> str:
        """The content of config.json, as released folders have it."""
        config = json.loads(super().to_json_string())
        for name, value in _NOT_RELEASED.items():
            if config.get(name) == value:
                del config[name]
        return json.dumps({**config, "_class_name": RELEASED_CLASS}, indent=2, sort_keys=True) + "\n"

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Residuals for the UNet; arguments and results as in diffusers, but for one.

        Args:
            sample, timestep, encoder_hidden_states, args, kwargs: as for ``ControlNetModel.forward``.
            controlnet_cond: (B, 1 + E, H, W) of any number type: index maps, followed by the extra channels.

        Raises:
            ValueError: another number of channels.
        """
        extra_channels = self.config.spatext_extra_channels
        if controlnet_cond.ndim != 4 or controlnet_cond.shape[1] != 1 + extra_channels:
            raise ValueError(
                f"expected controlnet_cond of shape (B, {1 + extra_channels}, H, W): index maps"
                f"{' and the extra channels' if extra_channels else ''}, found {tuple(controlnet_cond.shape)}"
            )
        embedded = self.spatext_embedding(controlnet_cond[:, :1])
        if extra_channels:
            embedded = torch.cat([embedded, controlnet_cond[:, 1:].to(embedded.dtype)], dim=1)
        return super().forward(sample, timestep, encoder_hidden_states, embedded, *args, **kwargs)
