"""Time and memory of each stage of a build, from 125,000 to 2 million synthetic records, with the drawing left out."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import BUILD, CONSOLE, SET_UP, Report, in_child
from benchmarks.inputs import ap10k_file, jpeg_of_size

SIZES = (125_000, 250_000, 500_000, 1_000_000, 2_000_000)
QUICK_SIZES = (1_000, 2_000, 4_000)
WORKERS = 2
SIZE_WH, FILE_WH = (1024, 768), (64, 48)
"""As annotated; the files are smaller, since nobody looks at them here."""
LINKS_TO_A_FILE, FILES_IN_A_FOLDER = 60_000, 10_000
"""File systems allow 65,000 links to one file, and dislike folders of millions."""
WRITTEN_AT_ONCE = 10_000
SETTLE_S = 2.5
"""Files younger than two seconds are read again rather than trusted by their time stamps."""
PACKS_OF_FULL_SIZE = 250_000
"""Records from which on a batch does not grow any more."""
PICTURE = "scaling.svg"


class Step(NamedTuple):
    """One measured process: builds ``task``, after the runs of ``redone`` were taken back."""

    name: str
    task: str
    redone: str = ""


STEPS = (
    Step("index", "Index"),
    Step("images", "Images"),
    Step("spatext", "Spatext"),
    Step("openpose", "Openpose"),
    Step("manifest", "Manifest"),
    Step("spatext again: all found", "Spatext", "spatext"),
    Step("no-op", "Manifest"),
)


class Found(NamedTuple):
    """What a step took.

    Attributes:
        wall_s: without starting Python.
        cpu_s: of the process and its workers.
        driver_mb, worker_mb: largest resident memory of the process, and of its largest worker.
    """

    wall_s: float
    cpu_s: float
    driver_mb: float
    worker_mb: float


def run(report: Report) -> None:
    """All steps at each size, each step in a process of its own; everything written is removed again."""
    sizes = QUICK_SIZES if report.quick else SIZES
    found: dict[str, list[Found]] = {step.name: [] for step in STEPS}
    bytes_of: dict[str, list[int]] = {}
    for records in sizes:
        root, store = BUILD / f"scaling-{records}", BUILD / f"scaling-{records}-store"
        try:
            write_dataset(root, records)
            time.sleep(SETTLE_S)
            for step in STEPS:
                took = _measure(step, root, store)
                found[step.name].append(took)
                CONSOLE.print(
                    f"{records:,} {step.name}: {took.wall_s:.1f} s, {took.cpu_s:.1f} s of CPU, "
                    f"{took.driver_mb:,.0f} MB, workers {took.worker_mb:,.0f} MB",
                    highlight=False,
                )
            for name, size in _sizes(root, store).items():
                bytes_of.setdefault(name, []).append(size)
        finally:
            for folder in (root, store):
                shutil.rmtree(folder, ignore_errors=True)
    _tell(report, sizes, found, bytes_of)
    _draw(sizes, found)


def _measure(step: Step, root: Path, store: Path) -> Found:
    for path in store.glob(f"runs/{step.redone}/*/*/provenance.json") if step.redone else ():
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in _provenances(store)}
    arguments = [
        step.task, "--dataset=ap10k", "--split=train",
        f"--ap10k-root={root}", f"--paths-store={store}", f"--executor-workers={WORKERS}",
    ]  # fmt: skip
    if step.task == "Manifest":
        arguments.append("--conditions=spatext,openpose")
    cost = in_child(
        f"{SET_UP}\nimport benchmarks.simulated\nfrom benchmarks.scaling import of_workers",
        f"done = luigi.run({arguments!r})\nresult = [done, *of_workers()]",
        {"OMP_NUM_THREADS": "1"},
    )
    done, worker_cpu_s, worker_mb = cost.result
    if not done:
        raise RuntimeError(f"{step.name} of {root} failed")
    committed = [path for path in _provenances(store) if before.get(path) != path.stat().st_mtime_ns]
    if len(committed) != (step.name != "no-op"):
        raise RuntimeError(f"{step.name} committed {len(committed)} runs: {committed}")
    if step.task == "Images":
        time.sleep(SETTLE_S)
    return Found(cost.wall_s, cost.cpu_s + worker_cpu_s, cost.peak_mb, worker_mb)


def _provenances(store: Path) -> Iterator[Path]:
    return store.glob("runs/*/*/*/provenance.json")


def of_workers() -> tuple[float, float]:
    """CPU seconds of all processes below this one together, and the largest one's peak memory in MB."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = (int(fields[1]), (int(fields[11]) + int(fields[12])))
    below = {os.getpid()}
    while more := {pid for pid, (parent, _) in parents.items() if parent in below} - below:
        below |= more
    below.remove(os.getpid())
    ticks = sum(parents[pid][1] for pid in below)
    peaks = [_peak_mb(pid) for pid in below]
    return ticks / os.sysconf("SC_CLK_TCK"), max(peaks, default=0)


def _peak_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0)


# Synthetic data


