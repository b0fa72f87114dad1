"""A training step at Stable Diffusion 1.5's size: the released manner against this project's.

Both sides share networks, losses and optimizer (``benchmarks.train_step``).
"""

from __future__ import annotations

import time

from benchmarks.gpu.measure import (
    Measurements,
    add_kernels,
    flops_of,
    matrix_rate,
    peak_gib,
    seconds_of,
    wait_for,
)
from benchmarks.released_step import released
from benchmarks.train_step import Sizes, Step, Work, make_work, ours
from spctrl.training.networks import FROZEN_DTYPES

STEPS, WARM_UPS = 8, 3
LEAST_ENCODING, LEAST_CACHED, LEAST_RATE, MOST_GIB = 1.6, 2.0, 0.35, 24.0
"""Targets: times the released manner, with images encoded and with cached latents; share of the matrix rate; memory."""

IMAGES, CACHED = "images encoded", "cached latents"


def run(measurements: Measurements) -> None:
    """The released manner, and this project's without compilation.

    Operations that gradient checkpointing repeats are not counted in its share of the matrix rate.
    """
    for precision in ("bf16",) if measurements.small else ("fp16", "bf16"):
        work = _work(measurements, precision)
        run_step = _Timer(measurements, precision, work)
        base_s = run_step("released manner", released(work))
        seconds = run_step(f"ours, {IMAGES}", ours(work, cached=False))
        measurements.speed_target(
            f"{precision}: released / ours, {IMAGES}", base_s / seconds, at_least=LEAST_ENCODING
        )
        work = _without_images(work)
        cached_s = run_step(f"ours, {CACHED}", ours(work))
        if precision == "fp16":
            add_kernels(measurements, f"a training step, {precision}, {CACHED}", ours(work))
        measurements.speed_target(
            f"{precision}: released / ours, {CACHED}", base_s / cached_s, at_least=LEAST_CACHED
        )
        measurements.speed_target(
            f"{precision}: share of the matrix rate", run_step.share, at_least=LEAST_RATE
        )
        _checkpoint_gradients(work)
        run_step(f"ours, {CACHED}", ours(work), ", gradient checkpointing")
        if run_step.peak_gib is not None:
            measurements.speed_target(
                f"{precision}: peak GiB with gradient checkpointing", run_step.peak_gib, at_most=MOST_GIB
            )
        del work, run_step


def run_compiled(measurements: Measurements) -> None:
    """This project's, compiled as ``torch_compile`` does it, after the others without."""
    precision = "bf16" if measurements.small else "fp16"
    work = _work(measurements, precision)
    run_step = _Timer(measurements, precision, work)
    base_s = run_step("released manner", released(work))
    run_step(f"ours, {IMAGES}", ours(work, cached=False))
    run_step(f"ours, {CACHED}", ours(work))
    for network in (work.networks.unet, work.networks.control):
        network.compile(backend="eager" if measurements.small else "inductor")
    start = time.perf_counter()
    ours(work, cached=False)()
    wait_for(measurements.device)
    measurements.add("first compiled step", seconds=time.perf_counter() - start)
    seconds = run_step(f"ours, {IMAGES}", ours(work, cached=False), ", compiled")
    measurements.speed_target(
        f"{precision}: released / ours, {IMAGES}, compiled", base_s / seconds, at_least=LEAST_ENCODING
    )
    add_kernels(measurements, f"a compiled training step, {precision}, {IMAGES}", ours(work, cached=False))
    work = _without_images(work)
    seconds = run_step(f"ours, {CACHED}", ours(work), ", compiled")
    measurements.speed_target(
        f"{precision}: released / ours, {CACHED}, compiled", base_s / seconds, at_least=LEAST_CACHED
    )
    measurements.speed_target(
        f"{precision}, compiled: share of the matrix rate", run_step.share, at_least=LEAST_RATE
    )
    if run_step.peak_gib is not None:
        measurements.speed_target(f"{precision}, compiled: peak GiB", run_step.peak_gib, at_most=MOST_GIB)


class _Timer:
    """Measures steps of one precision.

    Attributes:
        share: of the matrix rate, of the latest step.
        peak_gib: its memory.
    """

    def __init__(self, measurements: Measurements, precision: str, work: Work) -> None:
        self.measurements = measurements
        self.precision = precision
        self.batch_size = len(work.draws.timesteps)
        self.rate = matrix_rate(measurements.device, FROZEN_DTYPES[precision])
        self.flops: dict[str, float] = {}
        self.share = 0.0
        self.peak_gib: float | None = None
        measurements.add(f"{precision} matrix rate", tflop_per_s=self.rate / 1e12)

    def __call__(self, case: str, step: Step, variant: str = "") -> float:
        """Seconds of a step; a variant, such as a compiled one, has the operations of its case."""
        device, small = self.measurements.device, self.measurements.small
        seconds = seconds_of(step, device, repeats=1 if small else STEPS, warm_ups=0 if small else WARM_UPS)
        self.peak_gib = peak_gib(step, device)
        if case not in self.flops:
            self.flops[case] = flops_of(step)
        self.share = self.flops[case] / seconds / self.rate
        self.measurements.add(
            f"{self.precision}: {case}{variant}",
            ms_per_step=1000 * seconds,
            images_per_s=self.batch_size / seconds,
            peak_gib=self.peak_gib,
            tflop=self.flops[case] / 1e12,
            share_of_matrix_rate=self.share,
        )
        return seconds


def _work(measurements: Measurements, precision: str) -> Work:
    sizes = (
        Sizes(narrowed=16, resolution=64, batch_size=2, precision=precision, layers=1)
        if measurements.small
        else Sizes(narrowed=1, resolution=512, batch_size=20, precision=precision)
    )
    return make_work(sizes, measurements.device)


def _without_images(work: Work) -> Work:
    """Only what a run with cached latents has in memory."""
    work.networks.vae.to("cpu")
    images = ("pixel_values", "large_heatmaps")
    return work._replace(batch={name: value for name, value in work.batch.items() if name not in images})


def _checkpoint_gradients(work: Work) -> None:
    work.networks.unet.enable_gradient_checkpointing()
    work.networks.control.enable_gradient_checkpointing()
