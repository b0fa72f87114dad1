"""Builds on disks that are full, read-only or broken, stores that vanish, clocks that jump, signals at any time.

After each, nothing that counts as done is damaged, and another build gives the bytes of an undisturbed one. Some
moments are tried; ``--moments 10000`` tries all.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faults
import pytest
from faults import YEAR_S, Action, Disk, Fault, Trials, disk, some, spctrl

if TYPE_CHECKING:
    from conftest import Workspace

pytestmark = pytest.mark.slow

AMPLE = {"size": "64m", "nr_inodes": 10_000}
FAILED = 30
KEEPS = "What was finished before stays"


# What is built


def nothing_yet(workspace: Workspace) -> None:
    """A first build."""


def another_style(workspace: Workspace) -> None:
    """A build that replaces what was made with other settings."""
    style = workspace.settings.get("openpose", {}).get("style")
    workspace.configure("openpose", style="coco")
    assert faults.build(workspace).succeeded
    workspace.configure("openpose", style=style)


@pytest.fixture(scope="module")
def make_trials(
    sample: Path, code: Path, digest_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Trials]:
    """Makes trials of a build: ``make_trials(prepare, **export settings)``."""
    from conftest import Workspace

    def make(prepare: Callable[[Workspace], None] = nothing_yet, **export: object) -> Trials:
        folder = tmp_path_factory.mktemp("faults")
        shutil.copytree(sample, folder / "data")
        workspace = Workspace(folder / "work", folder / "data", code)
        workspace.configure("build", datasets=["ap10k"], splits=["train"])
        workspace.configure("export", **export)

        def begin(workspace: Workspace) -> None:
            workspace.store.mkdir(exist_ok=True)
            shutil.copyfile(digest_cache, workspace.store / "cache.sqlite")
            prepare(workspace)

        return Trials(workspace, begin)

    return make


BUILDS: dict[str, Callable[[Callable[..., Trials]], Trials]] = {
    "first": lambda make: make(),
    "update": lambda make: make(another_style),
    "shards": lambda make: make(format=["webdataset", "parquet"], heatmaps="yes"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The most telling kinds of faults in a first build; with ``--moments`` all of them, in others too."""
    everything = metafunc.config.getoption("moments") is not None
    if "trials" in metafunc.fixturenames:
        names = list(BUILDS) if everything else ["first"]
        metafunc.parametrize("trials", names, indirect=True, scope="module")
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", [name for name, kind in KINDS.items() if kind.shares or everything])


@pytest.fixture(scope="module")
def trials(request: pytest.FixtureRequest, make_trials: Callable[..., Trials]) -> Trials:
    """Trials of one of the builds."""
    return BUILDS[request.param](make_trials)


Moments = Callable[..., list[int]]


@pytest.fixture
def moments(request: pytest.FixtureRequest) -> Moments:
    """Which of a build's operations to disturb: ``moments(operations, *shares of the build)``, or with ``--moments`` so
    many.
    """
    asked = request.config.getoption("moments")

    def choose(total: int, *shares: float) -> list[int]:
        if asked is None:
            return [1 + int(total * share) for share in shares]
        return some(total, asked, request.node.name)

    return choose


