"""Training samples: this project's loader against one in the released manner.

The released manner (REFERENCE sections 6, 8 and 10) opens everything from files: PIL decodes the image, torchvision
resizes and crops it, the stored index map goes the same way with nearest pixels, and each of 17 stored heatmaps is made
8 bit, resized to the image and once more to the crop. Here the index map is drawn and the heatmaps are computed where
the loss compares. Both sides read AP-10K's real labels, where there are any, with JPEGs of the images' real sizes, one
after the other in one process on one thread, from a warm file cache. Their samples are compared before they are timed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.common import Report, interleaved, ms
from benchmarks.inputs import SPLITS, ap10k_file, ap10k_root, jpeg_of_size
from spctrl.conditions.spatext import render_spatext
from spctrl.data.datasets import AP10K
from spctrl.data.index import write_index
from spctrl.data.manifest import ConditionFacts, ImageFacts, manifest_batch
from spctrl.data.records import Record, records_from_table
from spctrl.export.layout import Layout
from spctrl.export.text_files import heatmaps_npy
from spctrl.store.store import Store

if TYPE_CHECKING:
    from spctrl.training.dataset import SpCtrlDataset

# Torch and what needs it is imported where it is used: the other benchmarks run without it.

MAX_PIXELS = 100_000_000
IMAGES, QUICK_IMAGES = 64, 8
REPEATS, QUICK_REPEATS = 5, 1
RESOLUTION = 512
MAX_PIXEL, MAX_HEATMAP = 4.01 / 255, 1e-4
"""How far the two sides' images (two levels) and, seen as the loss sees them, heatmaps may be apart."""

RELEASED, DECODED, CACHED = "released manner", "this project, images decoded", "this project, cached latents"


def run(report: Report) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as folder:
            _race(report, Path(folder))
    finally:
        torch.set_num_threads(threads)


def _race(report: Report, folder: Path) -> None:
    records, root = dataset_records(folder, QUICK_IMAGES if report.quick else IMAGES)
    manifest = write_dataset(folder, records, root)
    tokenizer = write_ap10k_tokenizer(folder)
    released = _Released(folder, records, tokenizer)
    settings: dict[str, Any] = {
        "tokenizer": tokenizer,
        "enable_learnable_kpttoken": True,
        "add_keypoint_prompt": 1.0,
        "heatmap_type": "partition",
        "resolution": RESOLUTION,
    }
    from spctrl.training import SpCtrlDataset

    decoded = SpCtrlDataset(manifest, data_root=folder, **settings)
    cached = SpCtrlDataset(manifest, store=folder / "store", latents=True, **settings)
    _check(released, decoded)
    contestants: dict[str, Callable[[], object]] = {
        RELEASED: lambda: _read_all(released, len(records)),
        DECODED: lambda: _read_all(decoded, len(records)),
        CACHED: lambda: _read_all(cached, len(records)),
    }
    repeats = QUICK_REPEATS if report.quick else REPEATS
    costs = interleaved(contestants, repeats)
    count, base = len(records), costs[RELEASED]
    report.table(
        f"Samples of {RESOLUTION} x {RESOLUTION} pixels with 17 heatmaps: {count} images, medians of {repeats} turns",
        ("", "ms/sample", "CPU ms/sample", "samples/s", "times the released manner, CPU"),
        [
            (
                name,
                ms(cost.wall_s / count),
                ms(cost.cpu_s / count),
                f"{count / cost.wall_s:.0f}",
                f"{base.cpu_s / cost.cpu_s:.1f}",
            )
            for name, cost in costs.items()
        ],
        "One process, one thread. The released manner's loss resizes 17 maps of 512 x 512 once more; not counted.",
    )
    report.target(
        "samples, images decoded: CPU time, released / ours", base.cpu_s / costs[DECODED].cpu_s, at_least=8
    )
    report.target(
        "samples, cached latents: CPU time, released / ours", base.cpu_s / costs[CACHED].cpu_s, at_least=40
    )


def _read_all(samples: Any, count: int) -> None:
    """Each sample is let go before the next, as a loader does that has put it into a batch."""
    for i in range(count):
        samples[i]


# Inputs


def dataset_records(folder: Path, count: int) -> tuple[list[Record], Path]:
    """Some records of AP-10K's training split, drawn at random (seeded), and the dataset's folder."""
    root, _ = ap10k_root()
    path = root / "annotations" / ap10k_file(SPLITS[0])
    write_index(path, AP10K, "train", folder / "index.parquet", max_pixels=MAX_PIXELS)
    table = pq.read_table(folder / "index.parquet", partitioning=None)
    chosen = sorted(random.Random(0).sample(range(len(table)), count))
    table = table.take(chosen)
    pq.write_table(table, folder / "index.parquet")
    return records_from_table(table), root


