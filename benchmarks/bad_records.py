"""A build of half a million records, one in a hundred of them bad: memory, size of the report, and the next build."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.common import BUILD, SET_UP, Report, in_child
from benchmarks.inputs import ap10k_file
from benchmarks.scaling import FILE_WH, SETTLE_S, WORKERS, write_dataset

RECORDS, QUICK_RECORDS = 500_000, 5_000
BAD_EVERY = 100


def run(report: Report) -> None:
    """Build everything with the real code, report included, and build again; everything written is removed."""
    records = QUICK_RECORDS if report.quick else RECORDS
    root = BUILD / f"bad-records-{records}"
    data, store, exports = root / "data", root / "store", root / "exports"
    shutil.rmtree(root, ignore_errors=True)
    try:
        write_dataset(data, records, FILE_WH)
        bad = _spoil(data / "annotations" / ap10k_file("train"))
        time.sleep(SETTLE_S)
        first, second = (_build(data, store, exports) for _ in range(2))
        page = exports / "report.html"
        report.table(
            f"{records:,} records, {bad:,} of them bad, {WORKERS} workers",
            ("", "wall s", "CPU s", "peak MB of the driver", "of the largest worker"),
            [
                (name, *(f"{value:,.1f}" for value in cost))
                for name, cost in {"build": first, "again": second}.items()
            ],
        )
        report.target("peak MB of a process", max(*first[2:], *second[2:]), at_most=2_500)
        report.target("KB of the report", page.stat().st_size / 1e3, at_most=1_000)
        report.target("CPU seconds of the build after", second[1], at_most=5)
        (provenance,) = store.glob("runs/index/*/*/provenance.json")
        rejected = json.loads(provenance.read_bytes())["counts"]["rejected"]
        report.target("bad records that the index does not count", abs(bad - rejected), at_most=0)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _spoil(path: Path) -> int:
    """Make every hundredth record bad, in one of five ways; returns how many there are."""
    document = json.loads(path.read_bytes())
    bad = range(0, len(document["images"]), BAD_EVERY)
    for turn, i in enumerate(bad):
        annotation = document["annotations"][i]
        keypoints = annotation["keypoints"]
        faults: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (annotation, {"keypoints": keypoints[:-1]}),
            (annotation, {"keypoints": ["left", *keypoints[1:]]}),
            (annotation, {"keypoints": "none"}),
            (annotation, {"category_id": 99}),
            (document["images"][i], {"width": -1}),
        ]
        entry, fault = faults[turn % len(faults)]
        entry.update(fault)
    path.write_text(json.dumps(document))
    return len(bad)


def _build(data: Path, store: Path, exports: Path) -> tuple[float, float, float, float]:
    """Wall and CPU seconds of the build and its workers, peak MB of the driver and of the largest worker."""
    arguments = [
        "BuildDataset", "--dataset=ap10k", "--split=train", "--conditions=spatext",
        f"--ap10k-root={data}", f"--paths-store={store}", f"--paths-export={exports}",
        f"--executor-workers={WORKERS}", "--export-format=parquet",
    ]  # fmt: skip
    cost = in_child(
        f"{SET_UP}\nfrom benchmarks.scaling import of_workers",
        f"done = luigi.run({arguments!r})\nresult = [done, *of_workers()]",
        {"OMP_NUM_THREADS": "1"},
    )
    done, worker_cpu_s, worker_mb = cost.result
    if not done:
        raise RuntimeError(f"the build of {data} failed")
    return cost.wall_s, cost.cpu_s + worker_cpu_s, cost.peak_mb, worker_mb
