"""A pool that has lost its workers, or its thread, keeps no command from ending, and one job's error no other job."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY
from processes import HANG_S

from spctrl.storage import StoreError
from tasks.execution.executor import run_jobs

# Jobs are larger than a pipe holds, so that one is being written when the workers, which no longer read, are killed.
LOST_WHILE_A_JOB_IS_SENT = """
import itertools, os, signal, sys, threading, time
from tasks.execution.worker_pool import WorkerError, WorkerPool

pool = WorkerPool(2, sys.argv[1])

def lose_workers():
    while len(workers := [*(pool._executor._processes or {})]) < 2:
        time.sleep(0.01)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in workers:
            os.kill(pid, number)
        time.sleep(0.5)

threading.Thread(target=lose_workers).start()
try:
    for outcome in pool.outcomes(len, itertools.repeat(bytes(2**20))):
        outcome()
except WorkerError as error:
    print(error)
"""

# One worker ends with half of a result written, and holds the lock that the other one waits for.
LOST_WHILE_A_RESULT_IS_SENT = """
import sys
from half_results import result
from tasks.execution.worker_pool import WorkerError, WorkerPool

try:
    for outcome in WorkerPool(2, sys.argv[1]).outcomes(result, iter(range(100))):
        outcome()
except WorkerError as error:
    print(error)
"""

# Python ends while a thread of the pool is at closing its pipes.
LOST_BEFORE_PYTHON_ENDS = """
import concurrent.futures.process, os, sys, threading, time
from tasks.execution.worker_pool import WorkerError, WorkerPool

closing = threading.Event()

def close(self):
    self._writer.close()
    closing.set()
    time.sleep(1)
    self._reader.close()
    self._closed = True

concurrent.futures.process._ThreadWakeup.close = close
try:
    for outcome in WorkerPool(2, sys.argv[1]).outcomes(os._exit, iter(range(100))):
        outcome()
except WorkerError as error:
    print(error)
closing.wait()
"""

# All workers run, and the thread that hands jobs to them ends: it may start no thread of its own.
LOST_THREAD = """
import sys, threading
from tasks.execution.worker_pool import WorkerError, WorkerPool

start = threading.Thread.start

def start_no_feeder(self):
    if self.name.startswith("QueueFeederThread"):
        raise SystemExit  # as RuntimeError("can't start new thread") ends it, without a traceback of the thread
    start(self)

threading.Thread.start = start_no_feeder
try:
    for outcome in WorkerPool(2, sys.argv[1]).outcomes(len, iter(["job"] * 100)):
        outcome()
except WorkerError as error:
    print(error)
"""


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
@pytest.mark.parametrize(
    "script",
    [LOST_WHILE_A_JOB_IS_SENT, LOST_WHILE_A_RESULT_IS_SENT, LOST_BEFORE_PYTHON_ENDS, LOST_THREAD],
    ids=["while a job is sent", "while a result is sent", "before Python ends", "without its thread"],
)
def test_a_pool_that_has_lost_workers_ends(script: str, start_method: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script, start_method],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("a worker process died")


def write(number: int) -> int:
    """A job that finds the disk full, or takes longer."""
    if number == 0:
        raise StoreError("disk full")
    time.sleep(0.2)
    return number


def test_jobs_of_a_stage_that_failed_are_not_results_of_the_next() -> None:
    with pytest.raises(StoreError) as error:
        list(run_jobs(write, iter(range(6)), 2))
    assert sorted(run_jobs(write, iter(range(10, 16)), 2)) == [*range(10, 16)]
    assert error.traceback  # Python drops nothing that the failed stage was at before this is gone