def write_dataset(folder: Path, records: list[Record], root: Path) -> Path:
    """Images, stored index maps and heatmaps, latents in packs, and the manifest."""
    for name in ("data", "maps", "heatmaps"):
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    latents = {}
    for record in records:
        stem = Path(record.file_name).stem
        (folder / "data" / record.file_name).write_bytes(jpeg_of_size(record.size_wh).read_bytes())
        drawn = render_spatext(record, links=AP10K.skeleton.links, keypoint_radius_px=4, link_half_width_px=4)
        (folder / "maps" / f"{stem}.png").write_bytes(drawn)
        (folder / "heatmaps" / f"{stem}.npy").write_bytes(heatmaps_npy(record))
        moments = rng.normal(size=(8, RESOLUTION // 8, RESOLUTION // 8))
        latents[record.image_id] = moments.astype("<f2").tobytes()
    keys = {image_id: f"{image_id:032x}" for image_id in latents}
    Store(folder / "store").write_pack(
        "latents", ".safetensors", [(keys[image_id], data) for image_id, data in latents.items()]
    )
    (rows,) = pq.read_table(folder / "index.parquet", partitioning=None).combine_chunks().to_batches()
    layout = Layout(dataset=AP10K, split="train", split_id="1", names="readme", openpose_style="openpose")
    made = {"latents": {image_id: ConditionFacts(key, "") for image_id, key in keys.items()}}
    images = {record.image_id: ImageFacts("", "", 1) for record in records}
    batch = manifest_batch(rows, layout, images, made, set(), {"latents": "random"}, {})
    with pq.ParquetWriter(folder / "manifest.parquet", batch.schema) as writer:
        writer.write_batch(batch)
    return folder / "manifest.parquet"


def write_ap10k_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer with a toy vocabulary, and AP-10K's placeholders."""
    from transformers import CLIPTokenizer

    from spctrl.models.tiny import write_tokenizer

    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(list(AP10K.skeleton.placeholders))
    return tokenizer


# The released manner


class _Released:
    """What the released loader does for a sample, written plainly; prompts aside, which differ in their words."""

    def __init__(self, folder: Path, records: list[Record], tokenizer: Any) -> None:
        from torchvision import transforms as T
        from torchvision.transforms import InterpolationMode

        self.folder = folder
        self.lines = [(record.file_name, record.keypoints.tolist(), record.size_wh) for record in records]
        self.tokenizer = tokenizer
        self.image = T.Compose(
            [T.Resize(RESOLUTION), T.CenterCrop(RESOLUTION), T.ToTensor(), T.Normalize([0.5], [0.5])]
        )
        self.nearest = T.Compose(
            [T.Resize(RESOLUTION, interpolation=InterpolationMode.NEAREST), T.CenterCrop(RESOLUTION)]
        )

    def __getitem__(self, i: int) -> dict[str, Any]:
        import torch

        file_name, instances, _ = self.lines[i]
        stem = Path(file_name).stem
        image = Image.open(self.folder / "data" / file_name).convert("RGB")
        condition = np.array(self.nearest(Image.open(self.folder / "maps" / f"{stem}.png")))
        maps = []
        for heatmap in np.load(self.folder / "heatmaps" / f"{stem}.npy"):
            levels = Image.fromarray((np.minimum(heatmap, 1) * 255).astype(np.uint8))
            maps.append(np.array(self.nearest(levels.resize(image.size, Image.Resampling.BICUBIC))))
        labelled = [any(instance[k][2] > 0 for instance in instances) for k in range(17)]
        names = [word for word, given in zip(AP10K.skeleton.placeholders, labelled, strict=True) if given]
        text = f"a good photo of animal <{', '.join(names)}>"
        encoded = self.tokenizer(
            text, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        )
        placeholders = self.tokenizer.convert_tokens_to_ids(list(AP10K.skeleton.placeholders))
        ids = encoded.input_ids[0]
        return {
            "pixel_values": self.image(image),
            "conditioning_image": torch.from_numpy(condition).long()[None],
            "heatmaps": torch.from_numpy(np.stack(maps)).long(),
            "input_ids": ids,
            "token_mask": torch.isin(ids, torch.tensor(placeholders)),
            "keypoint_mask": torch.tensor(labelled),
        }


def _check(released: _Released, ours: SpCtrlDataset) -> None:
    """Both sides must give the same samples; heatmaps as the released loss sees them, at 64 x 64 and clamped."""
    import torch
    import torch.nn.functional as F

    for i in range(len(ours)):
        theirs, mine = released[i], ours[i]
        seen = F.interpolate(theirs["heatmaps"][None].float(), (64, 64), mode="bilinear", align_corners=True)
        apart = {
            "pixel_values": (MAX_PIXEL, (theirs["pixel_values"] - mine["pixel_values"]).abs().max()),
            "conditioning_image": (
                0,
                (theirs["conditioning_image"] - mine["conditioning_image"]).abs().max(),
            ),
            "heatmaps": (MAX_HEATMAP, (seen[0].clamp(0, 1) - mine["heatmaps"]).abs().max()),
            "keypoint_mask": (0, torch.count_nonzero(theirs["keypoint_mask"] != mine["keypoint_mask"])),
        }
        for name, (limit, found) in apart.items():
            if float(found) > limit:
                raise RuntimeError(
                    f"{name} of the two sides are {float(found):g} apart, expected at most {limit:g}"
                )
