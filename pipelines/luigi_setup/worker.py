"""Luigi's worker, with signals: SIGUSR1 between two stages, and Ctrl-C while stages run in processes of their own."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from luigi.worker import Worker

from spctrl.output.secrets import masked
from tasks.execution.interrupts import leave_second_interrupt_to_parent
from tasks.execution.worker_pool import end_with_parent

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a process that Ctrl-C ended."""


class StageWorker(Worker):
    """A worker that takes SIGUSR1 when it looks for work, and whose stages end by themselves after Ctrl-C."""

    def _get_work(self) -> Any:
        # Commands hold the signal back (``luigi_setup.hold_sigusr1``): it is found here, however early it came.
        if signal.sigtimedwait({signal.SIGUSR1}, 0):
            self._start_phasing_out()
        return super()._get_work()

    def _create_task_process(self, task: Any) -> Any:
        process = super()._create_task_process(task)
        if process.use_multiprocessing:
            process.run = functools.partial(_run_in_child, process.run)
        return process

    def _announce_scheduling_failure(self, task: Any, expl: Any) -> None:
        super()._announce_scheduling_failure(task, masked(str(expl)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        try:
            if kind is not None and issubclass(kind, KeyboardInterrupt):
                self._wait_for_stages()
        finally:  # kills what a second Ctrl-C has left
            super().__exit__(kind, error, trace)

    def _wait_for_stages(self) -> None:
        """Interrupt the stages' processes, which a terminal has done and ``kill`` has not, and wait for them."""
        running = [process for process in self._running_tasks.values() if process.is_alive()]
        for process in running:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
        for process in running:
            process.join()


def _run_in_child(run: Callable[[], None]) -> None:
    """Run a stage in a process of its own, which ends without a traceback when it is interrupted."""
    leave_second_interrupt_to_parent()
    end_with_parent()
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
