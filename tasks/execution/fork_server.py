"""The processes that multiprocessing starts for itself, so that they leave nothing behind however the command ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from tempfile import TemporaryDirectory
from typing import Any

from tasks.execution.interrupts import interrupts_held, signals_held

PRELOADED = [
    "__main__",
    "tasks.execution.worker",
    "spctrl.conditions.openpose",
    "spctrl.data.images",
    "spctrl.conditions.masks",
]
EXPECTED_LEAKS = "ignore:resource_tracker:UserWarning"


def start_resource_tracker() -> None:
    """Start the process that removes semaphores when a killed command could not.

    It outlives what ends the command, a closed terminal among it, and does its work without warnings: a killed command
    always leaves semaphores to it.
    """
    with signals_held({signal.SIGHUP, signal.SIGQUIT}):
        sys.warnoptions.append(EXPECTED_LEAKS)
        try:
            resource_tracker.ensure_running()
        finally:
            sys.warnoptions.remove(EXPECTED_LEAKS)


def start_fork_server() -> None:
    """Start loading the libraries that workers need, beside whatever else goes on; nothing where that is done."""
    start_resource_tracker()  # before, as its start lets Ctrl-C through
    multiprocessing.set_forkserver_preload(PRELOADED)
    server: Any = forkserver._forkserver
    before = server._forkserver_pid
    with interrupts_held(), _short_lived_folder():
        forkserver.ensure_running()
        if server._forkserver_pid != before:
            # Linux connects to a socket through its descriptor, so that its file can go at once and not at the end,
            # which a killed command does not reach. The descriptor stays open for as long as this process lives.
            socket = os.open(server._forkserver_address, os.O_PATH)
            server._forkserver_address = f"/proc/self/fd/{socket}"


@contextmanager
def _short_lived_folder() -> Iterator[None]:
    """Have multiprocessing make its temporary files in a folder that is removed at the end.

    It is named by its descriptor: addresses of sockets may have some 100 characters only.
    """
    config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    previous = config.get("tempdir")
    with TemporaryDirectory(prefix="pymp-") as path:
        folder = os.open(path, os.O_PATH | os.O_DIRECTORY)
        config["tempdir"] = f"/proc/self/fd/{folder}"
        try:
            yield
        finally:
            config["tempdir"] = previous
            os.close(folder)
