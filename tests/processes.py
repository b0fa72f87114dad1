"""The processes of a build that runs on its own, read off the process table."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest

HANG_S = 600.0
"""Ends a test whose processes hang. No test is about time: on a busy machine everything takes many times as long."""

SURVIVAL_S = 30.0
"""How long processes may take to end after the one that they belong to."""


class Process(NamedTuple):
    """A line of the process table."""

    pid: int
    parent: int
    threads: int
    command: str


def group_members(group: int) -> list[Process]:
    """Processes of a group that are alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            facts = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (OSError, ValueError):
            continue  # it ended meanwhile
        state, parent, its_group = facts[:3]
        if int(its_group) == group and state not in "ZX":
            found.append(Process(int(folder.name), int(parent), int(facts[17]), command))
    return found


def _fork_servers_of(build: subprocess.Popen[str]) -> list[Process]:
    members = group_members(build.pid)
    return [each for each in members if each.parent == build.pid and "forkserver" in each.command]


def fork_server_of(build: subprocess.Popen[str]) -> Process:
    """The process that a build's worker processes come from."""
    (found,) = _fork_servers_of(build)
    return found


def workers_of(build: subprocess.Popen[str]) -> list[Process]:
    """Worker processes of a build that watch over it already: only from then on do they end without a word."""
    servers = {each.pid for each in _fork_servers_of(build)}
    return [each for each in group_members(build.pid) if each.parent in servers and each.threads > 1]


def wait_for_workers(build: subprocess.Popen[str], count: int = 1) -> list[Process]:
    """The workers, as soon as there are so many."""
    end = time.monotonic() + HANG_S
    while time.monotonic() < end and build.poll() is None:
        if len(found := workers_of(build)) >= count:
            return found
        time.sleep(0.002)
    pytest.fail("the build ended before it had its worker processes")


def survivors(build: subprocess.Popen[str]) -> list[Process]:
    """What is left of a build's processes after some seconds."""
    end = time.monotonic() + SURVIVAL_S
    while (found := group_members(build.pid)) and time.monotonic() < end:
        time.sleep(0.02)
    return found
