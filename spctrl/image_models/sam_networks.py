"""The networks of SAM and SAM-HQ: the packages' architectures, released and tiny, with strictly loaded weights."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import segment_anything
import torch

from spctrl.errors import ExpectedError
from spctrl.io.network_size import MAX_SIDE, parameters_within, read_config
from spctrl.io.reading_faults import faults_of
from spctrl.weights import TorchFileError, read_torch_file, save_torch_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports timm by old names, and registers what timm has by now
    import segment_anything_hq

Backend = Literal["sam_hq", "sam"]
ModelType = Literal["vit_h", "vit_l", "vit_b", "vit_tiny"]

PACKAGES = {"sam_hq": segment_anything_hq, "sam": segment_anything}
PUBLISHERS = {
    "sam_hq": "https://github.com/SysCV/sam-hq",
    "sam": "https://github.com/facebookresearch/segment-anything",
}
RELEASED = {
    "sam_hq": {
        "vit_h": "sam_hq_vit_h.pth",
        "vit_l": "sam_hq_vit_l.pth",
        "vit_b": "sam_hq_vit_b.pth",
        "vit_tiny": "sam_hq_vit_tiny.pth",
    },
    "sam": {
        "vit_h": "sam_vit_h_4b8939.pth",
        "vit_l": "sam_vit_l_0b3195.pth",
        "vit_b": "sam_vit_b_01ec64.pth",
    },
}

KEYS_NAMED = 4
MAX_WINDOW = 32
PATCH_PX = 16


class Sizes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A network of other than the released sizes: the content of ``<weights>.json``.

    Attributes:
        weights: where the values come from: ``random``.
        image_size: side of the square input in pixels.
        prompt_dim: C.
        encoder: arguments of the package's ``ImageEncoderViT``, or ``TinyViT`` for ``vit_tiny``.
    """

    backend: Backend
    model_type: ModelType
    weights: str
    image_size: int
    prompt_dim: int
    decoder_depth: int
    decoder_heads: int
    decoder_mlp_dim: int
    iou_head_dim: int
    encoder: dict[str, Any]


def load_network(backend: Backend, model_type: ModelType, weights: Path) -> torch.nn.Module:
    """The package's ``Sam`` with weights, on the processor, for inference.

    Args:
        backend: the package.
        model_type: the size; ``vit_tiny`` is SAM-HQ's only.
        weights: a state dict (.pth). Sizes are the released ones unless ``<weights>.json`` gives others.

    Raises:
        ExpectedError: no such model, or weights that are missing, damaged or another model's.
    """
    _check_model(backend, model_type)
    state = _read_weights(weights, backend, model_type)
    network = _build_network(weights, backend, model_type, state)
    _check_keys(weights, backend, model_type, network.state_dict(), state)
    network.load_state_dict(state, strict=True)
    # After loading, not before: TinyViT computes its attention biases from the weights when this is called.
    return network.eval().requires_grad_(False)


