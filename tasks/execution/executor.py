"""Running a stage's batches: in this process, or in worker processes on this machine."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from multiprocessing.util import Finalize
from typing import TypeVar

from spctrl.storage import StoreError
from tasks.execution.fork_server import start_fork_server
from tasks.execution.worker_pool import StartMethod, WorkerError, WorkerPool

Job = TypeVar("Job")
Result = TypeVar("Result")


def worker_count(setting: int) -> int:
    """The number of worker processes for ``[executor] workers``; 0 means one for each core that we may use."""
    return setting or len(os.sched_getaffinity(0))


def warm_up(workers: int) -> None:
    """Start loading the libraries that workers need, beside whatever else goes on."""
    if worker_count(workers) > 1:
        start_fork_server()


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int,
    *,
    start_method: StartMethod = "forkserver",
    environments: Sequence[Mapping[str, str]] = (),
) -> Iterator[Result]:
    """Results of ``function`` for each job, in order of completion.

    A job that fails stops no other; its error is raised after the last. Jobs are taken from ``jobs`` only a
    few ahead of the work, so they may be many and large.

    Args:
        function: of a job.
        jobs: to be worked on.
        workers: processes; 0: one for each core.
        start_method: ``spawn`` has all work done in processes of its own, even if it is one.
        environments: with ``spawn``: environment variables of each worker.

    Raises:
        WorkerError: a worker process was killed.
    """
    iterator = iter(jobs)
    first = list(itertools.islice(iterator, 2))
    count = worker_count(workers)
    if first and start_method == "spawn":
        with closing(WorkerPool(count, "spawn", environments)) as pool:
            yield from _collect_from(pool, function, itertools.chain(first, iterator))
    elif count == 1 or len(first) < 2:
        yield from _run_here(function, itertools.chain(first, iterator))
    else:
        with _shared_pool(count) as pool:
            yield from _collect_from(pool, function, itertools.chain(first, iterator))


def _collect_from(
    pool: WorkerPool, function: Callable[[Job], Result], jobs: Iterator[Job]
) -> Iterator[Result]:
    # An error ends the jobs that have begun here, and not whenever Python drops its traceback: by then the next stage
    # may use the pool, and would get their results.
    with closing(pool.outcomes(function, jobs)) as outcomes:
        yield from collect(outcomes)


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


@contextmanager
def _shared_pool(workers: int) -> Iterator[WorkerPool]:
    """Forked workers, which stay for the next stage; a model's go with the memory that it took."""
    pool = _kept_pool(workers, os.getpid())
    try:
        yield pool
    finally:
        if pool.is_lost:
            _kept_pool.cache_clear()


@functools.cache
def _kept_pool(workers: int, pid: int) -> WorkerPool:
    """One pool for each process: a forked one must not use its parent's."""
    pool = WorkerPool(workers, "forkserver")
    # A process that multiprocessing has forked, as Luigi does for --workers 2, waits for its children at its end. The
    # priority is above that of the queues, through which the workers are told to end.
    Finalize(None, pool.close, exitpriority=100)
    return pool
