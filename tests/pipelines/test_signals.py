"""Signals while a command works in worker processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import HANG_S, group_members, survivors

REPOSITORY = Path(__file__).parents[2]
STOPPING = re.compile(
    r"^stopping after this batch(?: \(about (\d+) s\))?; press Ctrl-C again to stop now$", re.M
)
STOPPED = "stopped. What was finished stays, run again to go on"
START_METHODS = ["spawn", "forkserver"]
LONG_S = 2 * HANG_S
NOT_RUN = 25
"""Exit code of a command that was sent away."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")

Start = Callable[..., subprocess.Popen[str]]
Send = Callable[[int, int], None]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts ``luigi`` with a target of ``slow_stages`` in a process group of its own."""
    started: list[subprocess.Popen[str]] = []
    temporary = tempfile.mkdtemp()  # below tmp_path, addresses of sockets would be too long
    (tmp_path / "tmp").symlink_to(temporary)

    def start(target: str, *options: str, seconds: list[float], **environment: str) -> subprocess.Popen[str]:
        paths = [str(REPOSITORY), str(REPOSITORY / "tests")]
        started.append(
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "luigi", "--module", "slow_stages", target),
                    *(f"--folder={tmp_path}", f"--seconds={json.dumps(seconds)}", *options),
                ],
                cwd=tmp_path,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(paths),
                    "TMPDIR": temporary,
                    **environment,
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        if group_members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        if process.stdout is not None and not process.stdout.closed:
            process.communicate()
    shutil.rmtree(temporary)


def wait_until(is_so: Callable[[], object], command: subprocess.Popen[str]) -> None:
    end = time.monotonic() + HANG_S
    while not is_so():
        assert command.poll() is None, command.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.005)


def jobs(folder: Path, state: str) -> set[str]:
    """Jobs of all stages that have begun, or are done."""
    return {f"{path.parent.name}/{path.stem}" for path in folder.glob(f"*/*.{state}")}


def numbered(stage: str, count: int) -> set[str]:
    return {f"{stage}/{number}" for number in range(count)}


def read_until(command: subprocess.Popen[str], line: re.Pattern[str]) -> str:
    """Read a command's output up to a line; returns the line's group, or nothing where that is missing."""
    assert command.stdout is not None
    read = ""
    for each in command.stdout:
        if found := line.search(each):
            return found[1] or ""
        read += each
    pytest.fail(f"the command did not say so:\n{read}")


def ended(command: subprocess.Popen[str], tmp_path: Path) -> str:
    """What an interrupted command has said; it leaves no process and no file behind."""
    output, _ = command.communicate(timeout=HANG_S)
    assert command.returncode == -signal.SIGINT, output
    assert output.rstrip().endswith(STOPPED), output
    assert "Traceback" not in output, output
    assert survivors(command) == []
    assert list((tmp_path / "tmp").iterdir()) == []
    return output


# Ctrl-C


@pytest.mark.slow
@pytest.mark.parametrize(("start_method", "send"), [("spawn", os.kill), ("forkserver", os.killpg)])
def test_ctrl_c_lets_the_batches_under_way_finish_and_says_so(
    start: Start, tmp_path: Path, start_method: str, send: Send
) -> None:
    command = start("Slow", f"--start-method={start_method}", "--count=2", seconds=[0.2, 0.2, 3])
    wait_until(lambda: jobs(tmp_path, "begun") == numbered("first", 4), command)
    send(command.pid, signal.SIGINT)
    output = ended(command, tmp_path)
    assert jobs(tmp_path, "begun") == jobs(tmp_path, "done") == numbered("first", 4)
    assert STOPPING.findall(output) == ["1"]


@pytest.mark.slow
@pytest.mark.parametrize(("start_method", "send"), [("spawn", os.kill), ("forkserver", os.killpg)])
def test_a_second_ctrl_c_ends_the_command_at_once(
    start: Start, tmp_path: Path, start_method: str, send: Send
) -> None:
    command = start("Slow", f"--start-method={start_method}", "--count=2", seconds=[LONG_S])
    wait_until(lambda: jobs(tmp_path, "begun") == numbered("first", 2), command)
    send(command.pid, signal.SIGINT)
    said = read_until(command, STOPPING)
    assert said == ""  # no batch has told how long it takes
    send(command.pid, signal.SIGINT)
    ended(command, tmp_path)
    assert jobs(tmp_path, "done") == set()


def test_ctrl_c_while_workers_start_ends_the_command_at_once(start: Start, tmp_path: Path) -> None:
    command = start("Slow", seconds=[LONG_S], SLOW_STAGES_IMPORT_S=str(LONG_S))
    wait_until(lambda: any("spawn_main" in each.command for each in group_members(command.pid)), command)
    os.killpg(command.pid, signal.SIGINT)
    assert not STOPPING.search(ended(command, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("start_method", "send"), [("spawn", os.kill), ("forkserver", os.killpg)])
def test_ctrl_c_lets_stages_in_processes_of_their_own_finish_their_batches(
    start: Start, tmp_path: Path, start_method: str, send: Send
) -> None:
    command = start(
        "Both", f"--start-method={start_method}", "--count=2", "--workers=2", seconds=[0.2, 0.2, 3]
    )
    both = numbered("first", 4) | numbered("second", 4)
    wait_until(lambda: jobs(tmp_path, "begun") == both, command)
    send(command.pid, signal.SIGINT)
    assert STOPPING.findall(ended(command, tmp_path)) == ["1", "1"]
    assert jobs(tmp_path, "begun") == jobs(tmp_path, "done") == both


@pytest.mark.slow
@pytest.mark.parametrize(("start_method", "send"), [("spawn", os.kill), ("forkserver", os.killpg)])
def test_a_second_ctrl_c_ends_stages_in_processes_of_their_own(
    start: Start, tmp_path: Path, start_method: str, send: Send
) -> None:
    command = start("Both", f"--start-method={start_method}", "--count=2", "--workers=2", seconds=[LONG_S])
    wait_until(lambda: len(jobs(tmp_path, "begun")) == 4, command)
    send(command.pid, signal.SIGINT)
    read_until(command, STOPPING)
    read_until(command, STOPPING)
    send(command.pid, signal.SIGINT)
    ended(command, tmp_path)
    assert jobs(tmp_path, "done") == set()


# Signals that end the command as it is


def semaphores_of(command: subprocess.Popen[str]) -> set[Path]:
    """Files of the semaphores that the command's processes have open."""
    maps = [Path(f"/proc/{each.pid}/maps").read_text() for each in group_members(command.pid)]
    return {Path(name) for name in re.findall(r"/dev/shm/sem\S+", "".join(maps))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "start_method", "number", "send"),
    [
        ("Slow", "forkserver", signal.SIGTERM, os.kill),
        ("Slow", "forkserver", signal.SIGHUP, os.killpg),
        ("Slow", "forkserver", signal.SIGKILL, os.kill),
        ("Slow", "spawn", signal.SIGTERM, os.killpg),
        ("Slow", "spawn", signal.SIGQUIT, os.killpg),
        ("Both", "forkserver", signal.SIGTERM, os.killpg),
        ("Both", "forkserver", signal.SIGHUP, os.kill),
    ],
)
def test_a_signal_that_ends_the_command_leaves_no_file_and_no_word(
    start: Start, tmp_path: Path, target: str, start_method: str, number: signal.Signals, send: Send
) -> None:
    stages = 2 if target == "Both" else 1
    command = start(
        target, f"--start-method={start_method}", "--count=2", f"--workers={stages}", seconds=[LONG_S]
    )
    wait_until(lambda: len(jobs(tmp_path, "begun")) == 2 * stages, command)
    semaphores = semaphores_of(command)
    assert semaphores
    send(command.pid, number)
    output, _ = command.communicate(timeout=HANG_S)
    assert command.returncode == -number, output
    assert survivors(command) == []
    assert "resource_tracker" not in output and "Traceback" not in output, output
    assert list((tmp_path / "tmp").iterdir()) == []
    assert [path for path in semaphores if path.exists()] == []


