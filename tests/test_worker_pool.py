"""A pool that has lost its workers keeps no command from ending."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from processes import HANG_S

# Jobs are larger than a pipe holds, so that one is being written when the workers, which no longer read, are killed.
LOSES_ITS_WORKERS = """
import itertools, os, signal, sys, threading, time
from tasks.worker_pool import WorkerError, WorkerPool

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


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_workers_lost_while_a_job_is_handed_over_do_not_hold_up_the_end(start_method: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOSES_ITS_WORKERS, start_method],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("a worker process died")
