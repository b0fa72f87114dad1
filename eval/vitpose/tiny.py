"""A very small ViTPose with random weights, the same network in each of the formats, to run everything with.

The numbers come from numpy's PCG64, whose stream is fixed: the stored constants of tests/parity were made with the same
weights in mmpose, and must outlive versions of torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.vitpose.checkpoints import LAYER_NORM_EPS, MMPOSE, VITPOSE, attention_heads, from_transformers
from spctrl.data.records import NUM_KEYPOINTS
from spctrl.image_models.loading import mark_random
from spctrl.weights import random_weights_path, save_torch_file

if TYPE_CHECKING:
    import torch

WIDTH, LAYERS, MLP_RATIO = 128, 2, 4
EXPERTS, EXPERT_ROWS = 6, 32
"""As many experts as ViTPose+ has, each making a quarter of the MLP's output."""

AP10K_EXPERT = 3
HEAD_SCALE, HEAD_BIAS = 0.3, 0.3
"""Of the last layer: heatmaps then have positive maxima of about 1, like those of trained weights."""


def build_transformers(folder: Path) -> None:
    """Write a ViTPose+ folder in transformers' format; the AP-10K expert makes the tiny network."""
    model = _model(num_experts=EXPERTS)
    model.load_state_dict(_add_experts(_tiny_state(), "backbone.encoder.layer.{}.mlp", WIDTH - EXPERT_ROWS))
    model.save_pretrained(folder)
    mark_random(folder)


def build_mmpose(path: Path) -> None:
    """Write a checkpoint of mmpose 1.x."""
    _save(from_transformers(_tiny_state(), MMPOSE), path)


def build_vitpose(path: Path) -> None:
    """Write a ViTPose+ checkpoint of the ViTPose repository, with all experts and heads; AP-10K's make the network."""
    state = _add_experts(
        from_transformers(_tiny_state(), VITPOSE), f"{VITPOSE.layer}.{{}}.mlp", WIDTH - EXPERT_ROWS
    )
    heads = {key: value for key, value in state.items() if key.startswith(VITPOSE.head)}
    for expert in range(1, EXPERTS):
        own = heads if expert == AP10K_EXPERT else {key: value * 0.5 for key, value in heads.items()}
        name = f"associate_keypoint_heads.{expert - 1}"
        state |= {key.replace(VITPOSE.head, name): value for key, value in own.items()}
    state |= {key: value * 0.5 for key, value in heads.items()}
    _save(state, path)


BUILDERS: Mapping[str, Callable[[Path], None]] = {
    "vitpose": build_transformers,
    "vitpose_ap10k": build_vitpose,
    "vitpose_humanart": build_mmpose,
}
"""By the names of weights.yaml."""


def write_tiny_weights(folder: Path) -> Iterator[tuple[str, Path]]:
    """Write all of them below a folder under the file names of weights.yaml; returns each name and path."""
    for name, build in BUILDERS.items():
        path = random_weights_path(folder, name)
        build(path)
        yield name, path


def _model(num_experts: int = 1) -> Any:
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

    backbone = VitPoseBackboneConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=attention_heads(WIDTH),
        mlp_ratio=MLP_RATIO,
        num_experts=num_experts,
        part_features=EXPERT_ROWS,
        layer_norm_eps=LAYER_NORM_EPS,
        out_indices=[LAYERS],
    )
    config = VitPoseConfig(backbone_config=backbone, use_simple_decoder=False, num_labels=NUM_KEYPOINTS)
    return VitPoseForPoseEstimation(config)


def _tiny_state() -> dict[str, torch.Tensor]:
    """The network under transformers' names."""
    shapes = {key: tuple(value.shape) for key, value in _model().state_dict().items()}
    return {key: _random(key, shape, seed) for seed, (key, shape) in enumerate(sorted(shapes.items()))}


def _random(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Uniform numbers that keep the variance of what goes through them, and norms that are nearly neutral.

    Transposed convolutions mix channels at random and interpolate in space. With rougher heatmaps than that DARK, which
    divides by their curvature, would make several pixels of a difference in the seventh digit.
    """
    import torch

    module, _, kind = key.rpartition(".")
    if kind == "num_batches_tracked":
        return torch.zeros((), dtype=torch.int64)
    interpolates = "deconv" in module
    numbers = np.random.default_rng(seed).random(shape[:2] if interpolates else shape) * 2 - 1
    if kind == "running_var" or (kind == "weight" and "norm" in module):
        numbers = 1 + 0.2 * numbers
    elif interpolates:
        line = np.array([0.25, 0.75, 0.75, 0.25])
        numbers = numbers[..., None, None] * np.outer(line, line) * np.sqrt(6 / shape[0])
    elif kind == "weight":
        scale = HEAD_SCALE if module == "head.conv" else 1.0
        numbers *= scale * np.sqrt(3 / np.prod(shape[1:]))
    elif key == "head.conv.bias":
        numbers = HEAD_BIAS + 0.1 * numbers
    elif kind != "position_embeddings":
        numbers *= 0.1
    return torch.from_numpy(numbers.astype(np.float32))


def _add_experts(state: Mapping[str, torch.Tensor], mlp: str, shared_rows: int) -> dict[str, torch.Tensor]:
    """The last rows of each MLP become the AP-10K expert's; the others get them too, made smaller."""
    added = dict(state)
    for layer in range(LAYERS):
        for kind in ("weight", "bias"):
            prefix = mlp.format(layer)
            full = state[f"{prefix}.fc2.{kind}"]
            added[f"{prefix}.fc2.{kind}"] = full[:shared_rows].clone()
            for expert in range(EXPERTS):
                factor = 1.0 if expert == AP10K_EXPERT else 0.1 * expert
                added[f"{prefix}.experts.{expert}.{kind}"] = full[shared_rows:] * factor
    return added


def _save(state: Mapping[str, torch.Tensor], path: Path) -> None:
    save_torch_file({"meta": {}, "state_dict": dict(state)}, path)
    path.with_name(f"{path.name}.json").write_text(json.dumps({"weights": "random"}) + "\n")
