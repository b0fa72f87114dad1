"""SAM-HQ ViT-H: an image encoded again for each instance, as released, against once per image in batches."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu.inputs import Work, images_with_boxes
from benchmarks.gpu.measure import Measurements, flops_of, matrix_rate, peak_gib, seconds_of
from benchmarks.masks import SMALL, different_share, ours, released
from spctrl.image_models.base import mixed_precision
from spctrl.image_models.sam_networks import (
    PACKAGES,
    Backend,
    Sizes,
    build_tiny,
    load_network,
    network_of_sizes,
)
from spctrl.image_models.segments import Segmenter

IMAGES, SMALL_IMAGES = 48, 2
RELEASED_IMAGES = 3
"""On which the released manner is timed."""
BATCH_SIZES, SMALL_BATCH_SIZES = (8, 16), (2,)
LEAST = 6.0
"""Target at 8 instances an image."""
MOST_DIFFERENT = 0.05
"""Share of the pixels in which bfloat16 may differ from float32."""


def run(measurements: Measurements) -> None:
    """At 8 instances an image, and at AP-10K's mean of 1.3."""
    device, small = measurements.device, measurements.small
    if small:
        with TemporaryDirectory() as folder:
            network: Any = small_segmenter_network("sam_hq", Path(folder, "sam_hq.pth"), tiny=True)
    else:
        torch.manual_seed(0)
        with torch.device(device):
            network = PACKAGES["sam_hq"].sam_model_registry["vit_h"]()
    segmenter = Segmenter(network.eval(), backend="sam_hq", prompt="box", device=device, empty="keep")
    count = SMALL_IMAGES if small else IMAGES
    for name, counts in (
        ("8", itertools.repeat(2 if small else 8)),
        ("1.3", itertools.cycle((1, 2, 1))),
    ):
        work = images_with_boxes(list(itertools.islice(counts, count)))
        ratio = _compare(measurements, segmenter, name, work)
        if name == "8":
            measurements.speed_target(f"{name} instances an image: ours / released", ratio, at_least=LEAST)
    _encoder(measurements, segmenter)


def small_segmenter_network(backend: Backend, path: Path, *, tiny: bool) -> torch.nn.Module:
    """A network with random weights on the CPU, of 512 pixels, or of 128 for a dry run.

    Args:
        backend: the package.
        path: of a file to be written for the latter.
        tiny: whether it is the latter.
    """
    if tiny:
        build_tiny(backend, "vit_b", path)
        return load_network(backend, "vit_b", path).eval()
    torch.manual_seed(0)
    return network_of_sizes(Sizes(backend=backend, model_type="vit_b", weights="random", **SMALL)).eval()


def _compare(measurements: Measurements, segmenter: Segmenter, name: str, work: Work) -> float:
    """How many times as fast as the released manner the fastest batch size is."""
    device = measurements.device
    predictor = PACKAGES["sam_hq"].SamPredictor(segmenter.model)
    segmenter.model.mask_threshold = 0.0
    few = work[: 1 if measurements.small else RELEASED_IMAGES]
    found = different_share(ours(segmenter, few, len(few)), [released(predictor, *each) for each in few])
    measurements.target(f"{name} instances: pixels that differ", found, at_most=MOST_DIFFERENT)
    # Masks of random weights are noise, whose code is a hundred times as long as that of a real mask.
    segmenter.model.mask_threshold = math.inf
    base_s = seconds_of(
        lambda: [released(predictor, *each) for each in few], device, repeats=1, warm_ups=0
    ) / len(few)
    measurements.add(f"{name} instances an image: as released, float32", images_per_s=1 / base_s)
    rates = []
    for size in SMALL_BATCH_SIZES if measurements.small else BATCH_SIZES:
        seconds = seconds_of(lambda size=size: ours(segmenter, work, size), device, repeats=1, warm_ups=0)  # type: ignore[misc]
        rates.append(len(work) / seconds)
        measurements.add(
            f"{name} instances an image: ours, batches of {size}",
            images_per_s=rates[-1],
            times_released=rates[-1] * base_s,
            peak_gib=peak_gib(lambda size=size: ours(segmenter, work[:size], size), device),  # type: ignore[misc]
        )
    _parts(measurements, segmenter, name, work)
    return max(rates) * base_s


def _parts(measurements: Measurements, segmenter: Segmenter, name: str, work: Work) -> None:
    """Decoding and encoding on one CPU thread, and the network's part."""
    device, batch = measurements.device, work[: BATCH_SIZES[0]]
    decoded = [segmenter.decode(*each) for each in batch]
    outputs = segmenter.infer(decoded)
    parts = {
        "decode": lambda: [segmenter.decode(*each) for each in batch],
        "network": lambda: segmenter.infer(decoded),
        "encode": lambda: [
            segmenter.encode(record, *each)
            for (record, _), *each in zip(batch, decoded, outputs, strict=True)
        ],
    }
    measurements.add(
        f"{name} instances an image: parts, ms an image",
        **{
            part: 1000 * seconds_of(function, device, repeats=1, warm_ups=0) / len(batch)
            for part, function in parts.items()
        },
    )


def _encoder(measurements: Measurements, segmenter: Segmenter) -> None:
    """The image encoder alone."""
    device = measurements.device
    size = SMALL_BATCH_SIZES[0] if measurements.small else BATCH_SIZES[0]
    encoder = segmenter.model.image_encoder
    squares = torch.randn(size, 3, encoder.img_size, encoder.img_size, device=device)

    def encode() -> None:
        with torch.inference_mode(), mixed_precision(device):
            encoder(squares)

    seconds = seconds_of(encode, device, repeats=3)
    measurements.add(
        f"image encoder alone, batches of {size}",
        images_per_s=size / seconds,
        share_of_matrix_rate=flops_of(encode) / seconds / matrix_rate(device, torch.bfloat16),
    )
