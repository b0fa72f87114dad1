"""Locks: one process at a time, whatever becomes of the others, and a line from those that wait."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from processes import HANG_S

from spctrl.io import locks
from spctrl.storage import StoreError, files

HOLD = """
import sys, time
from pathlib import Path
from spctrl.io.locks import exclusive
with exclusive(Path(sys.argv[1]), "at work", lambda line: print(line, flush=True)):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(path: Path) -> subprocess.Popen[str]:
    """A process that takes a lock and keeps it."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        env={**os.environ, "PYTHONPATH": str(Path(locks.__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip()


def test_who_waits_says_so_once_and_is_next(tmp_path: Path) -> None:
    lines: list[str] = []
    is_told, is_next = threading.Event(), threading.Event()

    def notify(line: str) -> None:
        lines.append(line)
        is_told.set()

    def wait() -> None:
        with locks.exclusive(tmp_path / "lock", "painting", notify):
            is_next.set()

    waiting = threading.Thread(target=wait)
    with locks.exclusive(tmp_path / "lock", "painting", pytest.fail):
        waiting.start()
        assert is_told.wait(HANG_S)
        assert not is_next.is_set()
    waiting.join(HANG_S)
    assert is_next.is_set()
    assert lines == ["another process is painting; waiting for it"]


def test_the_file_is_removed_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "lock"
    with pytest.raises(ZeroDivisionError), locks.exclusive(path, "", pytest.fail):
        assert path.exists()
        raise ZeroDivisionError
    assert not path.exists()


def test_a_lock_on_a_file_that_was_removed_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the process that held it does at its end, between two steps of one that waits."""
    path, is_free = tmp_path / "lock", locks._is_free
    removed: list[Path] = []

    def remove_first(*arguments: object) -> bool:
        if not removed:
            removed.append(path)
            path.unlink()
        return is_free(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(locks, "_is_free", remove_first)
    with locks.exclusive(path, "", pytest.fail):
        assert path.exists()
        assert not locks._is_free(path.open("ab"), locks.fcntl.LOCK_EX)
    assert removed


def test_a_removed_lock_does_not_take_that_of_the_next_away(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.exclusive(path, "", pytest.fail):
        path.unlink()
        path.write_text("of another process")
    assert path.read_text() == "of another process"


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path / "lock") as killed:
        assert line_of(killed) == "held"
        killed.kill()
    with locks.exclusive(tmp_path / "lock", "", pytest.fail):
        pass


def test_ctrl_c_ends_a_process_that_waits(tmp_path: Path) -> None:
    with (
        locks.exclusive(tmp_path / "lock", "", pytest.fail),
        holder(tmp_path / "lock") as waiting,
    ):
        assert line_of(waiting) == "another process is at work; waiting for it"
        waiting.send_signal(signal.SIGINT)
        _, errors = waiting.communicate(timeout=HANG_S)
        assert "KeyboardInterrupt" in errors


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with locks.exclusive(tmp_path / "lock", "", pytest.fail, owner="me"):
        assert not locks.is_held_by_another(tmp_path / "lock", "you")


def test_the_other_processes_of_an_owner_know_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not locks.is_held_by_another(path, "me")
    path.write_text("a killed process")
    assert not locks.is_held_by_another(path, "me")
    with locks.exclusive(path, "", pytest.fail, owner="me"):
        assert not locks.is_held_by_another(path, "me")
        assert locks.is_held_by_another(path, "you")


def test_a_lock_that_cannot_be_made_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StoreError, match=r"cannot write .*file/lock"),
        files.exclusive(tmp_path / "file/lock", "", pytest.fail),
    ):
        pass


@pytest.mark.parametrize("link", ["symbolic", "hard", "dangling"])
def test_no_lock_is_written_through_a_link(tmp_path: Path, link: str) -> None:
    victim, lock = tmp_path / "victim", tmp_path / "lock"
    if link != "dangling":
        victim.write_text("content")
    if link == "hard":
        lock.hardlink_to(victim)
    else:
        lock.symlink_to(victim)
    with pytest.raises(OSError, match=f"link.*{lock}"), locks.exclusive(lock, "", pytest.fail, owner="me"):
        pytest.fail("locked")
    assert not victim.exists() if link == "dangling" else victim.read_text() == "content"
