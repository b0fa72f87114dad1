"""Instance masks: whole batches, each image encoded once, against the released manner.

The baseline embeds an image again for each of its instances and works on one image at a time, in float32, with the
package's own ``SamPredictor``. Both sides have the same network and the same images and boxes, and their masks are
compared. On the processor with small networks: the one of ``spctrl tiny-weights``, and one that spends its time in
the image encoder as real ones do, where encoding once saves no more than the instances per image (1.3). On a GPU,
where there is one, with SAM-HQ's ViT-H. All weights are random.
"""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.common import BUILD, Report, interleaved, ms
from benchmarks.inputs import SPLITS, ap10k_file, ap10k_root, jpeg_of_size
from spctrl.datasets import AP10K
from spctrl.index import write_index
from spctrl.records import Record, records_from_table

if TYPE_CHECKING:
    import torch

    from spctrl.image_models.segments import Segmenter

# Torch and what needs it is imported where it is used: the other benchmarks run without it.

MAX_PIXELS = 100_000_000
IMAGES, QUICK_IMAGES = 48, 8
REPEATS, QUICK_REPEATS = 5, 1
BATCH_SIZE = 8
MAX_DIFFERENT, MAX_DIFFERENT_HALF = 1e-4, 0.05
"""Largest share of pixels in which the two sides may differ: in float32, and in half precision."""
MATRIX_SIDE, MATRIX_REPEATS = 8192, 50
SMALL: dict[str, Any] = {
    "image_size": 512,
    "prompt_dim": 64,
    "decoder_depth": 2,
    "decoder_heads": 4,
    "decoder_mlp_dim": 256,
    "iou_head_dim": 64,
    "encoder": {
        "embed_dim": 192,
        "depth": 6,
        "num_heads": 3,
        "window_size": 14,
        "global_attn_indexes": (2, 5),
    },
}

OURS, ALONE, RELEASED = (
    f"this project, batches of {BATCH_SIZE}",
    "this project, batches of 1",
    "released manner",
)
Work = list[tuple[Record, bytes]]


def run(report: Report) -> None:
    # Read when torch is first imported. Waiting threads that spin, as they do by default, take the time of other work
    # on the machine, and of each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from spctrl.image_models.sam_networks import PACKAGES, Sizes, build_tiny, load_network, network_of_sizes

    work = _work(QUICK_IMAGES if report.quick else IMAGES)
    processor = torch.device("cpu")
    build_tiny("sam_hq", "vit_b", BUILD / "sam_hq_vit_b.pth")
    tiny = load_network("sam_hq", "vit_b", BUILD / "sam_hq_vit_b.pth")
    _compare(report, tiny, "tiny SAM-HQ (128 px)", processor, work, at_least=1.5)
    torch.manual_seed(0)
    small = network_of_sizes(Sizes(backend="sam_hq", model_type="vit_b", weights="random", **SMALL))
    _compare(report, small, "small SAM-HQ (512 px)", processor, work)
    if torch.cuda.is_available():
        large = PACKAGES["sam_hq"].sam_model_registry["vit_h"]()
        _compare(report, large, "SAM-HQ ViT-H (1024 px)", torch.device("cuda:0"), work, at_least=6)


def _compare(
    report: Report,
    network: torch.nn.Module,
    what: str,
    device: torch.device,
    work: Work,
    *,
    at_least: float | None = None,
) -> None:
    from spctrl.image_models.sam_networks import PACKAGES
    from spctrl.image_models.segments import Segmenter

    segmenter = Segmenter(network.eval(), backend="sam_hq", prompt="box", device=device, empty="keep")
    predictor = PACKAGES["sam_hq"].SamPredictor(network)
    on_gpu = device.type == "cuda"
    different = _different(_ours(segmenter, work, BATCH_SIZE), [_released(predictor, *each) for each in work])
    limit = MAX_DIFFERENT_HALF if on_gpu else MAX_DIFFERENT
    if different > limit:
        raise RuntimeError(f"masks differ in {different:.1%} of the pixels, expected at most {limit:.2%}")
    contestants: dict[str, Callable[[], object]] = {
        OURS: lambda: _ours(segmenter, work, BATCH_SIZE),
        ALONE: lambda: _ours(segmenter, work, 1),
        RELEASED: lambda: [_released(predictor, *each) for each in work],
    }
    repeats = QUICK_REPEATS if report.quick else REPEATS
    costs = interleaved(contestants, repeats)
    base_s = costs[RELEASED].wall_s
    rows = [
        (
            name,
            f"{len(work) / cost.wall_s:.2f}",
            ms(cost.cpu_s / len(work)),
            f"{base_s / cost.wall_s:.2f}",
        )
        for name, cost in costs.items()
    ]
    instances = sum(len(record.bboxes_xywh) for record, _ in work)
    where = _device_name(device)
    report.table(
        f"Masks by {what} on {where}: {len(work)} images, {instances} instances, medians of {repeats} turns",
        ("", "images/s", "CPU ms/image", "times the released manner"),
        rows,
        f"From JPEG files in memory to PNG masks. Pixels that differ between the two sides: {different:.4%}.",
    )
    if at_least is not None:
        ratio = base_s / costs[OURS].wall_s
        report.target(f"masks, {what}, {where}: released manner / ours, wall time", ratio, at_least=at_least)
    if on_gpu:
        _tell_limit(report, segmenter, len(work) / costs[OURS].wall_s)