@pytest.fixture(autouse=True)
def counted(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Counts the faults of each test for the table at the end of the session."""
    if "trials" in request.fixturenames:
        request.getfixturevalue("trials").count = lambda: record_property("faults", 1)


# At a file operation


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        fault: the fault at an operation of a build in a workspace.
        exit_codes: of the build; 0 where it may not notice.
        says: what its messages contain where it fails.
        sound: whether nothing that counts as done may be damaged when the build has ended.
        shares: of the build after which it is tried where ``--moments`` does not say otherwise.
    """

    fault: Callable[[Workspace, int], Fault]
    exit_codes: tuple[int, ...]
    says: str = ""
    sound: bool = True
    shares: tuple[float, ...] = ()


def at(action: Action, *exit_codes: int, **facts: Any) -> Kind:
    return Kind(lambda _, moment: Fault(moment, action), exit_codes, **facts)


def failing(code: int, *exit_codes: int, shares: tuple[float, ...] = (), **when: Any) -> Kind:
    action, message = functools.partial(faults.fail, code), os.strerror(code)
    return Kind(lambda _, moment: Fault(moment, action, **when), exit_codes, says=message, shares=shares)


def removing(name: str, *shares: float, sound: bool = False) -> Kind:
    def fault(workspace: Workspace, moment: int) -> Fault:
        return Fault(moment, functools.partial(faults.remove, workspace.folder / name))

    return Kind(fault, (0, FAILED), sound=sound, shares=shares)


LASTING: dict[str, Any] = {"lasting": True}
FULL: dict[str, Any] = {"lasting": True, "spares": faults.REMOVALS}

KINDS = {
    "killed": at(faults.kill, -signal.SIGKILL, shares=(0.2, 0.5, 0.8)),
    "terminated": at(functools.partial(faults.send, signal.SIGTERM), -signal.SIGTERM, shares=(0.4,)),
    "interrupted": at(
        functools.partial(faults.send, signal.SIGINT), -signal.SIGINT, says="stopped", shares=(0.7,)
    ),
    "no room left": failing(errno.ENOSPC, FAILED, **FULL, shares=(0.3,)),
    "quota used up": failing(errno.EDQUOT, FAILED, **FULL),
    "read-only from now on": failing(errno.EROFS, FAILED, **LASTING, shares=(0.8,)),
    "one input/output error": failing(errno.EIO, 0, FAILED, shares=(0.6,)),
    "broken from now on": failing(errno.EIO, FAILED, **LASTING),
    "permission taken": failing(errno.EACCES, FAILED, **LASTING),
    "store deleted": removing("store", 0.3),
    "packs deleted": removing("store/packs", 0.5),
    "runs deleted": removing("store/runs", 0.7),
    "cache deleted": removing("store/cache.sqlite", sound=True),
    "exports deleted": removing("exports", 0.75),
    "exported folder deleted": removing("exports/AP-10K_triplet/pose_kptindex", 0.7),
    "a year forwards": at(functools.partial(faults.jump, YEAR_S), 0, shares=(0.4,)),
    "a year backwards": at(functools.partial(faults.jump, -YEAR_S), 0),
    "gc of a wrong clock": at(faults.clean_up_a_year_ahead, 0, FAILED, sound=False, shares=(0.5,)),
}


def test_a_build_disturbed_at_a_file_operation_leads_on_to_the_same_bytes(
    trials: Trials, kind: str, moments: Moments
) -> None:
    how = KINDS[kind]
    for moment in moments(trials.operations, *how.shares):
        fault = how.fault(trials.workspace, moment)
        trials.survives(fault, *how.exit_codes, says=how.says, sound=how.sound)


# On a disk of its own


@pytest.fixture
def on_disks(trials: Trials) -> Iterator[dict[str, Disk]]:
    """The store and the exports on disks of their own, which have ample room."""
    trials.begin()
    for folder in (trials.workspace.store, trials.workspace.exports):
        shutil.rmtree(folder, ignore_errors=True)
    with disk(trials.workspace.store, **AMPLE) as store, disk(trials.workspace.exports, **AMPLE) as exports:
        yield {"store": store, "exports": exports}


LIMITS = {"size": os.sysconf("SC_PAGE_SIZE"), "nr_inodes": 1}
"""Options of a disk that limit it, and their smallest steps."""
OF_THE_CACHE = 16
"""Steps at the end that may lack without harm: the cache of digests is done without."""


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("full", ["store", "exports"])
def test_a_full_disk_fails_the_build_which_goes_on_once_there_is_room(
    trials: Trials, on_disks: dict[str, Disk], full: str, limit: str, moments: Moments
) -> None:
    mounted, step = on_disks[full], LIMITS[limit]
    trials.begin()
    least = mounted.used()[limit] // step
    trials.finishes()
    most = mounted.used()[limit] // step
    for more in moments(most - least, 0.5):
        trials.begin()
        mounted.change(**{limit: max(least + more - 1, 1) * step})
        try:
            done = faults.build(trials.workspace)
            if not done.succeeded or most - least - more > OF_THE_CACHE:
                trials.count()
                trials.ended(done, FAILED, says="No space left on device")
                assert KEEPS in done.output
            trials.is_sound()
        finally:
            mounted.change(**AMPLE)
        trials.finishes()


@pytest.mark.parametrize("which", ["store", "exports"])
def test_a_read_only_disk_fails_the_build_which_goes_on_once_it_can_be_written(
    trials: Trials, on_disks: dict[str, Disk], which: str
) -> None:
    trials.begin()
    on_disks[which].change(ro=True)
    done = faults.build(trials.workspace)
    trials.count()
    trials.ended(done, FAILED, says="Read-only file system")
    assert KEEPS in done.output
    trials.is_sound()
    on_disks[which].change(rw=True)
    trials.finishes()


def test_a_finished_build_on_read_only_disks_is_found_finished(
    trials: Trials, on_disks: dict[str, Disk]
) -> None:
    trials.begin()
    trials.finishes()
    for each in on_disks.values():
        each.change(ro=True)
    done = faults.build(trials.workspace)
    assert done.succeeded, done.output
    trials.is_sound()
    assert spctrl(trials.workspace, "status").succeeded


# Clocks


@pytest.fixture
def rewritten(workspace: Workspace) -> Workspace:
    """A workspace whose annotations are written as ``edit_annotations`` does, so that an edit may keep their size."""
    with workspace.edit_annotations("ap10k", "train"):
        pass
    return workspace


@contextlib.contextmanager
def edited_in_place(workspace: Workspace) -> Iterator[None]:
    """One digit of a keypoint is another: only the file's time and content show it."""
    path = workspace.annotation_path("ap10k", "train")
    before = path.stat()
    with workspace.edit_annotations("ap10k", "train") as content:
        keypoints = content["annotations"][0]["keypoints"]
        position = next(
            i for i, value in enumerate(keypoints) if i % 3 == 0 and value > 10 and value % 10 < 9
        )
        keypoints[position] += 1
    after = path.stat()
    assert (after.st_size, after.st_ino) == (before.st_size, before.st_ino)
    yield
    with workspace.edit_annotations("ap10k", "train") as content:
        content["annotations"][0]["keypoints"][position] -= 1


CLOCKS = {"ahead": YEAR_S, "behind": -YEAR_S}


@pytest.mark.parametrize("clock_s", CLOCKS.values(), ids=CLOCKS)
def test_a_clock_that_is_wrong_for_one_build_hides_no_edit_and_makes_no_work(
    rewritten: Workspace, clock_s: float
) -> None:
    assert faults.build(rewritten, clock_s=clock_s).succeeded
    exported = rewritten.exported()
    with edited_in_place(rewritten):
        assert faults.build(rewritten).succeeded
        assert rewritten.exported() != exported
        assert faults.build(rewritten, clock_s=clock_s).operations == 0
    assert faults.build(rewritten, clock_s=-clock_s).succeeded
    assert rewritten.exported() == exported
    assert faults.build(rewritten).operations == 0


def test_files_from_the_future_hide_no_edit_and_make_no_work(rewritten: Workspace) -> None:
    def age() -> None:
        for path in rewritten.data.rglob("*"):
            os.utime(path, (time.time() + YEAR_S,) * 2)

    age()
    assert faults.build(rewritten).succeeded
    exported = rewritten.exported()
    assert faults.build(rewritten).operations == 0
    with edited_in_place(rewritten):
        age()
        assert faults.build(rewritten).succeeded
        assert rewritten.exported() != exported
    assert faults.build(rewritten).succeeded
    assert rewritten.exported() == exported


@pytest.mark.parametrize("clock_s", CLOCKS.values(), ids=CLOCKS)
def test_gc_with_a_wrong_clock_keeps_what_the_present_settings_use(
    workspace: Workspace, clock_s: float
) -> None:
    another_style(workspace)
    assert faults.build(workspace, clock_s=-clock_s).succeeded
    exported = workspace.exported()
    cleaned = spctrl(workspace, "gc", "--keep", "0", clock_s=clock_s)
    assert cleaned.succeeded, cleaned.output
    assert ("Removed 0 runs" in cleaned.output) == (clock_s < 0)  # to a clock behind, everything is young
    assert workspace.faults() == []
    assert faults.build(workspace).operations == 0
    assert workspace.exported() == exported


# Cleaning up

GC = ("gc", "--keep", "0", "--grace-hours", "0")


@pytest.fixture(scope="module")
def littered(make_trials: Callable[..., Trials], tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with runs that nothing refers to, and with packs that are mostly dead, as ``template`` beside it."""
    workspace = make_trials().begin()
    for change in (1, -1):
        with workspace.edit_annotations("ap10k", "train") as content:
            first = content["images"][0]["id"]
            for annotation in content["annotations"]:
                annotation["keypoints"][0] += change * (annotation["image_id"] != first)
        assert faults.build(workspace).succeeded
    shutil.copytree(workspace.store, workspace.folder.with_name("template"))
    return workspace


CLEANING = {
    "killed": at(faults.kill, -signal.SIGKILL, shares=(0.1, 0.4, 0.7)),
    "no room left": failing(errno.ENOSPC, 0, 1, **FULL, shares=(0.1,)),  # removing takes no room
    "one input/output error": failing(errno.EIO, 0, 1, shares=(0.5,)),
}


@pytest.mark.parametrize("how", CLEANING)
def test_gc_disturbed_at_a_file_operation_loses_nothing_that_is_kept(
    littered: Workspace, how: str, moments: Moments, record_property: Callable[[str, object], None]
) -> None:
    def restore() -> None:
        shutil.rmtree(littered.store)
        shutil.copytree(littered.folder.with_name("template"), littered.store)

    restore()
    exported = littered.exported()
    undisturbed = spctrl(littered, *GC)
    assert undisturbed.succeeded, undisturbed.output
    assert "rewrote 0 packs" not in undisturbed.output
    packs = littered.packs("spatext", "openpose", "images")
    for moment in moments(undisturbed.operations, *CLEANING[how].shares):
        restore()
        done = spctrl(littered, *GC, fault=CLEANING[how].fault(littered, moment))
        record_property("faults", 1)
        assert done.exit_code in CLEANING[how].exit_codes, done.output
        assert done.succeeded or CLEANING[how].says in done.output, done.output
        assert "Traceback" not in done.output
        assert littered.faults() == []
        again = littered.build()
        assert again.succeeded, again.errors
        assert again.worked == {}
        assert littered.exported() == exported
        assert spctrl(littered, *GC).succeeded
        assert littered.packs("spatext", "openpose", "images") == packs


# Several builds


def test_builds_with_different_settings_at_once_into_one_store_and_export(
    trials: Trials, tmp_path: Path, moments: Moments
) -> None:
    from conftest import Workspace

    one = trials.begin()
    other = Workspace(tmp_path / "other", one.data, one.code)
    other.settings = {**one.settings, "openpose": {"style": "coco"}}
    exported = {}
    for each in (one, other):
        assert faults.build(each).succeeded
        exported[each] = one.exported()
    for moment in moments(trials.operations, 0.7):
        trials.begin()
        first = faults.start(one)
        first.wait_for(moment)
        second = faults.start(other)
        for done in (first.wait(), second.wait()):
            trials.ended(done, 0, FAILED)
        trials.count()
        trials.is_sound()
        for each in (one, other):
            again = faults.build(each)
            assert again.succeeded, again.output
            assert one.exported() == exported[each]
        trials.is_sound()
