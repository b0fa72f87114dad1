"""Running a stage's batches: in this process, or in worker processes on this machine."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import forkserver
from typing import Literal, TypeVar

from spctrl.errors import ExpectedError
from tasks.files import StoreError

Job = TypeVar("Job")
Result = TypeVar("Result")

StartMethod = Literal["forkserver", "spawn"]
"""``spawn`` for what loads CUDA, always in a process of its own; ``forkserver`` starts faster."""

JOBS_WAITING_PER_WORKER = 2
PRELOADED = ["__main__", "tasks.work", "spctrl.rendering.openpose", "spctrl.images", "spctrl.conditions"]


class WorkerError(ExpectedError):
    """A worker process died."""


def worker_count(setting: int) -> int:
    """The number of worker processes for ``[executor] workers``; 0 means one for each core that we may use."""
    return setting or len(os.sched_getaffinity(0))


def warm_up(workers: int) -> None:
    """Start loading the libraries that workers need, beside whatever else goes on."""
    if worker_count(workers) > 1:
        multiprocessing.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int,
    *,
    start_method: StartMethod = "forkserver",
) -> Iterator[Result]:
    """Results of ``function`` for each job, in order of completion.

    A job that fails stops no other; its error is raised after the last. Jobs are taken from ``jobs`` only a
    few ahead of the work, so they may be many and large.

    Raises:
        WorkerError: a worker process was killed.
    """
    iterator = iter(jobs)
    first = list(itertools.islice(iterator, 2))
    count = worker_count(workers)
    if first and start_method == "spawn":
        yield from _run_in_processes(function, itertools.chain(first, iterator), count, "spawn")
    elif count == 1 or len(first) < 2:
        yield from _run_here(function, itertools.chain(first, iterator))
    else:
        yield from _run_in_processes(function, itertools.chain(first, iterator), count, "forkserver")


def _run_here(function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    return collect(functools.partial(function, job) for job in jobs)


def collect(outcomes: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """Results of calls; one that fails stops no other, and its error is raised after the last.

    Raises:
        StoreError, WorkerError: at once: a full or lost disk and a lost pool fail all others alike.
    """
    failures: list[Exception] = []
    for outcome in outcomes:
        try:
            result = outcome()
        except (StoreError, WorkerError):
            raise
        except Exception as error:
            failures.append(error)
            continue
        yield result
    if failures:
        raise failures[0]


def _run_in_processes(
    function: Callable[[Job], Result], jobs: Iterator[Job], workers: int, start_method: StartMethod
) -> Iterator[Result]:
    failures: list[Exception] = []
    running: set[Future[Result]] = set()
    with _pool(workers, start_method) as pool:
        try:
            while True:
                room = workers * (1 + JOBS_WAITING_PER_WORKER) - len(running)
                running |= {pool.submit(function, job) for job in itertools.islice(jobs, room)}
                if not running:
                    break
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    try:
                        result = future.result()
                    except (StoreError, BrokenProcessPool):
                        raise
                    except Exception as error:
                        failures.append(error)
                        continue
                    yield result
        except (BrokenProcessPool, EOFError) as error:  # the latter where the fork server died
            _kept_pool.cache_clear()
            for child in multiprocessing.active_children():
                child.kill()  # a worker that was just starting would be waited for at the end of this process
            raise WorkerError(
                "a worker process died: killed, or out of memory. What was finished stays; run again, with fewer "
                "[executor] workers if memory was short"
            ) from error
        finally:
            for future in running:
                future.cancel()
            wait(running)
    if failures:
        raise failures[0]


def _pool(workers: int, start_method: StartMethod) -> AbstractContextManager[ProcessPoolExecutor]:
    """Workers for one stage. Those that are forked stay for the next stage; a model's go, with the memory it took."""
    if start_method == "forkserver":
        return nullcontext(_kept_pool(workers, os.getpid()))
    return ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_live_as_long_as_the_parent
    )


@functools.cache
def _kept_pool(workers: int, pid: int) -> ProcessPoolExecutor:
    """One pool for each process: a forked one must not use its parent's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_live_as_long_as_the_parent)


def _live_as_long_as_the_parent() -> None:
    """Leave interrupts to the parent, and end when it is gone: a killed build must not leave workers behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