# SIGUSR1


def test_sigusr1_that_comes_before_there_is_a_worker_is_kept_for_it(start: Start, tmp_path: Path) -> None:
    command = start("Slow", seconds=[0], SLOW_STAGES_SIGNAL="SIGUSR1")
    output, _ = command.communicate(timeout=HANG_S)
    assert command.returncode == NOT_RUN, output
    assert jobs(tmp_path, "begun") == set()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("start_method", START_METHODS)
def test_sigusr1_to_the_whole_group_at_any_time_ends_the_command_after_its_stage(
    start: Start, tmp_path: Path, start_method: str, workers: int
) -> None:
    command = start(
        "InOrder", f"--start-method={start_method}", "--count=2", f"--workers={workers}", seconds=[0.1]
    )
    wait_until(lambda: (tmp_path / "before").exists(), command)
    while command.poll() is None:
        os.killpg(command.pid, signal.SIGUSR1)
        time.sleep(0.01)
    output, _ = command.communicate(timeout=HANG_S)
    assert command.returncode == NOT_RUN, output
    assert "Traceback" not in output
    assert jobs(tmp_path, "done") == numbered("before", 6)
    assert survivors(command) == []


def test_importing_the_package_leaves_a_users_signals_alone() -> None:
    code = "import pipelines.cli.main, signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{signal.pthread_sigmask(signal.SIG_BLOCK, [])}\n"