def write_dataset(root: Path, records: int, size_wh: tuple[int, int] = SIZE_WH) -> None:
    """AP-10K's layout, one animal in each image, annotated at a size; the images are links to a few tiny files."""
    for folder in ("annotations", "data"):
        (root / folder).mkdir(parents=True)
    jpeg, sources = jpeg_of_size(FILE_WH).read_bytes(), []
    for number in range(-(-records // LINKS_TO_A_FILE)):
        sources.append(root / f"{number}.jpg")
        sources[-1].write_bytes(jpeg + number.to_bytes(4, "big"))
    for number in range(records):
        path = root / "data" / _name(number)
        if number % FILES_IN_A_FOLDER == 0:
            path.parent.mkdir()
        os.link(sources[number // LINKS_TO_A_FILE], path)
    with (root / "annotations" / ap10k_file("train")).open("w") as file:
        file.write('{"categories": [{"id": 1, "name": "cat", "supercategory": "Felidae"}], "images": [')
        file.writelines(_separated(_image(number, size_wh) for number in range(records)))
        file.write('], "annotations": [')
        file.writelines(_separated(_annotations(records, size_wh)))
        file.write("]}")


def _separated(entries: Iterator[str]) -> Iterator[str]:
    yield next(entries)
    for entry in entries:
        yield f",\n{entry}"


def _name(number: int) -> str:
    return f"{number // FILES_IN_A_FOLDER:05}/{number:012}.jpg"


def _image(number: int, size_wh: tuple[int, int]) -> str:
    width, height = size_wh
    return (
        f'{{"license": 1, "id": {number + 1}, "file_name": "{_name(number)}", "width": {width}, "height": {height}, '
        '"background": 1}'
    )


def _annotations(records: int, size_wh: tuple[int, int]) -> Iterator[str]:
    rng = np.random.default_rng(0)
    width, height = size_wh
    for start in range(0, records, WRITTEN_AT_ONCE):
        count = min(WRITTEN_AT_ONCE, records - start)
        points = np.full((count, 17, 3), 2)
        points[..., :2] = rng.integers(0, size_wh, (count, 17, 2))
        for number, keypoints in enumerate(points.reshape(count, -1).tolist(), start + 1):
            yield (
                f'{{"id": {number}, "image_id": {number}, "category_id": 1, "bbox": [0, 0, {width}, {height}], '
                f'"area": {width * height}, "iscrowd": 0, "num_keypoints": 17, "keypoints": {keypoints}}}'
            )


# What was found


def _sizes(root: Path, store: Path) -> dict[str, int]:
    """Bytes on disk of what grows with the records."""
    patterns = {
        "annotation file": (root, "annotations/*.json"),
        "index": (store, "runs/index/*/*/records.parquet"),
        "list of images": (store, "runs/index/*/*/images.txt"),
        "pack indices of one stage": (store, "packs/spatext/*.parquet"),
        "run of one stage": (store, "runs/spatext/*/*/artifacts.parquet"),
        "manifest": (store, "runs/manifest/*/*/manifest.parquet"),
        "cache.sqlite": (store, "cache.sqlite"),
    }
    return {
        name: sum(path.stat().st_size for path in folder.glob(pattern))
        for name, (folder, pattern) in patterns.items()
    }


def _tell(
    report: Report, sizes: Sequence[int], found: dict[str, list[Found]], bytes_of: dict[str, list[int]]
) -> None:
    columns = ("", *(f"{size:,}" for size in sizes))
    cells: dict[str, list[tuple[str, ...]]] = {"time": [], "memory": []}
    for name, each in found.items():
        exponent = _exponent(sizes, [step.cpu_s for step in each])
        walls = [f"{step.wall_s:.1f} ({step.cpu_s:.1f})" for step in each]
        cells["time"].append((name, *walls, f"{exponent:.2f}"))
        peaks = [f"{step.driver_mb:.0f}, {step.worker_mb:.0f}" for step in each]
        a_record = _slope(sizes, [step.driver_mb for step in each])
        cells["memory"].append((name, *peaks, f"{a_record:.0f}"))
        report.target(f"{name}: CPU time grows with records to the power of", exponent, at_most=1.1)
        if name != "index":
            report.target(f"{name}: bytes of memory that each record adds", a_record, at_most=200)
    note = f"{WORKERS} workers. Without starting Python and its imports."
    report.table("Wall seconds (CPU seconds)", (*columns, "exponent"), cells["time"], note)
    report.table(
        "Peak MB of the driver, of the largest worker", (*columns, "bytes a record"), cells["memory"]
    )
    rows = [
        (name, *(f"{size / records:.0f}" for size, records in zip(each, sizes, strict=True)))
        for name, each in bytes_of.items()
    ]
    report.table("Bytes on disk a record", columns, rows)


def _exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Of the power law through all sizes."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(seconds, 0.01)), 1)[0])


def _slope(sizes: Sequence[int], megabytes: Sequence[float]) -> float:
    """Bytes a record, of the line through the sizes at which batches have their full size."""
    first = next((i for i, size in enumerate(sizes) if size >= PACKS_OF_FULL_SIZE), 0)
    return float(np.polyfit(sizes[first:], np.array(megabytes[first:]) * 2**20, 1)[0])


def _draw(sizes: Sequence[int], found: dict[str, list[Found]]) -> None:
    """Time and memory over records, for docs/SCALING.md."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "spctrl", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    values: dict[str, Any] = {
        "CPU seconds": lambda step: step.cpu_s,
        "peak memory of the driver, MB": lambda step: step.driver_mb,
    }
    for axis, (title, value) in zip(axes, values.items(), strict=True):
        for name, each in found.items():
            axis.plot(np.array(sizes) / 1e6, [value(step) for step in each], marker=".", label=name)
        axis.set(xlabel="million records", title=title, ylim=(0, None))
    axes[1].legend(fontsize="small")
    figure.savefig(BUILD / PICTURE, metadata={"Date": None})
    CONSOLE.print(f"Drawn: {BUILD / PICTURE}")
