"""Luigi tasks that work in worker processes for a known time, for tests of signals.

``luigi --module slow_stages Both``, with this folder in PYTHONPATH.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import luigi

import pipelines  # noqa: F401 - what the command does with signals
from tasks.execution.executor import run_jobs

if multiprocessing.current_process().name != "MainProcess":
    time.sleep(float(os.environ.get("SLOW_STAGES_IMPORT_S", 0)))
elif "SLOW_STAGES_SIGNAL" in os.environ:
    os.killpg(0, signal.Signals[os.environ["SLOW_STAGES_SIGNAL"]])


def work(folder: str, seconds: list[float], number: int) -> int:
    """A job: takes its seconds, and tells when it begins and ends."""
    Path(folder, f"{number}.begun").touch()
    time.sleep(seconds[min(number, len(seconds) - 1)])
    Path(folder, f"{number}.done").touch()
    return number


class Slow(luigi.Task):
    """Six jobs in worker processes; each takes the seconds at its index, or the last ones."""

    folder = luigi.Parameter()
    name = luigi.Parameter(default="first")
    seconds = luigi.ListParameter(default=[0.1])
    start_method = luigi.Parameter(default="spawn")
    count = luigi.IntParameter(default=1)

    @property
    def path(self) -> Path:
        return Path(self.folder, self.name)

    def complete(self) -> bool:
        return (self.path / "complete").exists()

    def run(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        function = functools.partial(work, str(self.path), list(self.seconds))
        assert len(list(run_jobs(function, range(6), self.count, start_method=self.start_method))) == 6
        (self.path / "complete").touch()


class InOrder(Slow):
    """The same after another one."""

    def requires(self) -> Any:
        return self.clone(Slow, name="before")


class Both(luigi.WrapperTask):
    """Two that may run side by side."""

    folder = luigi.Parameter()
    seconds = luigi.ListParameter(default=[0.1])
    start_method = luigi.Parameter(default="spawn")
    count = luigi.IntParameter(default=1)

    def requires(self) -> Any:
        yield self.clone(Slow, name="first")
        yield self.clone(Slow, name="second")