def _device_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"the processor, {torch.get_num_threads()} threads"


def _work(count: int) -> Work:
    """Records drawn from AP-10K's train and val, each with a JPEG of the image's real size. Evenly from one instance to
    many, so that few stand for all (10,394 instances in 8,018 images)."""
    root, _ = ap10k_root()
    BUILD.mkdir(parents=True, exist_ok=True)
    records = []
    for split in SPLITS:
        index = BUILD / f"ap10k-{split}.parquet"
        path = root / "annotations" / ap10k_file(split)
        write_index(path, AP10K, split, index, max_pixels=MAX_PIXELS)
        records += records_from_table(pq.read_table(index))
    random.Random(0).shuffle(records)
    records.sort(key=lambda record: len(record.bboxes_xywh))
    chosen = [records[(2 * i + 1) * len(records) // (2 * count)] for i in range(count)]
    random.Random(1).shuffle(chosen)
    return [(record, jpeg_of_size(record.size_wh).read_bytes()) for record in chosen]


def _ours(segmenter: Segmenter, work: Work, batch_size: int) -> list[bytes]:
    from spctrl.conditions import union_mask
    from spctrl.image_models.base import run_model

    masks = []
    for (record, _), result in zip(work, run_model(segmenter, work, batch_size=batch_size), strict=True):
        if not isinstance(result, bytes):
            raise RuntimeError(f"image {record.image_id} has no mask: {result}")
        masks.append(union_mask(record, result))
    return masks


def _released(predictor: Any, record: Record, data: bytes) -> bytes:
    from spctrl.conditions import encode_png

    rgb = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    union = np.zeros(rgb.shape[:2], np.bool_)
    for x, y, w, h in record.bboxes_xywh.tolist():
        predictor.set_image(rgb)
        masks, _, _ = predictor.predict(box=np.array([x, y, x + w, y + h]), multimask_output=False)
        union |= masks[0]
    return encode_png(np.where(union, np.uint8(255), np.uint8(0)))


def _different(ours: Sequence[bytes], theirs: Sequence[bytes]) -> float:
    """Share of the pixels of all masks."""
    wrong, total = 0, 0
    for pair in zip(ours, theirs, strict=True):
        first, second = (np.asarray(Image.open(io.BytesIO(each))) for each in pair)
        wrong += int(np.count_nonzero(first != second))
        total += first.size
    return wrong / total


def _tell_limit(report: Report, segmenter: Segmenter, images_per_s: float) -> None:
    """How much of the GPU's matrix rate, measured here, the image encoder's own operations are."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from spctrl.image_models.base import mixed_precision

    encoder, device = segmenter.model.image_encoder, segmenter.device
    square = torch.zeros(1, 3, encoder.img_size, encoder.img_size, device=device)
    with torch.inference_mode(), mixed_precision(device), FlopCounterMode(display=False) as counter:
        encoder(square)
    per_image, rate = counter.get_total_flops(), _matrix_rate(device, MATRIX_SIDE, MATRIX_REPEATS)
    report.table(
        "How near the limit",
        ("bf16 matrix rate, TFLOP/s", "image encoder, TFLOP/image", "images/s", "share of the rate"),
        [
            (
                f"{rate / 1e12:.0f}",
                f"{per_image / 1e12:.2f}",
                f"{images_per_s:.1f}",
                f"{per_image * images_per_s / rate:.0%}",
            )
        ],
        f"The rate is that of {MATRIX_SIDE} x {MATRIX_SIDE} products on this device, just now.",
    )


def _matrix_rate(device: torch.device, side: int, repeats: int) -> float:
    """Operations per second of bf16 matrix products."""
    import torch

    factor = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    factor @ factor
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        factor @ factor
    torch.cuda.synchronize(device)
    return 2 * side**3 * repeats / (time.perf_counter() - start)
