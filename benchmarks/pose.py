"""Pose estimation: batches over all instances with image and mirror image in one pass, against one at a time.

The baseline is written plainly and shares only the network: an image, a box and a flip at a time, and a loop over
keypoints to decode. The networks are small; ``python -m benchmarks gpu`` measures ViTPose-H. All weights are random.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image

from benchmarks.common import Report, interleaved
from benchmarks.inputs import ap10k_documents, by_image, jpeg_of_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eval.pose_estimator import PoseEstimator, Protocol

# Torch and what needs it is imported where it is used: the other benchmarks run without it.

INSTANCES, QUICK_INSTANCES = 32, 8
REPEATS, QUICK_REPEATS = 3, 1
MAX_PX = 0.05
"""How far keypoints of the two sides may be apart in float32."""

VITPOSE_S, VITPOSE_H = (384, 12, 12), (1280, 32, 16)
"""Width, layers, heads."""

OURS, HALF, PLAIN = "this project", "this project, bfloat16", "one image, box and flip at a time"

Work = list[tuple[Path, list[list[float]]]]
Keypoints = np.ndarray[Any, np.dtype[np.float64]]


def run(report: Report) -> None:
    with TemporaryDirectory() as folder:
        _compare(report, Path(folder))


def _compare(report: Report, folder: Path) -> None:
    import torch

    from eval.pose_estimator import PROTOCOLS, PoseEstimator
    from eval.vitpose import tiny
    from eval.vitpose.checkpoints import load_vitpose

    tiny.build_mmpose(folder / "tiny.pth")
    model, _ = load_vitpose(folder / "tiny.pth")
    work = _work(QUICK_INSTANCES if report.quick else INSTANCES)
    where = f"on the processor, {torch.get_num_threads()} threads"
    cpu = torch.device("cpu")
    for dataset, protocol in PROTOCOLS.items():
        _check(PoseEstimator(copy.deepcopy(model), protocol, device=cpu), model, work)
        what = f"Tiny ViTPose {where}, {protocol.codec}"
        _race(report, what, model, protocol, work, at_least=2 if dataset == "ap10k" else None)
    network = random_network(*VITPOSE_S)
    _race(report, f"ViTPose-S {where}, msra", network, PROTOCOLS["ap10k"], work[: len(work) // 4])


def random_network(width: int, layers: int, heads: int) -> Any:
    """ViTPose with random weights, in a published size."""
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

    backbone = VitPoseBackboneConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, out_indices=[layers]
    )
    config = VitPoseConfig(backbone_config=backbone, use_simple_decoder=False, num_labels=17)
    return VitPoseForPoseEstimation(config).eval()


def _work(instances: int) -> Work:
    """AP-10K images of val with their boxes, each as a JPEG of its real size; about as many instances."""
    documents, _ = ap10k_documents()
    boxes = by_image(documents["val"])
    work: Work = []
    count = 0
    for image in documents["val"]["images"]:
        if count >= instances:
            break
        own = [each["bbox"] for each in boxes[image["id"]]]
        work.append((jpeg_of_size((image["width"], image["height"])), own))
        count += len(own)
    return work


def _check(estimator: PoseEstimator, model: Any, work: Work) -> None:
    """Both sides must find the same, but for a few flat heatmaps in noise, where DARK divides by nearly nothing."""
    apart = np.abs(_ours(estimator, work) - plain(model, estimator.protocol, work))
    apart = float(np.quantile(apart, 0.99))
    if apart > MAX_PX:
        raise RuntimeError(
            f"keypoints of the two sides are {apart:g} pixels apart, expected at most {MAX_PX:g}"
        )


def _race(
    report: Report, title: str, model: Any, protocol: Protocol, work: Work, at_least: float | None = None
) -> None:
    """A table, and the target of the line in half precision."""
    import torch

    from eval.pose_estimator import PoseEstimator

    device = torch.device("cpu")
    full, half = (
        PoseEstimator(copy.deepcopy(model), protocol, device=device, half=each) for each in (False, True)
    )
    contestants: dict[str, Callable[[], object]] = {
        OURS: lambda: _ours(full, work),
        HALF: lambda: _ours(half, work),
        PLAIN: lambda: plain(model, protocol, work),
    }
    repeats = QUICK_REPEATS if report.quick else REPEATS
    costs = interleaved(contestants, repeats)
    count, base_s = sum(len(boxes) for _, boxes in work), costs[PLAIN].wall_s
    rows = [
        (name, f"{count / cost.wall_s:.2f}", f"{cost.cpu_s / count:.3f}", f"{base_s / cost.wall_s:.2f}")
        for name, cost in costs.items()
    ]
    report.table(
        f"{title}: {count} instances of {len(work)} images, medians of {repeats} turns",
        ("", "instances/s", "CPU s/instance", "times one at a time"),
        rows,
        "From JPEG files to keypoints, with flip test.",
    )
    if at_least is not None:
        ratio = base_s / costs[HALF].wall_s
        report.target(f"{title}: one at a time / ours in bfloat16, wall time", ratio, at_least=at_least)


def _ours(estimator: PoseEstimator, work: Work) -> Keypoints:
    paths, boxes = zip(*work, strict=True)
    return estimator.predict(paths, boxes, keep_heatmaps=False).keypoints


# The plain way


def plain(model: Any, protocol: Protocol, work: Work) -> Keypoints:
    """Keypoints in pixels, one image, box and flip at a time."""
    found = []
    for path, boxes in work:
        image = np.asarray(Image.open(path).convert("RGB"))
        found += [_plain_pose(model, protocol, image, box) for box in boxes]
    return np.stack(found)


def _plain_pose(model: Any, protocol: Protocol, image: NDArray[np.uint8], box: list[float]) -> Keypoints:
    import torch

    from eval.pose_estimator import MEAN, STD, flip_indices
    from eval.vitpose.crops import boxes_to_regions, crop

    centres, sizes = boxes_to_regions([box])
    pixels = crop(image, centres[0], sizes[0], codec=protocol.codec)
    pixels = (pixels / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    with torch.inference_mode():
        inputs = (np.ascontiguousarray(each.transpose(2, 0, 1)) for each in (pixels, pixels[:, ::-1]))
        straight, mirrored = (
            model(torch.from_numpy(each)[None].to(model.device)).heatmaps[0].cpu().numpy() for each in inputs
        )
    back = mirrored[:, :, ::-1][flip_indices(protocol.skeleton)].copy()
    if protocol.shift_heatmap:
        back[:, :, 1:] = back[:, :, :-1].copy()
    heatmaps = (straight + back) / 2
    decode = _plain_msra if protocol.codec == "msra" else _plain_udp
    steps = np.array((48, 64)) - (protocol.codec == "udp")
    cells = np.array([decode(heatmap) for heatmap in heatmaps])
    found: Keypoints = cells / steps * sizes[0] + centres[0] - 0.5 * sizes[0]
    return found


def _plain_msra(heatmap: NDArray[np.float32]) -> tuple[float, float]:
    h, w = heatmap.shape
    y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
    dx = heatmap[y, x + 1] - heatmap[y, x - 1] if 1 < x < w - 1 and y > 0 else 0
    dy = heatmap[y + 1, x] - heatmap[y - 1, x] if 1 < y < h - 1 and x > 0 else 0
    return x + 0.25 * np.sign(dx), y + 0.25 * np.sign(dy)


def _plain_udp(heatmap: NDArray[np.float32]) -> tuple[float, float]:
    y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
    blurred = cv2.GaussianBlur(cv2.copyMakeBorder(heatmap, 5, 5, 5, 5, cv2.BORDER_CONSTANT), (11, 11), 0)[
        5:-5, 5:-5
    ]
    blurred = blurred * (heatmap.max() / blurred.max())
    log = np.pad(np.log(np.clip(blurred, 1e-3, 50)), 1, mode="edge")[y : y + 3, x : x + 3]
    gradient = np.array([log[1, 2] - log[1, 0], log[2, 1] - log[0, 1]]) / 2
    xx, yy = log[1, 2] - 2 * log[1, 1] + log[1, 0], log[2, 1] - 2 * log[1, 1] + log[0, 1]
    xy = (log[2, 2] - log[1, 2] - log[2, 1] + 2 * log[1, 1] - log[1, 0] - log[0, 1] + log[0, 0]) / 2
    hessian = np.array([[xx, xy], [xy, yy]]) + np.finfo(np.float32).eps * np.eye(2)
    dx, dy = np.linalg.solve(hessian, gradient)
    return x - dx, y - dy
