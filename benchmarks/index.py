"""A large annotation file: ``write_index``, checks and Parquet included, against ``pycocotools`` COCO(file)."""

from __future__ import annotations

from benchmarks.common import BUILD, ChildCost, Report, in_child, median_child, turns
from benchmarks.inputs import humanart_file

IMAGES, INSTANCES, REPEATS = 50_000, 123_000, 5
QUICK_IMAGES, QUICK_INSTANCES, QUICK_REPEATS = 5_000, 12_300, 3
MAX_PIXELS = 100_000_000

OURS, COCO = "write_index: checks, Parquet", "pycocotools COCO(file)"


def run(report: Report) -> None:
    """Each side in a fresh process of its own, in turns; time of the call without imports, memory of the process."""
    images, instances = (QUICK_IMAGES, QUICK_INSTANCES) if report.quick else (IMAGES, INSTANCES)
    source = humanart_file(images, instances)
    destination = BUILD / "index.parquet"
    works = {
        OURS: (
            "from pathlib import Path\nfrom spctrl.data.datasets import HUMANART\n"
            "from spctrl.data.index import write_index\n"
            "import pyarrow\npyarrow.array([0])",  # with the first array it imports pandas, where that is installed
            f"index = write_index(Path({str(source)!r}), HUMANART, 'train', Path({str(destination)!r}), "
            f"max_pixels={MAX_PIXELS})\nresult = [len(index.image_paths), len(index.rejects)]",
        ),
        COCO: (
            "from pycocotools.coco import COCO",
            f"coco = COCO({str(source)!r})\nresult = [len(coco.imgs), 0]",
        ),
    }
    source.read_bytes()  # warm file cache for the first
    costs: dict[str, list[ChildCost]] = {name: [] for name in works}
    for name in turns(list(works), QUICK_REPEATS if report.quick else REPEATS):
        costs[name].append(in_child(*works[name]))
    medians = {name: median_child(each) for name, each in costs.items()}
    for name, each in medians.items():
        if each.result != [images, 0]:
            raise RuntimeError(f"{name}: expected {images} images and no reject, found {each.result}")
    _tell(
        report,
        medians,
        f"{images:,} images, {instances:,} instances, {source.stat().st_size / 1e6:.0f} MB of JSON",
    )
    report.target(
        "index: CPU time of COCO(file) / ours", medians[COCO].cpu_s / medians[OURS].cpu_s, at_least=2
    )
    report.target(
        "index: wall time of COCO(file) / ours", medians[COCO].wall_s / medians[OURS].wall_s, at_least=2
    )
    report.target(
        "index: peak memory, ours / COCO(file)", medians[OURS].peak_mb / medians[COCO].peak_mb, at_most=0.6
    )


def _tell(report: Report, medians: dict[str, ChildCost], what: str) -> None:
    rows = [
        (
            name, f"{each.wall_s:.2f}", f"{each.cpu_s:.2f}", f"{each.peak_mb:.0f}",
            f"{each.process_wall_s:.2f}", f"{each.process_cpu_s:.2f}",
        )
        for name, each in medians.items()
    ]  # fmt: skip
    columns = ("", "wall s", "CPU s", "peak MB", "process wall s", "process CPU s")
    size_mb = (BUILD / "index.parquet").stat().st_size / 1e6
    note = f"Medians, fresh processes in turns. The written Parquet file has {size_mb:.0f} MB."
    report.table(f"Index of {what}", columns, rows, note)
