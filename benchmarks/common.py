"""What the benchmarks share: clocks, child processes whose memory is measured, tables, the machine's description."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "benchmarks"
AP10K = ROOT.parent / "shared" / "data" / "ap10k"
"""Real annotations, where the checkout has them beside it."""

CALM_SHARE, LOOK_S, LONGEST_WAIT_S = 0.9, 0.25, 5.0
"""A turn starts when this share of the machine was idle for a moment, or after the longest wait."""

LIBRARIES = (
    "luigi",
    "numpy",
    "opencv-python-headless",
    "pillow",
    "zlib-ng",
    "pyarrow",
    "msgspec",
    "pycocotools",
)
CONSOLE = Console()


class Cost(NamedTuple):
    """What something took, in seconds; CPU time says more than wall time where the machine is shared."""

    wall_s: float
    cpu_s: float


class ChildCost(NamedTuple):
    """What a piece of code took in a fresh process of its own.

    Attributes:
        wall_s, cpu_s: of the code alone, without starting Python and importing.
        peak_mb: largest resident memory of the whole process (VmHWM; ``ru_maxrss`` would include the parent's).
        process_wall_s, process_cpu_s: of the whole process.
        result: what the code left in the variable ``result``.
    """

    wall_s: float
    cpu_s: float
    peak_mb: float
    process_wall_s: float
    process_cpu_s: float
    result: Any


def measure(function: Callable[[], object]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def interleaved(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Cost]:
    """Median cost of each function. They take turns, so that a slow spell of the machine hits all of them."""
    costs: dict[str, list[Cost]] = {name: [] for name in functions}
    for name in turns(list(functions), repeats):
        wait_for_calm()
        costs[name].append(measure(functions[name]))
    return {name: median_cost(each) for name, each in costs.items()}


def wait_for_calm() -> None:
    """Let other work on the machine pass, as far as it does."""
    end = time.monotonic() + LONGEST_WAIT_S
    while time.monotonic() < end:
        idle, total = _processor_times()
        time.sleep(LOOK_S)
        idle_later, total_later = _processor_times()
        if idle_later - idle >= CALM_SHARE * (total_later - total):
            return


def _processor_times() -> tuple[int, int]:
    """Idle time and all time of all cores so far, in ticks; zeros where the system does not say."""
    try:
        ticks = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0, 0
    return ticks[3] + ticks[4], sum(ticks)


def turns(names: Sequence[str], repeats: int) -> list[str]:
    """``names`` over and over, every second time backwards."""
    return [name for repeat in range(repeats) for name in (names if repeat % 2 == 0 else reversed(names))]


def median_cost(costs: Sequence[Cost]) -> Cost:
    return Cost(*(statistics.median(values) for values in zip(*costs, strict=True)))


def median_child(costs: Sequence[ChildCost]) -> ChildCost:
    """Medians of the numbers; the result is the first one's."""
    numbers = zip(*(cost[:-1] for cost in costs), strict=True)
    return ChildCost(*(statistics.median(values) for values in numbers), costs[0].result)


_CHILD = """
{setup}
import json as _json, time as _time
_wall, _cpu = _time.perf_counter(), _time.process_time()
result = None
{work}
_took = [_time.perf_counter() - _wall, _time.process_time() - _cpu]
_peak_kb = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
open({out!r}, "w").write(_json.dumps([*_took, _peak_kb / 1024, result]))
"""


SET_UP = "import luigi\nfrom pipelines import luigi_setup\nluigi_setup.configure()"
"""Of a child that builds with ``luigi.run``, as the command would."""


def in_child(setup: str, work: str, environment: Mapping[str, str] | None = None) -> ChildCost:
    """Run ``work`` in a fresh Python process, after ``setup`` (its imports), and measure it.

    CPU time of processes that the child starts and waits for is in ``process_cpu_s`` only.

    Raises:
        RuntimeError: the child failed; with the end of what it printed.
    """
    out = BUILD / f"child-{os.getpid()}.json"
    code = _CHILD.format(setup=setup, work=work, out=str(out))
    process = run_process([sys.executable, "-c", code], environment)
    wall_s, cpu_s, peak_mb, result = json.loads(out.read_bytes())
    out.unlink()
    return ChildCost(wall_s, cpu_s, peak_mb, process.wall_s, process.cpu_s, result)


def run_process(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command in the project's folder, quietly and at a calm moment, and measure the whole process."""
    wait_for_calm()
    log = BUILD / f"child-{os.getpid()}.log"
    with log.open("wb") as output:
        wall = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": ".", **(environment or {})},
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - wall
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"a measured process ended with code {process.returncode}:\n{tail}")
    log.unlink()
    return Cost(wall_s, usage.ru_utime + usage.ru_stime)


def machine() -> str:
    """One line: processor, cores, memory, Python and the libraries' versions."""
    cpu = platform.processor() or platform.machine()
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        cpu = (
            f"{facts['model name']} (family {facts['cpu family']}, {float(facts['cpu MHz']) / 1000:.1f} GHz)"
        )
    except (OSError, KeyError):
        pass
    cores = len(os.sched_getaffinity(0))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    load = os.getloadavg()[0]
    return (
        f"{cpu}, {cores} cores, {memory_gb:.0f} GB, {platform.system()}, load {load:.1f}; "
        f"Python {platform.python_version()}, {versions}"
    )


@dataclass
class Report:
    """What one benchmark found: tables on the screen, and all of it as JSON."""

    name: str
    quick: bool = False
    tables: list[dict[str, Any]] = field(default_factory=list)
    targets: list[dict[str, Any]] = field(default_factory=list)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str = ""
    ) -> None:
        """Show a table; numbers come as text, in the precision that they deserve."""
        shown = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
        for number, column in enumerate(columns):
            shown.add_column(column, justify="right" if number else "left")
        for row in rows:
            shown.add_row(*map(str, row))
        CONSOLE.print(shown)
        self.tables.append(
            {"title": title, "columns": list(columns), "rows": [list(row) for row in rows], "note": note}
        )

    def target(
        self, what: str, found: float, *, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        """Compare a ratio with its target."""
        met = found >= at_least if at_least is not None else at_most is not None and found <= at_most
        wanted = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}"
        self.targets.append({"what": what, "found": round(found, 3), "target": wanted, "met": met})

    def write(self) -> None:
        """Show how the targets came out, and keep everything in build/benchmarks/<name>.json."""
        rows = [
            (each["what"], f"{each['found']:.2f}", each["target"], "met" if each["met"] else "MISSED")
            for each in self.targets
        ]
        self.table(f"{self.name}: targets", ("ratio", "found", "target", ""), rows)
        written = {
            "benchmark": self.name,
            "quick": self.quick,
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "machine": machine(),
            "targets": self.targets,
            "tables": self.tables[:-1],
        }
        BUILD.mkdir(parents=True, exist_ok=True)
        path = BUILD / f"{self.name}.json"
        path.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
        CONSOLE.print(f"Written to {path.relative_to(ROOT)}\n")


def steps(title: str, count: int) -> Progress:
    """A progress bar for preparing inputs; nothing is measured while it is on."""
    bar = Progress(console=CONSOLE, transient=True)
    bar.add_task(title, total=count)
    return bar


def ms(seconds: float) -> str:
    """Milliseconds in three digits or so."""
    return f"{seconds * 1000:.3f}" if seconds < 0.01 else f"{seconds * 1000:.1f}"
