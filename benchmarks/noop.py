"""The second BuildDataset, with nothing to do, against the least it could cost: import luigi, one stat per image."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.common import BUILD, CONSOLE, ROOT, Cost, Report, median_cost, run_process, turns
from benchmarks.inputs import tiny_ap10k

IMAGES, REPEATS = 60_000, 11
QUICK_IMAGES, QUICK_REPEATS = 2_000, 3
SETTLE_S = 2.5
"""Files younger than two seconds are read again rather than trusted by their time stamps."""

OURS, LEAST, LUIGI = "BuildDataset, nothing to do", "import luigi, stat each image", "import luigi"
STATS = "import luigi, os, sys\nfor path in open(sys.argv[1]).read().splitlines(): os.stat(path)"


def run(report: Report) -> None:
    """Build once, then measure whole processes in turns."""
    images = QUICK_IMAGES if report.quick else IMAGES
    root = tiny_ap10k(images)
    store = BUILD / f"noop-{images}"
    build = build_command(root, store)
    CONSOLE.print(f"Building {images:,} records, if they are not built yet ...")
    started = time.perf_counter()
    run_process(build)
    CONSOLE.print(f"... took {time.perf_counter() - started:.0f} s")
    time.sleep(SETTLE_S)
    run_process(build)  # keeps the digests of what was too young before
    paths = BUILD / "noop-paths.txt"
    paths.write_text("\n".join(str(path.relative_to(ROOT)) for path in sorted((root / "data").iterdir())))
    commands = {
        OURS: build,
        LEAST: [sys.executable, "-c", STATS, str(paths)],
        LUIGI: [sys.executable, "-c", "import luigi"],
    }
    before = provenances(store)
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for name in turns(list(commands), QUICK_REPEATS if report.quick else REPEATS):
        costs[name].append(run_process(commands[name]))
    if provenances(store) != before:
        raise RuntimeError("a build that should have had nothing to do did something")
    medians = {name: median_cost(each) for name, each in costs.items()}
    least = medians[LEAST]
    rows = [
        (name, f"{cost.wall_s * 1000:.0f}", f"{cost.cpu_s * 1000:.0f}", f"{cost.wall_s / least.wall_s:.2f}")
        for name, cost in medians.items()
    ]
    report.table(
        f"Second build of {images:,} records (index, images, spatext, openpose, manifest, export, report)",
        ("", "wall ms", "CPU ms", "ratio"),
        rows,
        f"Whole processes, medians of {len(costs[OURS])} in turns.",
    )
    report.target("no-op: ours / least, wall time", medians[OURS].wall_s / least.wall_s, at_most=2.5)
    report.target("no-op: ours / least, CPU time", medians[OURS].cpu_s / least.cpu_s, at_most=2.5)


def build_command(root: Path, store: Path) -> list[str]:
    """BuildDataset with images required, as a user types it."""
    settings = {
        "dataset": "ap10k",
        "split": "train",
        "conditions": "spatext,openpose",
        "images": "required",
        "ap10k-root": root.relative_to(ROOT),
        "paths-store": store.relative_to(ROOT),
        "paths-export": f"{store.relative_to(ROOT)}-exports",
    }
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    return [
        sys.executable,
        "-m",
        "luigi",
        "--module",
        "pipelines",
        "BuildDataset",
        *arguments,
    ]


def provenances(store: Path) -> dict[str, int]:
    """When each run was committed: unchanged when nothing ran."""
    return {str(path): path.stat().st_mtime_ns for path in store.glob("runs/*/*/*/provenance.json")}
