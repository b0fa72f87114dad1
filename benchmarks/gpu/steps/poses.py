"""ViTPose-H with flip test: one image, box and flip at a time, against batches over all instances."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu.inputs import images_with_boxes
from benchmarks.gpu.measure import Measurements, flops_of, matrix_rate, peak_gib, seconds_of
from benchmarks.inputs import jpeg_of_size
from benchmarks.pose import VITPOSE_H, plain, random_network
from eval.pose_estimator import PROTOCOLS, PoseEstimator

IMAGES, SMALL_IMAGES, PLAIN_IMAGES, INSTANCES = 384, 1, 24, 2
BATCH_SIZES, SMALL_BATCH_SIZES = (64, 128), (2,)
TINY = (48, 2, 2)
LEAST = 2.0


def run(measurements: Measurements) -> None:
    """One at a time in float32, and batches in float32 and float16, from JPEG files to keypoints."""
    device, small = measurements.device, measurements.small
    torch.manual_seed(0)
    with torch.device(device):
        network = random_network(*(TINY if small else VITPOSE_H))
    work: list[tuple[Path, list[list[float]]]] = [
        (jpeg_of_size(record.size_wh), record.bboxes_xywh.tolist())
        for record, _ in images_with_boxes([INSTANCES] * (SMALL_IMAGES if small else IMAGES))
    ]
    protocol = PROTOCOLS["ap10k"]
    few = work[: SMALL_IMAGES if small else PLAIN_IMAGES]
    base_s = seconds_of(lambda: plain(network, protocol, few), device, repeats=1)
    base_s /= INSTANCES * len(few)
    measurements.add("one image, box and flip at a time, float32", instances_per_s=1 / base_s)
    one = torch.randn(1, 3, 256, 192, device=device)
    with torch.inference_mode():
        flops = 2 * flops_of(lambda: network(one))
    found = {}
    for half in (False,) if small else (False, True):
        dtype = torch.float16 if half else torch.float32
        for size in SMALL_BATCH_SIZES if small else BATCH_SIZES:
            estimator = PoseEstimator(network, protocol, device=device, batch_size=size, half=half)

            def predict(estimator: PoseEstimator = estimator) -> None:
                paths, boxes = zip(*work, strict=True)
                estimator.predict(paths, boxes, keep_heatmaps=False)

            crops = [np.zeros((256, 192, 3), np.uint8)] * size
            network_s = seconds_of(lambda e=estimator, c=crops: e.infer(c), device, repeats=3) / size  # type: ignore[misc]
            seconds = seconds_of(predict, device, repeats=1, warm_ups=0) / (INSTANCES * len(work))
            found[half] = max(found.get(half, 0.0), 1 / seconds)
            measurements.add(
                f"batches of {size}, {str(dtype).removeprefix('torch.')}",
                instances_per_s=1 / seconds,
                network_alone_per_s=1 / network_s,
                times_one_at_a_time=base_s / seconds,
                peak_gib=peak_gib(lambda e=estimator, c=crops: e.infer(c), device),  # type: ignore[misc]
                share_of_matrix_rate=flops
                / network_s
                / matrix_rate(device, torch.float16 if half else torch.float32),
            )
    measurements.speed_target("float32: ours / one at a time", found[False] * base_s, at_least=LEAST)
