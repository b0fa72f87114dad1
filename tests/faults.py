"""Builds that are disturbed at a chosen file operation, and the comparison with builds that were not.

A build runs in a process forked from one that has imported everything, so hundreds of them take minutes. In it, an
audit hook counts the operations that change files (opening for writing, renaming, making folders, linking,
removing) below the workspace's folder, and at one of them something happens.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from processes import HANG_S

if TYPE_CHECKING:
    from conftest import Workspace

Action = Callable[[str], None]
"""What happens; told the file or folder that the build is at."""

YEAR_S = 365 * 24 * 3600
RECORDS_PER_PACK = 3
"""So that the few records of the sample make several packs."""
PRELOADED = [
    "faults",
    "luigi.cmdline",
    "pipelines.cli.main",
    "pyarrow.parquet",
    "spctrl.audit",
    "spctrl.conditions.masks",
    "spctrl.data.images",
    "spctrl.conditions.openpose",
    "spctrl.conditions.spatext",
    "spctrl.report",
    "spctrl.export.shards",
    "tasks.execution.worker",
]
CHANGES = frozenset({"os.rename", "os.mkdir", "os.link", "os.symlink", "os.remove", "os.rmdir"})
REMOVALS = frozenset({"os.remove", "os.rmdir"})
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
TIMES = ("started_at", "finished_at", "duration_s")
LATER_FOUND = ("made", "found", "removed")
"""Counts of a run that depend on what an interrupted build had finished."""


@dataclass(frozen=True)
class Fault:
    """Something that happens right before a build's operation.

    Attributes:
        at: the operation's number, from 1.
        action: what happens.
        lasting: whether it happens at every later operation too.
        spares: kinds of operations that it leaves alone.
    """

    at: int
    action: Action
    lasting: bool = False
    spares: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Done:
    """What became of a build or command.

    Attributes:
        exit_code: minus the signal's number where one ended it.
        output: what it wrote to stdout and stderr.
        operations: how many changes of files it began.
    """

    exit_code: int
    output: str
    operations: int

    @property
    def succeeded(self) -> bool:
        return self.exit_code == 0


# What may happen


def kill(path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def send(number: int, path: str) -> None:
    signal.raise_signal(number)


def fail(code: int, path: str) -> NoReturn:
    raise OSError(code, os.strerror(code), path)


def remove(place: Path, path: str) -> None:
    """Delete a file or folder."""
    shutil.rmtree(place, ignore_errors=True)
    place.unlink(missing_ok=True)


def jump(seconds: float, path: str) -> None:
    """Set the clock that Python sees. File systems keep theirs."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)


def clean_up_a_year_ahead(path: str) -> None:
    """``spctrl gc`` of a process whose clock is wrong, in the middle of the build."""
    from pipelines.cli.main import app

    child = os.fork()
    if child == 0:
        jump(YEAR_S, "")
        with contextlib.suppress(SystemExit):
            app(["gc", "--keep", "0"])
        os._exit(0)
    os.waitpid(child, 0)


def nothing(path: str) -> None:
    pass


NEVER = Fault(sys.maxsize, nothing)


# Disks


