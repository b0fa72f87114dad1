"""What the steps share: results as lines of JSON, clocks, memory, the matrix rate and profiles."""

from __future__ import annotations

import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MATRIX_SIDE, SMALL_MATRIX_SIDE, MATRIX_PRODUCTS = 8192, 512, 20
KERNELS = 10
GIB = 2**30


@dataclass(frozen=True)
class Measurements:
    """Where a step writes what it measures; each result is on disk as soon as it is there.

    Attributes:
        step: its name.
        path: file of JSON lines, to which lines are appended.
        device: to measure.
        small: whether sizes are tiny, to see that a step runs.
    """

    step: str
    path: Path
    device: torch.device
    small: bool

    def add(self, case: str, **values: object) -> None:
        """Keep a result: what was measured, and numbers or texts by name, with their units in the names."""
        self._append({"kind": "result", "case": case, "values": values})

    def target(
        self, case: str, found: float, *, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        """Keep a ratio or a difference with the bound that it should keep."""
        met = (at_least is None or found >= at_least) and (at_most is None or found <= at_most)
        bounds = {"at_least": at_least, "at_most": at_most}
        self._append({"kind": "target", "case": case, "found": found, **bounds, "met": met})

    def speed_target(
        self, case: str, found: float, *, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        """The same of speed or memory, of which a dry run says nothing."""
        if not self.small:
            self.target(case, found, at_least=at_least, at_most=at_most)

    def _append(self, line: dict[str, Any]) -> None:
        append_line(self.path, {"step": self.step, **line})


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line of JSON, which has no numbers that are not finite: they become texts."""
    with path.open("a") as file:
        file.write(json.dumps(_finite(line), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def seconds_of(
    function: Callable[[], object], device: torch.device, *, repeats: int, warm_ups: int = 1
) -> float:
    """Median seconds of a call, with all its work on the device done."""
    for _ in range(warm_ups):
        function()
    times = []
    for _ in range(repeats):
        wait_for(device)
        start = time.perf_counter()
        function()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def wait_for(device: torch.device) -> None:
    """Until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(function: Callable[[], object], device: torch.device) -> float | None:
    """Largest memory of tensors on the GPU during a call, in GiB; None on the CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    function()
    wait_for(device)
    return float(torch.cuda.max_memory_allocated(device) / GIB)


def flops_of(function: Callable[[], object]) -> float:
    """Floating-point operations of matrix products, convolutions and attention in a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype, *, tf32: bool = False) -> float:
    """Floating-point operations per second of large products of random matrices.

    Args:
        device: to measure.
        dtype: of the factors.
        tf32: whether float32 factors may be rounded to TF32.
    """
    side = MATRIX_SIDE if device.type == "cuda" else SMALL_MATRIX_SIDE
    factor = torch.randn((side, side), device=device, dtype=dtype)

    def products() -> None:
        for _ in range(MATRIX_PRODUCTS):
            factor @ factor

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    seconds = seconds_of(products, device, repeats=3)
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * side**3 * MATRIX_PRODUCTS / seconds


def add_kernels(measurements: Measurements, case: str, function: Callable[[], object]) -> None:
    """Keep the kernels that take most of a call's time on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    if measurements.device.type == "cpu":
        return
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        function()
        wait_for(measurements.device)
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    for event in events[:KERNELS]:
        measurements.add(
            f"kernel of {case}",
            name=event.key[:120],
            ms=round(event.self_device_time_total / 1000, 2),
            share=round(event.self_device_time_total / total, 4),
            calls=event.count,
        )
    measurements.add(f"all kernels of {case}", ms=round(total / 1000, 1), different=len(events))
