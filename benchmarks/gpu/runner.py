"""Run the steps of the GPU check within a time budget, lose no result, and print one table."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.common import ROOT, machine
from benchmarks.gpu.measure import append_line
from benchmarks.gpu.steps import STEPS, Step

DEFAULT_BUDGET_S = 420.0
LINES_SHOWN = 15
SHORTEST_S = 5.0
"""With less left, nothing is started."""
CONSOLE = Console(width=160)


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 where every step that was started ended well."""
    start = time.monotonic()
    options = _options(arguments)
    import torch

    if not (options.dry_run or torch.cuda.is_available()):
        print(
            "expected a GPU, found none that torch can use. Add --dry-run to run every step on the CPU in tiny sizes.",
            file=sys.stderr,
        )
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    results.unlink(missing_ok=True)
    append_line(results, {"kind": "machine", **_machine(dry_run=options.dry_run)})
    # A step is ended with this process, whatever ends it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        statuses = _run_steps(options, results, end=start + options.budget)
    finally:
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        (options.out / "results.json").write_text(json.dumps(lines, indent=1) + "\n")
        show(lines)
    return 0 if all(status.status in ("done", "skipped") for status in statuses) else 1


def _run_steps(options: argparse.Namespace, results: Path, *, end: float) -> list[Status]:
    statuses = []
    for step in STEPS:
        if options.only and step.name not in options.only:
            continue
        left_s = end - time.monotonic()
        needed_s = SHORTEST_S if options.dry_run else step.expected_s
        if left_s < needed_s:
            status = Status("skipped", f"{left_s:.0f} s left, {needed_s:.0f} needed", 0.0)
        else:
            limit_s = left_s if options.dry_run else min(step.limit_s, left_s)
            status = run_step(step, results, options.out / "log.txt", limit_s, dry_run=options.dry_run)
        statuses.append(status)
        append_line(results, {"kind": "step", "step": step.name, **status._asdict()})
    return statuses


class Status(NamedTuple):
    """What came of a step: ``done``, ``failed``, ``ended`` at its limit or ``skipped``, with details, and its time."""

    status: str
    details: str
    seconds: float


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--budget",
        type=float,
        default=DEFAULT_BUDGET_S,
        help="seconds for all steps (default: %(default).0f)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and log.txt")
    parser.add_argument("--only", help=f"steps, with commas: {','.join(step.name for step in STEPS)}")
    parser.add_argument("--dry-run", action="store_true", help="every step on the CPU in tiny sizes")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",") if options.only else []
    if unknown := sorted(set(options.only) - {step.name for step in STEPS}):
        parser.error(
            f"--only: expected steps among {', '.join(s.name for s in STEPS)}, found {', '.join(unknown)}"
        )
    return options


def _machine(*, dry_run: bool) -> dict[str, Any]:
    """The card, the machine and the versions of what computes."""
    import accelerate
    import diffusers
    import torch
    import transformers

    found: dict[str, Any] = {
        "machine": machine(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "versions": {
            each.__name__: each.__version__ for each in (torch, diffusers, transformers, accelerate)
        },
    }
    if not dry_run:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "card": properties.name,
            "card_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def run_step(step: Step, results: Path, log: Path, limit_s: float, *, dry_run: bool) -> Status:
    """Run a step in its own process group, which is killed at the limit."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        step.name,
        str(results),
        "cpu" if dry_run else "cuda:0",
    ]
    start = time.monotonic()
    with log.open("ab") as output:
        output.write(f"\n=== {step.name}\n".encode())
        output.flush()
        begins = output.tell()
        process = subprocess.Popen(
            [*command, *(["--small"] if dry_run else [])],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
            status, details = ("done", "") if code == 0 else ("failed", f"exit code {code}")
        except subprocess.TimeoutExpired:
            status, details = "ended", f"limit of {limit_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = round(time.monotonic() - start, 1)
    found = Status(status, details, seconds)
    CONSOLE.print(f"{step.name}: {_status(found._asdict())}", highlight=False)
    if status != "done":
        with log.open("rb") as written:
            written.seek(begins)
            lines = written.read().decode(errors="replace").splitlines()
        CONSOLE.print("\n".join(lines[-LINES_SHOWN:]), markup=False, highlight=False)
    return found


def show(lines: Sequence[Mapping[str, Any]]) -> None:
    """One table of all results and targets; kernels are in the file only."""
    first = next(line for line in lines if line["kind"] == "machine")
    table = Table(title=f"{first.get('card', 'CPU')}; {first['versions']}", title_justify="left")
    for column in ("step", "case", "result"):
        table.add_column(column)
    for line in lines:
        if line["kind"] == "result" and not line["case"].startswith("kernel of"):
            table.add_row(line["step"], line["case"], _values(line["values"]))
        elif line["kind"] == "target":
            bound = (
                f"at least {line['at_least']:g}"
                if line["at_least"] is not None
                else f"at most {line['at_most']:g}"
            )
            met = "met" if line["met"] else "MISSED"
            table.add_row(line["step"], line["case"], f"{_text(line['found'])} ({bound}: {met})")
        elif line["kind"] == "step":
            table.add_row(line["step"], "", _status(line), end_section=True)
    CONSOLE.print(table)


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in values.items())


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _status(found: Mapping[str, Any]) -> str:
    details = f" ({found['details']})" if found["details"] else ""
    return f"{found['status']}{details}, {found['seconds']} s"