class Disk:
    """A small file system in memory, mounted over a folder."""

    def __init__(self, folder: Path, **options: object) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._mount("mount", "-t", "tmpfs", "-o", _options(options), "tmpfs", str(folder))

    def change(self, **options: object) -> None:
        """Give it other options: ``size="8m"``, ``nr_inodes=100``, ``ro=True``."""
        self._mount("mount", "-o", f"remount,{_options(options)}", str(self._folder))

    def used(self) -> dict[str, int]:
        """What is taken, by the option that limits it."""
        found = os.statvfs(self._folder)
        return {
            "size": (found.f_blocks - found.f_bfree) * found.f_frsize,
            "nr_inodes": found.f_files - found.f_ffree,
        }

    def unmount(self) -> None:
        self._mount("umount", "--lazy", str(self._folder))

    def _mount(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise OSError(done.stderr.strip())


def _options(options: Mapping[str, object]) -> str:
    return ",".join(name if value is True else f"{name}={value}" for name, value in options.items())


@contextlib.contextmanager
def disk(folder: Path, **options: object) -> Iterator[Disk]:
    """A disk of its own below a folder; skips the test where none can be mounted."""
    try:
        mounted = Disk(folder, **options)
    except OSError as error:
        pytest.skip(
            f"cannot mount a tmpfs ({error}): run as root or under `unshare --user --map-root-user --mount`"
        )
    try:
        yield mounted
    finally:
        mounted.unmount()


# Builds in forked processes


def build(workspace: Workspace, fault: Fault = NEVER, *, clock_s: float = 0) -> Done:
    """Build, with something happening on the way; ``clock_s`` is by how much the build's clock is wrong."""
    return start(workspace, fault, clock_s=clock_s).wait()


def start(workspace: Workspace, fault: Fault = NEVER, *, clock_s: float = 0) -> Started:
    """Start a build."""
    arguments = ["--module", "pipelines", "BuildDataset"]
    return Started(workspace, fault, clock_s, _luigi, arguments)


def spctrl(workspace: Workspace, *arguments: str, fault: Fault = NEVER, clock_s: float = 0) -> Done:
    """Run a command, as ``build`` builds."""
    return Started(workspace, fault, clock_s, _spctrl, list(arguments)).wait()


class Started:
    """A build or command under way."""

    def __init__(
        self,
        workspace: Workspace,
        fault: Fault,
        clock_s: float,
        main: Callable[[list[str]], None],
        arguments: list[str],
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        workspace.folder.mkdir(exist_ok=True)
        self._count = context.Value("i", 0)
        self._log = workspace.folder.with_name(f"{workspace.folder.name}-{time.monotonic_ns()}.log")
        self.process: ForkServerProcess = context.Process(
            target=_run,
            args=(workspace.settings_file(), self._log, fault, self._count, clock_s, main, arguments),
        )
        self.process.start()

    def wait_for(self, operation: int) -> None:
        """Wait until the build has come so far, or to its end."""
        while self._count.value < operation and self.process.is_alive():
            time.sleep(0.001)

    def wait(self) -> Done:
        self.process.join(HANG_S)
        if (exit_code := self.process.exitcode) is None:
            self.process.kill()
            pytest.fail(f"the build did not end within {HANG_S} s:\n{self._log.read_text()}")
        output = self._log.read_text()
        self._log.unlink()
        return Done(exit_code, output, self._count.value)


def _run(
    settings: Path,
    log: Path,
    fault: Fault,
    count: Any,
    clock_s: float,
    main: Callable[[list[str]], None],
    arguments: list[str],
) -> None:
    """What a forked process does."""
    import luigi.configuration

    from tasks.stage import record_stage

    file = log.open("wb")
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    os.setpgid(0, 0)
    os.chdir(settings.parent)
    # The fork server's processes ignore Ctrl-C, and hold it back where a build in this process has started the server.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environ |= {"LUIGI_CONFIG_PATH": str(settings), "COLUMNS": "200"}
    record_stage.SMALLEST_PACK = RECORDS_PER_PACK
    luigi.configuration.get_config().read([str(settings)])
    jump(clock_s, "")
    sys.addaudithook(_Hook(str(settings.parent), fault, count))
    main(arguments)


def _luigi(arguments: list[str]) -> None:
    from luigi.cmdline import luigi_run

    try:
        luigi_run(arguments)
    except KeyboardInterrupt:  # what the interpreter does with it
        sys.excepthook(*sys.exc_info())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)


def _spctrl(arguments: list[str]) -> None:
    from pipelines.cli.main import app

    app(arguments)


class _Hook:
    """Counts operations below a folder and lets the fault happen."""

    def __init__(self, folder: str, fault: Fault, count: Any) -> None:
        self._folder = folder
        self._fault = fault
        self._count = count
        self._is_acting = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_acting or not (path := self._changed(event, arguments)):
            return
        self._count.value += 1
        number, fault = self._count.value, self._fault
        if number == fault.at or (fault.lasting and number > fault.at and event not in fault.spares):
            self._is_acting = True
            try:
                fault.action(path)
            finally:
                self._is_acting = False

    def _changed(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        """The file or folder below ours that is about to change, if any does."""
        if event == "open":
            path, _, flags = arguments
            paths = [path] if flags & WRITING else []
        else:
            paths = [each for each in arguments if not isinstance(each, int)] if event in CHANGES else []
        changed = next((path for path in map(str, paths[::-1]) if path.startswith(self._folder)), "")
        is_idle = {"os.remove": not os.path.lexists(changed), "os.mkdir": Path(changed).is_dir()}.get(
            event, False
        )
        return None if is_idle else changed or None


# Trials


class Trials:
    """Disturbed builds, all in one folder, so that fingerprints are those of the undisturbed build.

    Attributes:
        workspace: where they happen.
        operations: of the undisturbed build.
        count: called for each fault that came to pass.
    """

    count: Callable[[], None]

    def __init__(self, workspace: Workspace, prepare: Callable[[Workspace], None]) -> None:
        self.workspace = workspace
        self._prepare = prepare
        self.begin()
        undisturbed = build(workspace)
        assert undisturbed.succeeded, undisturbed.output
        self.operations = undisturbed.operations
        self._expected = snapshot(workspace)
        self._exported = workspace.exported()

    def begin(self) -> Workspace:
        """Everything as it was before the build."""
        for folder in (self.workspace.store, self.workspace.exports):
            clear(folder)
        self._prepare(self.workspace)
        return self.workspace

    def survives(self, fault: Fault, *exit_codes: int, says: str = "", sound: bool = True) -> None:
        """A build with the fault ends with one of the codes; what it left is sound and leads on to the end."""
        self.begin()
        done = build(self.workspace, fault)
        if done.operations < fault.at:
            assert done.succeeded, done.output
        else:
            self.count()
            self.ended(done, *exit_codes, says=says)
        if sound:
            self.is_sound()
        self.finishes(whole=sound)

    def ended(self, done: Done, *exit_codes: int, says: str = "") -> None:
        """A build ended with one of the codes and a message, without a word on how it got there."""
        told = f"exit {done.exit_code} after {done.operations} operations\n{done.output}"
        assert done.exit_code in exit_codes, told
        assert done.succeeded or says in done.output, told
        assert "Traceback" not in done.output, told

    def is_sound(self) -> None:
        """Nothing that counts as done is damaged."""
        from spctrl.store.store import Store
        from tasks.maintenance import verify

        assert verify(Store(self.workspace.store), self.workspace.exports, repair=False) == []
        assert self.workspace.faults() == []

    def finishes(self, *, whole: bool = True) -> None:
        """Another build gives the bytes of an undisturbed one, and a third has nothing to do.

        Where the store is not whole because somebody deleted parts of it, what other settings made stays away.
        """
        again = build(self.workspace)
        assert again.succeeded, again.output
        found = snapshot(self.workspace)
        assert found.items() <= self._expected.items()
        assert not whole or found == self._expected
        assert self.workspace.exported() == self._exported
        assert build(self.workspace).operations == 0


def clear(folder: Path) -> None:
    """Empty a folder, which may be where a disk is mounted, or remove it."""
    if not os.path.ismount(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def snapshot(workspace: Workspace) -> dict[str, str]:
    """Digest of every file of the packs, runs and exports; without times, and without the report's page."""
    from conftest import sha256

    runs = workspace.store / "runs"
    found = {
        path.relative_to(workspace.store).as_posix(): sha256(path)
        for folder in (workspace.store / "packs", runs)
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".json", ".html") and not path.name.startswith(".tmp-")
    }
    for path in runs.rglob("provenance.json"):
        found[path.relative_to(workspace.store).as_posix()] = _timeless(json.loads(path.read_bytes()))
    return found | workspace.exported()


def _timeless(provenance: dict[str, Any]) -> str:
    facts = {name: value for name, value in provenance.items() if name not in TIMES}
    facts["counts"] = {name: count for name, count in facts["counts"].items() if name not in LATER_FOUND}
    facts["files"] = {name: entry for name, entry in facts["files"].items() if not name.endswith(".html")}
    return json.dumps(facts, sort_keys=True)


def some(total: int, count: int, seed: str) -> list[int]:
    """Numbers from 1 to ``total``: one of each of ``count`` stretches, or all."""
    if count >= total:
        return list(range(1, total + 1))
    rng = random.Random(seed)
    borders = [total * part // count for part in range(count + 1)]
    return [rng.randrange(first, last) + 1 for first, last in itertools.pairwise(borders)]
