"""The spatial-text embedding as one table lookup, against a loop over the masks of its 34 values.

The loop is written plainly from REFERENCE section 9: for each keypoint and each link, the mask of the pixels that
have its value times its row, all added up. Both sides have the same weights, and must give the same results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import Report, interleaved, ms
from benchmarks.inputs import ap10k_documents, by_image
from spctrl.conditions.spatext import FIRST_KEYPOINT, FIRST_LINK, draw_index_map
from spctrl.data.skeletons import AP10K

if TYPE_CHECKING:
    from torch import Tensor

    from spctrl.models.embedding import SpatextEmbedding

# Torch is imported where it is used: the other benchmarks run without it.

RESOLUTION, CHANNELS = 512, 3
BATCH_SIZES = (1, 4)
TARGET_BATCH_SIZE = 4
REPEATS, QUICK_REPEATS = 3, 1
IMAGES_PER_TURN = 24
"""A turn is as many passes as it takes for so many images: the first one after a pause finds its memory reclaimed."""

OURS, LOOP, ROWS = "table lookup", "loop over 34 masks", "the rows alone (the MLP)"
TOLERANCE = 1e-6
"""Largest difference of the two sides' float32 results, and relative difference of their gradients' norms."""


def run(report: Report) -> None:
    import torch

    threads = torch.get_num_threads()
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        _compare(report, torch.device("cpu"), f"on the processor, threads: {count}", has_target=count == 1)
    if torch.cuda.is_available():
        device = torch.device("cuda:0")
        _compare(report, device, f"on {torch.cuda.get_device_name(device)}")


def _compare(report: Report, device: Any, where: str, *, has_target: bool = False) -> None:
    import torch

    from spctrl.models.embedding import SpatextEmbedding

    torch.manual_seed(0)
    embedding = SpatextEmbedding(CHANNELS).to(device).eval()
    rows = []
    for batch_size in BATCH_SIZES:
        index_map = torch.from_numpy(_index_maps(batch_size)).to(device).float()
        gradient = torch.randn(batch_size, CHANNELS, RESOLUTION, RESOLUTION).to(device)
        _check(embedding, index_map, gradient)
        passes = IMAGES_PER_TURN // batch_size
        contestants = {
            name: _turn(embedding, forward, index_map, gradient, passes)
            for name, forward in (
                (OURS, embedding),
                (LOOP, lambda maps: loop_over_masks(embedding, maps)),
                (ROWS, lambda _: embedding.table()),
            )
        }
        costs = interleaved(contestants, QUICK_REPEATS if report.quick else REPEATS)
        base_s = costs[LOOP].wall_s
        rows += [
            (
                f"{name}, batch {batch_size}",
                ms(cost.wall_s / passes),
                ms(cost.cpu_s / passes),
                f"{base_s / cost.wall_s:.1f}",
            )
            for name, cost in costs.items()
        ]
        if has_target and batch_size == TARGET_BATCH_SIZE:
            report.target(
                f"forward and backward, one thread, batch {batch_size}: loop / lookup, wall time",
                base_s / costs[OURS].wall_s,
                at_least=10,
            )
    report.table(
        f"Spatial-text embedding at {RESOLUTION} x {RESOLUTION}, {CHANNELS} channels, {where}",
        ("forward and backward", "wall ms", "CPU ms", "times the loop"),
        rows,
        "Index maps of AP-10K's annotations. Both sides compute the rows by the same MLP.",
    )


def loop_over_masks(embedding: SpatextEmbedding, index_map: Tensor) -> Tensor:
    """(B, 1, H, W) to (B, C, H, W)."""
    import torch

    keypoints = embedding.keypoint_rows()
    links = embedding.link_rows(keypoints)
    out = torch.zeros(len(index_map), CHANNELS, *index_map.shape[2:], device=index_map.device)
    for first, rows in ((FIRST_KEYPOINT, keypoints), (FIRST_LINK, links)):
        for value, row in enumerate(rows, first):
            out = out + (index_map == value) * row[:, None, None]
    return out


def _turn(
    embedding: SpatextEmbedding,
    forward: Callable[[Tensor], Tensor],
    index_map: Tensor,
    gradient: Tensor,
    passes: int,
) -> Callable[[], None]:
    """Forward and backward, with a given gradient of the result, a number of times."""
    import torch

    def turn() -> None:
        for _ in range(passes):
            embedding.zero_grad()
            out = forward(index_map)
            out.backward(gradient if out.shape == gradient.shape else torch.ones_like(out))
        if out.is_cuda:
            torch.cuda.synchronize()

    return turn


def _check(embedding: SpatextEmbedding, index_map: Tensor, gradient: Tensor) -> None:
    """Both sides must do the same work."""
    found, gradients = [], []
    for forward in (embedding, lambda maps: loop_over_masks(embedding, maps)):
        embedding.zero_grad()
        found.append(forward(index_map))
        found[-1].backward(gradient)
        gradients.append([each.grad.norm() for each in embedding.parameters() if each.grad is not None])
    apart = float((found[0] - found[1]).detach().abs().max())
    gradient_apart = max(float(abs(ours / other - 1)) for ours, other in zip(*gradients, strict=True))
    if apart > TOLERANCE or gradient_apart > 1000 * TOLERANCE:
        raise RuntimeError(f"results of the two sides are {apart:g}, gradients {gradient_apart:g} apart")


def _index_maps(count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(count, 1, R, R) uint8: images of AP-10K's train split at even distances, squeezed into squares."""
    document = ap10k_documents()[0]["train"]
    instances = by_image(document)
    images = [image for image in document["images"] if instances[image["id"]]]
    maps = np.zeros((count, 1, RESOLUTION, RESOLUTION), np.uint8)
    for pixels, image in zip(maps[:, 0], images[:: len(images) // count], strict=False):
        keypoints = np.array([each["keypoints"] for each in instances[image["id"]]], float).reshape(-1, 17, 3)
        keypoints[:, :, :2] *= RESOLUTION / np.array([image["width"], image["height"]])
        draw_index_map(pixels, keypoints, links=AP10K.links)
    return maps