def build_tiny(backend: Backend, model_type: ModelType, path: Path) -> None:
    """Write a very small network with random weights, always the same ones, to ``path``, and its sizes to
    ``<path>.json``.

    TinyViT's own code fixes its input to 1024 pixels and its output to 64 x 64 cells of 256 channels, so ``vit_tiny``
    is the largest (3 M parameters).

    Raises:
        ExpectedError: no such model.
    """
    _check_model(backend, model_type)
    tiny_vit = model_type == "vit_tiny"
    vit = {"embed_dim": 32, "depth": 4, "num_heads": 2, "window_size": 3, "global_attn_indexes": (1, 3)}
    four_stages = {
        "embed_dims": (8, 8, 16, 320),  # the last one has to be 320
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 2, 5),
        "window_sizes": (7, 7, 14, 7),
        "mlp_ratio": 0.25,
        "num_classes": 1,
        "drop_path_rate": 0.0,
    }
    sizes = Sizes(
        backend=backend,
        model_type=model_type,
        weights="random",
        image_size=1024 if tiny_vit else 128,
        prompt_dim=256 if tiny_vit else 32,
        decoder_depth=1 if tiny_vit else 2,
        decoder_heads=2,
        decoder_mlp_dim=32,
        iou_head_dim=32,
        encoder=four_stages if tiny_vit else vit,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = network_of_sizes(sizes)
        for name, parameter in model.named_parameters():
            # Nothing stays at 0 or 1, as biases and norms begin, and masks come out neither empty nor full.
            parameter += 0.1 * torch.randn_like(parameter)
            if "hypernetworks" in name or "hf_mlp" in name:
                parameter *= 2
    path.parent.mkdir(parents=True, exist_ok=True)
    save_torch_file(model.state_dict(), path)
    _sizes_path(path).write_bytes(msgspec.json.format(msgspec.json.encode(sizes), indent=1) + b"\n")


def network_of_sizes(sizes: Sizes) -> torch.nn.Module:
    """The package's network, as its ``build_sam`` puts it together, in other sizes."""
    parts = PACKAGES[sizes.backend].modeling
    cells, dim = sizes.image_size // PATCH_PX, sizes.prompt_dim
    decoder = {
        "transformer": parts.TwoWayTransformer(
            depth=sizes.decoder_depth,
            embedding_dim=dim,
            mlp_dim=sizes.decoder_mlp_dim,
            num_heads=sizes.decoder_heads,
        ),
        "transformer_dim": dim,
        "iou_head_hidden_dim": sizes.iou_head_dim,
    }
    if sizes.model_type == "vit_tiny":
        encoder = parts.TinyViT(img_size=sizes.image_size, **sizes.encoder)
        early_dim = encoder.layers[1].downsample.out_dim
    else:
        encoder = parts.ImageEncoderViT(
            img_size=sizes.image_size,
            patch_size=PATCH_PX,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            out_chans=dim,
            **sizes.encoder,
        )
        early_dim = encoder.blocks[0].norm1.normalized_shape[0]
    return parts.Sam(
        image_encoder=encoder,
        prompt_encoder=parts.PromptEncoder(
            embed_dim=dim,
            image_embedding_size=(cells, cells),
            input_image_size=(sizes.image_size, sizes.image_size),
            mask_in_chans=16,
        ),
        mask_decoder=parts.MaskDecoder(**decoder)
        if sizes.backend == "sam"
        else parts.MaskDecoderHQ(vit_dim=early_dim, **decoder),
    )


def _check_model(backend: str, model_type: str) -> None:
    if backend not in RELEASED:
        raise ExpectedError(f"[mask] backend: expected one of {', '.join(RELEASED)}, found {backend!r}")
    if model_type not in RELEASED[backend]:
        known = ", ".join(RELEASED[backend])
        raise ExpectedError(
            f"[mask] model_type: expected one of {known} with backend = {backend}, found {model_type!r}"
        )


def _sizes_path(weights: Path) -> Path:
    return weights.with_name(f"{weights.name}.json")


def _what_to_get(backend: Backend, model_type: ModelType) -> str:
    return f"get {RELEASED[backend][model_type]} from {PUBLISHERS[backend]} and name it in [mask] weights"


def _read_weights(path: Path, backend: Backend, model_type: ModelType) -> dict[str, torch.Tensor]:
    get = _what_to_get(backend, model_type)
    if not path.is_file():
        raise ExpectedError(
            f"expected the weights of {backend} {model_type} (settings backend and model_type of [mask]), "
            f"found no file {path}: {get}"
        )
    try:
        state = read_torch_file(path)
    except TorchFileError as error:
        raise ExpectedError(f"{error}: {get}") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ExpectedError(f"{path}: expected a dictionary of tensors only, found other things in it: {get}")
    return state


def _check_keys(
    path: Path,
    backend: Backend,
    model_type: ModelType,
    expected: dict[str, torch.Tensor],
    found: dict[str, torch.Tensor],
) -> None:
    wrong = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": [k for k in expected if k in found and expected[k].shape != found[k].shape],
    }
    if any(wrong.values()):
        named = "; ".join(
            f"{len(keys)} {how} ({', '.join(map(str, keys[:KEYS_NAMED]))}{', ...' * (len(keys) > KEYS_NAMED)})"
            for how, keys in wrong.items()
            if keys
        )
        raise ExpectedError(
            f"{path}: expected the weights of {backend} {model_type}, found keys of another model: {named}. Set "
            f"backend and model_type of [mask] to what the file holds, or {_what_to_get(backend, model_type)}"
        )


def _check_windows(sizes: Sizes) -> None:
    """TinyViT lists all pairs of a window's cells before it has any parameter.

    Raises:
        ValueError: a window, or the input, is too large.
    """
    windows = sizes.encoder.get("window_sizes", [])
    if max([0, *windows]) > MAX_WINDOW or sizes.image_size > MAX_SIDE:
        raise ValueError(
            f"expected windows of at most {MAX_WINDOW} cells and images of at most {MAX_SIDE} pixels a side, found "
            f"{windows} and {sizes.image_size}"
        )


def _build_network(
    path: Path, backend: Backend, model_type: ModelType, state: dict[str, torch.Tensor]
) -> torch.nn.Module:
    beside = _sizes_path(path)
    if not beside.exists():
        return PACKAGES[backend].sam_model_registry[model_type]()
    with faults_of(
        f"{beside}: expected a network's sizes as `spctrl tiny-weights` writes them, found others"
    ):
        sizes = msgspec.convert(read_config(beside), Sizes)
        if (sizes.backend, sizes.model_type) == (backend, model_type):
            _check_windows(sizes)
            with parameters_within({key: tuple(each.shape) for key, each in state.items()}, beside.name):
                return network_of_sizes(sizes)
    raise ExpectedError(
        f"{beside}: expected {backend} {model_type}, as backend and model_type of [mask] say, "
        f"found {sizes.backend} {sizes.model_type}"
    )
