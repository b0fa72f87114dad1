"""Worker processes on this machine, and what happens to their jobs at Ctrl-C, at an error and when one dies."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, MutableSequence, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.process import BaseProcess
from typing import Any, Literal, TypeVar

from spctrl.errors import ExpectedError
from spctrl.output.secrets import mask_output
from tasks.execution import logs
from tasks.execution.fork_server import start_fork_server, start_resource_tracker
from tasks.execution.interrupts import first_interrupt, interrupts_held

Job = TypeVar("Job")
Result = TypeVar("Result")

StartMethod = Literal["forkserver", "spawn"]
"""``spawn`` for what loads CUDA, always in a process of its own; ``forkserver`` starts faster."""

JOBS_WAITING_PER_WORKER = 2
LOOK_EVERY_S = 0.2
"""How often a wait for results looks whether Ctrl-C was pressed."""

STOP = -1
"""Slot of a pool's clock that is set when no further job may begin. Cancelling the jobs would not reach those in the
pool's queue, and breaks a pool whose workers are killed."""


class WorkerError(ExpectedError):
    """A worker process died."""


class _SkippedError(Exception):
    """A job had not begun when the work was stopped."""


class WorkerPool:
    """Processes that work on jobs, a few more of which wait than are worked on.

    Args:
        workers: how many.
        start_method: of the processes.
        environments: environment variables of each worker, one mapping for each; none: those of this process.

    Attributes:
        is_lost: whether its processes were killed, by us or by others.
    """

    def __init__(
        self, workers: int, start_method: StartMethod, environments: Sequence[Mapping[str, str]] = ()
    ) -> None:
        context = multiprocessing.get_context(start_method)
        (start_fork_server if start_method == "forkserver" else start_resource_tracker)()
        room = workers * (1 + JOBS_WAITING_PER_WORKER)
        # When each job that has a slot began (0: not yet), by the monotonic clock, which all processes share.
        self._clock: MutableSequence[float] = context.RawArray("d", room + 1)
        self._free = list(range(room))
        self._running: dict[Future[Any], int] = {}
        self._batch_s: float | None = None
        self._is_stopped = self._has_said_so = False
        self.is_lost = False
        self._executor = ProcessPoolExecutor(
            workers,
            mp_context=context,
            initializer=_initialize_worker,
            initargs=(self._clock, environments, context.Value("i", 0)),
        )

    def outcomes(
        self, function: Callable[[Job], Result], jobs: Iterator[Job]
    ) -> Generator[Callable[[], Result], None, None]:
        """For each job that is done, what returns its result or raises its error.

        The first Ctrl-C lets jobs that have begun finish, and begins no other; the second kills the workers.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            WorkerError: a worker process was killed.
        """
        try:
            with first_interrupt(self._stop):
                try:
                    while self._fill(function, jobs):
                        yield from self._finished()
                finally:
                    if not self._is_stopped and not self.is_lost:
                        self._finish_begun()
            if self._is_stopped:
                raise KeyboardInterrupt
        finally:
            if self._is_stopped:
                self.kill()

    def close(self) -> None:
        """End the workers, which have nothing to do."""
        try:
            self._executor.shutdown()
        except KeyboardInterrupt:
            self.kill()
            raise

    def kill(self) -> None:
        """End the workers at once, whatever they are at: packs are whole or absent, whenever that comes."""
        self.is_lost = True
        for process in self._workers():
            process.kill()
        executor: Any = self._executor
        # Its threads may be at a pipe whose other end only the workers used, and would wait there for ever, and Python
        # for them: one for the rest of a result; before Python 3.11.5 one for room to write a job,
        # https://github.com/python/cpython/issues/94777.
        if executor._result_queue is not None:
            executor._result_queue._writer.close()
        if executor._call_queue is not None and sys.version_info < (3, 11, 5):
            executor._call_queue._reader.close()
        executor.shutdown()  # waits for them: at its own end Python may write to a pipe that they are closing

    def _is_whole(self) -> bool:
        """Whether all workers and the thread that hands jobs to them run: without one of them, jobs may never be done.

        The thread ends with the first dead worker, unless it waits for the rest of that worker's result.
        """
        thread: Any = self._executor._executor_manager_thread
        sentinels = [process.sentinel for process in self._workers()]
        return thread is not None and thread.is_alive() and not multiprocessing.connection.wait(sentinels, 0)

    def _workers(self) -> list[BaseProcess]:
        return [*(self._executor._processes or {}).values()]

    def _stop(self) -> bool:
        """Let no further job begin; whether any has begun."""
        self._clock[STOP] = 1
        self._is_stopped = True
        return any(self._clock[slot] for slot in self._running.values())

    def _fill(self, function: Callable[[Job], Result], jobs: Iterator[Job]) -> bool:
        """Hand over what there is room for; whether anything runs."""
        try:
            for job in itertools.islice(jobs, len(self._free)):
                if self._is_stopped:
                    break
                slot = self._free.pop()
                self._clock[slot] = 0
                with interrupts_held():
                    self._running[self._executor.submit(_begin, function, job, slot)] = slot
        except (BrokenProcessPool, EOFError) as error:  # the latter where the fork server died
            raise self._lost() from error
        return bool(self._running)

    def _finished(self) -> Iterator[Callable[[], Any]]:
        """Wait for jobs to be done. Those that had not begun when the work was stopped are left out."""
        finished, _ = wait(self._running, LOOK_EVERY_S, FIRST_COMPLETED)
        if not finished and not self._is_whole():
            raise self._lost()
        for future in finished:
            slot = self._running.pop(future)
            self._free.append(slot)
            if isinstance(future.exception(), _SkippedError):
                continue
            if isinstance(future.exception(), BrokenProcessPool):
                raise self._lost() from future.exception()
            if began := self._clock[slot]:
                self._batch_s = time.monotonic() - began
            yield future.result
        if self._is_stopped and not self._has_said_so:
            self._say_that_it_stops()

    def _finish_begun(self) -> None:
        """After an error: wait for the jobs that have begun, so that what they make is kept."""
        self._clock[STOP] = 1
        while self._running and not self.is_lost:
            for _ in self._finished():
                pass
        self._clock[STOP] = 0

    def _say_that_it_stops(self) -> None:
        begun = [began for slot in self._running.values() if (began := self._clock[slot])]
        if not begun:
            return
        self._has_said_so = True
        when = ""
        if self._batch_s is not None:
            left_s = self._batch_s - (time.monotonic() - max(begun))
            when = f" (about {max(left_s, 1):.0f} s)"
        logs.notify(f"stopping after this batch{when}; press Ctrl-C again to stop now")

    def _lost(self) -> WorkerError:
        self.kill()  # a worker that was just starting would be waited for at the end of this process
        return WorkerError(
            "a worker process died: killed, or out of memory. What was finished stays; run again, with fewer "
            "[executor] workers if memory was short"
        )


# In a worker

_clock: MutableSequence[float]


def _initialize_worker(
    clock: MutableSequence[float], environments: Sequence[Mapping[str, str]], started: Any
) -> None:
    """Prepare a worker.

    Args:
        clock: the pool's.
        environments: see ``WorkerPool``.
        started: a shared counter of the workers that have started.
    """
    global _clock
    _clock = clock
    if environments:
        with started.get_lock():
            os.environ.update(environments[started.value])
            started.value += 1
    end_with_parent()
    mask_output(os.environ, sys.argv)
    with suppress(ImportError):
        from tqdm import tqdm  # type: ignore[import-untyped]

        # Its own lock is one for several processes, of which Python would report a leak where this one is killed.
        tqdm.set_lock(threading.RLock())


def end_with_parent() -> None:
    """End this process when its parent is gone: a killed build must not leave processes behind."""
    if (parent := multiprocessing.parent_process()) is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin(function: Callable[[Job], Result], job: Job, slot: int) -> Result:
    _clock[slot] = time.monotonic()  # before the look at STOP: who sets that sees every job that goes on
    if _clock[STOP]:
        _clock[slot] = 0
        raise _SkippedError
    return function(job)
