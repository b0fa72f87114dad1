"""The processes of a build that runs on its own, read off the process table."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest

SURVIVAL_S = 5.0


class Process(NamedTuple):
    """A line of the process table."""

    pid: int
    parent: int
    command: str


def group_members(group: int) -> list[Process]:
    """Processes of a group that are alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (OSError, ValueError):
            continue  # it ended meanwhile
        if int(its_group) == group and state not in "ZX":
            found.append(Process(int(folder.name), int(parent), command))
    return found


def _fork_servers_of(build: subprocess.Popen[str]) -> list[Process]:
    members = group_members(build.pid)
    return [each for each in members if each.parent == build.pid and "forkserver" in each.command]


def fork_server_of(build: subprocess.Popen[str]) -> Process:
    """The process that a build's worker processes come from."""
    (found,) = _fork_servers_of(build)
    return found


def workers_of(build: subprocess.Popen[str]) -> list[Process]:
    """Worker processes of a build."""
    servers = {each.pid for each in _fork_servers_of(build)}
    return [each for each in group_members(build.pid) if each.parent in servers]


def wait_for_workers(build: subprocess.Popen[str], timeout_s: float = 60) -> list[Process]:
    """The workers, as soon as there are some."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and build.poll() is None:
        if found := workers_of(build):
            return found
        time.sleep(0.002)
    pytest.fail("the build ended before it had a worker process")


def survivors(build: subprocess.Popen[str]) -> list[Process]:
    """What is left of a build's processes after some seconds."""
    end = time.monotonic() + SURVIVAL_S
    while (found := group_members(build.pid)) and time.monotonic() < end:
        time.sleep(0.02)
    return found
