"""Very small models with random weights, in the file formats of the real ones, to measure with."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from spctrl.image_models.loading import mark_random
from spctrl.models.tiny import MAX_TOKENS, VOCABULARY_SIZE, random_weights, write_tokenizer
from spctrl.weights import random_weights_path, save_torch_file

if TYPE_CHECKING:
    import torch

CLIP_WIDTH = 32
CLIP_SIDE, CLIP_PATCH = 64, 16


def write_tiny_weights(folder: Path) -> Iterator[tuple[str, Path]]:
    """Write them below a folder under the file names of weights.yaml; returns each name and path."""
    for name, build in (("inception", build_inception), ("clip", build_clip)):
        path = random_weights_path(folder, name)
        build(path)
        yield name, path


def build_inception(path: Path) -> None:
    """Write random weights, the same ones each time, for torch-fidelity's InceptionV3, and that they are random to
    ``<path>.json``.

    That network has one size, 24 million numbers. So that the file holds only 2 million, all kernels are cut from one
    run of random numbers in half precision. Each layer's normalisation scales them by its number of inputs (He et al.,
    "Delving Deep into Rectifiers", 2015), so that values stay as large as the image's from layer to layer.
    """
    import torch

    shapes = _inception_shapes()
    longest = max(shape.numel() for shape in shapes.values())
    numbers = torch.randn(longest, generator=torch.Generator().manual_seed(0)).half()
    state = {}
    for position, (name, shape) in enumerate(shapes.items()):
        layer, _, kind = name.rpartition(".")
        kernel = shapes.get(layer.replace(".bn", ".conv") + ".weight", shape)
        if kind == "num_batches_tracked":
            state[name] = torch.tensor(0)
        elif layer.endswith(".bn"):
            gain = math.sqrt(2 / kernel[1:].numel())
            value = {"weight": gain, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}[kind]
            state[name] = torch.tensor(value).expand(shape)
        else:
            start = 9973 * position % (longest - shape.numel() + 1)
            state[name] = numbers[start : start + shape.numel()].view(shape)
    save_torch_file(state, path)
    path.with_name(f"{path.name}.json").write_text(json.dumps({"weights": "random"}) + "\n")


def _inception_shapes() -> dict[str, torch.Size]:
    """Shapes of the network's state, by name, without weights and without memory for them."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_arguments: object, **_options: object) -> None:
            """The constructor would load weights, or download them."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.device("meta"):
        network = Untrained("shapes", ["2048"], feature_extractor_weights_path=nothing)
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def build_clip(folder: Path) -> None:
    """Write a CLIP model with its tokenizer and image settings in transformers' format."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    sizes = {
        "hidden_size": CLIP_WIDTH,
        "intermediate_size": 2 * CLIP_WIDTH,
        "projection_dim": CLIP_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = {"vocab_size": VOCABULARY_SIZE, "max_position_embeddings": MAX_TOKENS}
    vision = {"image_size": CLIP_SIDE, "patch_size": CLIP_PATCH}
    config = CLIPConfig(
        text_config={**sizes, **text}, vision_config={**sizes, **vision}, projection_dim=CLIP_WIDTH
    )
    with random_weights(3):
        model = CLIPModel(config)
    model.save_pretrained(folder)
    settings = {"size": {"shortest_edge": CLIP_SIDE}, "crop_size": {"height": CLIP_SIDE, "width": CLIP_SIDE}}
    CLIPImageProcessor(**settings).save_pretrained(folder)
    write_tokenizer(folder)
    mark_random(folder)
