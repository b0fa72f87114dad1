"""Very small models with random weights in the file formats of the real ones, to run everything with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from spctrl.image_models import depth, sam_networks
from spctrl.models import tiny
from spctrl.weights import random_weights_path

SEGMENTERS: dict[str, tuple[sam_networks.Backend, sam_networks.ModelType]] = {
    "sam_hq_vit_b": ("sam_hq", "vit_b"),
    "sam_hq_vit_tiny": ("sam_hq", "vit_tiny"),
    "sam_vit_b": ("sam", "vit_b"),
}


def write_tiny_weights(folder: Path) -> Iterator[tuple[str, Path]]:
    """Write them below a folder under the file names of weights.yaml; returns each name and path."""
    for name, (backend, model_type) in SEGMENTERS.items():
        path = random_weights_path(folder, name)
        sam_networks.build_tiny(backend, model_type, path)
        yield name, path
    stable_diffusion = random_weights_path(folder, "stable_diffusion")
    builders: dict[str, Callable[[Path], None]] = {
        "zoedepth": depth.build_tiny,
        "stable_diffusion": tiny.build_stable_diffusion,
        "spctrl_ap10k": lambda path: tiny.build_spctrl(path, stable_diffusion, "ap10k"),
        "spctrl_humanart": lambda path: tiny.build_spctrl(path, stable_diffusion, "humanart"),
        "controlnet": lambda path: tiny.build_controlnet(path, stable_diffusion),
        "t2i_adapter": tiny.build_t2i_adapter,
    }
    for name, build_tiny in builders.items():
        path = random_weights_path(folder, name)
        path.mkdir(exist_ok=True)
        build_tiny(path)
        yield name, path
