"""Instance masks: whole batches, each image encoded once, against the released manner.

The baseline embeds an image again for each of its instances and works on one image at a time, in float32, with the
package's own ``SamPredictor``. Both sides have the same network and the same images and boxes, and their masks are
compared. The networks are small: the one of ``spctrl tiny-weights``, and one that spends its time in the image encoder
as real ones do, where encoding once saves no more than the instances per image (1.3). ``python -m benchmarks gpu``
measures SAM-HQ's ViT-H. All weights are random.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.common import BUILD, Report, interleaved, ms
from benchmarks.inputs import SPLITS, ap10k_file, ap10k_root, jpeg_of_size
from spctrl.data.datasets import AP10K
from spctrl.data.index import write_index
from spctrl.data.records import Record, records_from_table

if TYPE_CHECKING:
    import torch

    from spctrl.image_models.segments import Segmenter

# Torch and what needs it is imported where it is used: the other benchmarks run without it.

MAX_PIXELS = 100_000_000
IMAGES, QUICK_IMAGES = 48, 8
REPEATS, QUICK_REPEATS = 5, 1
BATCH_SIZE = 8
MAX_DIFFERENT = 1e-4
"""Largest share of pixels in which the two sides may differ."""
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

    from spctrl.image_models.sam_networks import Sizes, build_tiny, load_network, network_of_sizes

    work = _work(QUICK_IMAGES if report.quick else IMAGES)
    build_tiny("sam_hq", "vit_b", BUILD / "sam_hq_vit_b.pth")
    tiny = load_network("sam_hq", "vit_b", BUILD / "sam_hq_vit_b.pth")
    _compare(report, tiny, "tiny SAM-HQ (128 px)", work, at_least=1.5)
    torch.manual_seed(0)
    small = network_of_sizes(Sizes(backend="sam_hq", model_type="vit_b", weights="random", **SMALL))
    _compare(report, small, "small SAM-HQ (512 px)", work)


def _compare(
    report: Report,
    network: torch.nn.Module,
    what: str,
    work: Work,
    *,
    at_least: float | None = None,
) -> None:
    import torch

    from spctrl.image_models.sam_networks import PACKAGES
    from spctrl.image_models.segments import Segmenter

    segmenter = Segmenter(
        network.eval(), backend="sam_hq", prompt="box", device=torch.device("cpu"), empty="keep"
    )
    predictor = PACKAGES["sam_hq"].SamPredictor(network)
    different = different_share(
        ours(segmenter, work, BATCH_SIZE), [released(predictor, *each) for each in work]
    )
    if different > MAX_DIFFERENT:
        raise RuntimeError(
            f"masks differ in {different:.1%} of the pixels, expected at most {MAX_DIFFERENT:.2%}"
        )
    contestants: dict[str, Callable[[], object]] = {
        OURS: lambda: ours(segmenter, work, BATCH_SIZE),
        ALONE: lambda: ours(segmenter, work, 1),
        RELEASED: lambda: [released(predictor, *each) for each in work],
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
    where = f"the CPU, {torch.get_num_threads()} threads"
    report.table(
        f"Masks by {what} on {where}: {len(work)} images, {instances} instances, medians of {repeats} turns",
        ("", "images/s", "CPU ms/image", "times the released manner"),
        rows,
        f"From JPEG files in memory to PNG masks. Pixels that differ between the two sides: {different:.4%}.",
    )
    if at_least is not None:
        ratio = base_s / costs[OURS].wall_s
        report.target(f"masks, {what}, {where}: released manner / ours, wall time", ratio, at_least=at_least)


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


def ours(segmenter: Segmenter, work: Work, batch_size: int) -> list[bytes]:
    """PNG masks of all images."""
    from spctrl.conditions.masks import union_mask
    from spctrl.image_models.base import run_model

    masks = []
    for (record, _), result in zip(work, run_model(segmenter, work, batch_size=batch_size), strict=True):
        if not isinstance(result, bytes):
            raise RuntimeError(f"image {record.image_id} has no mask: {result}")
        masks.append(union_mask(record, result))
    return masks


def released(predictor: Any, record: Record, data: bytes) -> bytes:
    """The PNG mask of an image, which is encoded once for each of its instances."""
    from spctrl.conditions.masks import encode_png

    rgb = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    union = np.zeros(rgb.shape[:2], np.bool_)
    for x, y, w, h in record.bboxes_xywh.tolist():
        predictor.set_image(rgb)
        masks, _, _ = predictor.predict(box=np.array([x, y, x + w, y + h]), multimask_output=False)
        union |= masks[0]
    return encode_png(np.where(union, np.uint8(255), np.uint8(0)))


def different_share(ours: Sequence[bytes], theirs: Sequence[bytes]) -> float:
    """Share of the pixels of all masks."""
    wrong, total = 0, 0
    for pair in zip(ours, theirs, strict=True):
        first, second = (np.asarray(Image.open(io.BytesIO(each))) for each in pair)
        wrong += int(np.count_nonzero(first != second))
        total += first.size
    return wrong / total
