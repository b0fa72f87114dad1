"""The fork server leaves no file of its socket, whatever the temporary folder is called and however often it starts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import REPOSITORY
from processes import HANG_S

PROGRAM = """
import multiprocessing, os, signal, sys, time
from multiprocessing import forkserver
from tasks.execution import fork_server

if __name__ == "__main__":
    fork_server.PRELOADED.clear()
    def run():
        fork_server.start_fork_server()
        left, descriptors = os.listdir(os.environ["TMPDIR"]), len(os.listdir("/proc/self/fd"))
        process = multiprocessing.get_context("forkserver").Process(target=sys.exit, args=(3,))
        process.start()
        process.join()
        print(process.exitcode, left)
        return forkserver._forkserver._forkserver_pid, descriptors
    first = run()
    assert run() == first
    os.kill(first[0], signal.SIGKILL)
    os.waitid(os.P_PID, first[0], os.WEXITED | os.WNOWAIT)
    assert run()[0] != first[0]
"""


def test_no_file_of_the_fork_servers_socket_stays_and_processes_start_all_the_same(tmp_path: Path) -> None:
    # Longer than the address of a socket may be.
    folder = Path(tempfile.mkdtemp(prefix="x" * 120, dir=tmp_path))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert (done.stdout, done.stderr) == ("3 []\n" * 3, "")
    assert list(folder.iterdir()) == []
