"""Builds that are killed, that run side by side, or with another number of workers: always the same bytes."""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from processes import HANG_S, SURVIVAL_S, fork_server_of, survivors, wait_for_workers

if TYPE_CHECKING:
    from conftest import Workspace

RECORDS = 540
MOMENTS = 8
UPDATE_MOMENTS = 6
SEED = 20
RECORD_STAGES = ("spatext", "openpose")

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")


# The data: enough records for several packs, a few of them with images


@pytest.fixture(scope="module")
def crowd(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's AP-10K training split blown up to many records, the first ones with images."""
    from conftest import ANNOTATION_FILES, SAMPLE_IMAGES

    folder = tmp_path_factory.mktemp("crowd")
    shutil.copytree(sample / "AP-10K", folder / "AP-10K")
    path = folder / ANNOTATION_FILES["ap10k", "train"]
    content = json.loads(path.read_bytes())
    images, annotations = list(content["images"]), list(content["annotations"])
    for number in range(len(images), RECORDS):
        source = images[number % SAMPLE_IMAGES]
        new_id = 500_000 + number
        content["images"].append({**source, "id": new_id, "file_name": f"{new_id:012d}.jpg"})
        for position, original in enumerate(each for each in annotations if each["image_id"] == source["id"]):
            annotation = copy.deepcopy(original) | {"id": new_id * 10 + position, "image_id": new_id}
            for i, v in enumerate(annotation["keypoints"][2::3]):
                if v > 0:
                    annotation["keypoints"][3 * i] += 1 + number // SAMPLE_IMAGES
            content["annotations"].append(annotation)
    path.write_text(json.dumps(content))
    return folder


@dataclass(frozen=True)
class Expected:
    """What an undisturbed build made, and how long it took."""

    exported: dict[str, str]
    packs: dict[str, str]
    keys: dict[str, set[str]]
    duration_s: float

    def check(self, workspace: Workspace) -> None:
        """The same files, to the byte, in the exports and in the packs."""
        assert workspace.exported() == self.exported
        assert workspace.packs(*RECORD_STAGES) == self.packs
        assert workspace.faults() == []


def configure(workspace: Workspace, workers: int = 2) -> Workspace:
    workspace.configure("build", datasets=["ap10k"], splits=["train"], images="optional")
    workspace.configure("executor", workers=workers)
    return workspace


@pytest.fixture
def make_crowded(make_workspace: Callable[..., Workspace], crowd: Path) -> Callable[..., Workspace]:
    """Makes workspaces that build the crowd: ``make_crowded(name, workers=2)``."""
    return lambda name, workers=2: configure(make_workspace(name, crowd), workers)


@pytest.fixture(scope="module")
def expected(
    crowd: Path, code: Path, digest_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Expected:
    from conftest import Workspace

    workspace = configure(Workspace(tmp_path_factory.mktemp("undisturbed"), crowd, code))
    workspace.store.mkdir()
    shutil.copyfile(digest_cache, workspace.store / "cache.sqlite")
    started = time.monotonic()
    build = workspace.run()
    duration_s = time.monotonic() - started
    assert build.exit_code == 0, build.output
    keys = {stage: workspace.keys(stage) for stage in RECORD_STAGES}
    # Several packs, or there would be nothing to interrupt.
    assert {stage: len(found) for stage, found in keys.items()} == dict.fromkeys(RECORD_STAGES, RECORDS)
    assert len(workspace.packs("spatext")) == 3
    return Expected(workspace.exported(), workspace.packs(*RECORD_STAGES), keys, duration_s)


# Killing


def kill_at(workspace: Workspace, moment_s: float | None, *, whole_group: bool) -> bool:
    """SIGKILL a build after some time, or with its first pack; says whether it was still running."""
    build = workspace.start()
    if moment_s is None:
        while build.poll() is None and not any(workspace.store.glob("packs/spatext/[!.]*.parquet")):
            time.sleep(0.002)
        moment_s = 0
    try:
        build.communicate(timeout=moment_s)
    except subprocess.TimeoutExpired:
        (os.killpg if whole_group else os.kill)(build.pid, signal.SIGKILL)
    build.communicate(timeout=SURVIVAL_S)
    left = survivors(build)
    assert left == []
    assert build.returncode in (0, -signal.SIGKILL)
    return build.returncode != 0


def moments(count: int, duration_s: float) -> Iterator[float]:
    """Random moments, one in each of ``count`` equal parts of a build; imports are over sooner than the first."""
    rng = random.Random(SEED)
    for part in range(count):
        yield duration_s * (0.15 + 0.85 * (part + rng.random()) / count)


# Tests


@pytest.mark.slow
def test_a_build_killed_at_any_moment_and_run_again_gives_the_same_bytes(
    make_crowded: Callable[..., Workspace], expected: Expected
) -> None:
    killed = in_between = 0
    # By the clock alone, a busy machine may be killed outside the stages every time.
    for number, moment_s in enumerate([None, *moments(MOMENTS - 1, expected.duration_s)]):
        workspace = make_crowded(f"killed-{number}")
        killed += kill_at(workspace, moment_s, whole_group=number % 2 == 0)
        assert workspace.faults() == []
        finished = {stage: workspace.keys(stage) for stage in RECORD_STAGES}
        in_between += 0 < sum(map(len, finished.values())) < 2 * (RECORDS)
        workspace.configure("executor", workers=1)
        again = workspace.build()
        assert again.succeeded, again.errors
        for stage, keys in finished.items():
            # What was finished is found, and nothing else is.
            assert keys <= expected.keys[stage]
            assert again.worked.get(stage, 0) == len(expected.keys[stage] - keys)
        expected.check(workspace)
        shutil.rmtree(workspace.folder)
    assert killed >= MOMENTS // 2, "the builds ended before they were killed: this tested too little"
    assert in_between >= 1


@pytest.mark.slow
def test_an_update_killed_at_any_moment_and_run_again_gives_the_same_bytes(
    make_crowded: Callable[..., Workspace], expected: Expected
) -> None:
    workspace = make_crowded("updated")
    exported: dict[str, dict[str, str]] = {}
    for style in ("coco", "openpose"):
        workspace.configure("openpose", style=style)
        started = time.monotonic()
        assert workspace.run().exit_code == 0
        duration_s = time.monotonic() - started
        exported[style] = workspace.exported()
    assert exported["openpose"] == expected.exported
    assert exported["coco"] != expected.exported
    styles = itertools.cycle(("coco", "openpose"))
    killed = 0
    for number, moment_s in enumerate(moments(UPDATE_MOMENTS, duration_s)):
        style = next(styles)
        workspace.configure("openpose", style=style)
        killed += kill_at(workspace, moment_s, whole_group=number % 2 == 0)
        assert workspace.faults() == []
        again = workspace.build()
        assert again.succeeded, again.errors
        assert workspace.exported() == exported[style]
    assert killed >= 1


KILL_AT_RENAME = """
import os, pathlib, signal

def dying(rename):
    def wrapped(source, target, *arguments, **options):
        if "mmpose_skeleton" in str(target):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(source, target, *arguments, **options)
    return wrapped

os.replace, os.rename = dying(os.replace), dying(os.rename)
pathlib.Path.replace, pathlib.Path.rename = dying(pathlib.Path.replace), dying(pathlib.Path.rename)
"""


@pytest.mark.slow
def test_an_update_killed_while_it_replaces_a_file_leaves_no_stray_file(
    workspace: Workspace, tmp_path: Path
) -> None:
    assert workspace.build().succeeded
    names = workspace.exported().keys()
    shutil.copytree(workspace.code, tmp_path / "dying")
    (tmp_path / "dying" / "sitecustomize.py").write_text(KILL_AT_RENAME)
    sound, workspace.code = workspace.code, tmp_path / "dying"
    workspace.configure("openpose", style="coco")
    assert workspace.run().exit_code == -signal.SIGKILL
    workspace.code = sound
    again = workspace.build()
    assert again.succeeded, again.errors
    assert workspace.exported().keys() == names


@pytest.mark.slow
def test_a_build_killed_again_and_again_gets_done(
    make_crowded: Callable[..., Workspace], expected: Expected
) -> None:
    workspace = make_crowded("killed-often")
    for number in range(4):
        kill_at(workspace, expected.duration_s * 0.6, whole_group=number % 2 == 0)
    again = workspace.build()
    assert again.succeeded, again.errors
    expected.check(workspace)


@pytest.mark.slow
def test_two_builds_at_once_into_one_store_give_the_same_bytes(
    make_crowded: Callable[..., Workspace], expected: Expected
) -> None:
    for attempt in range(2):
        workspace = make_crowded(f"shared-{attempt}", workers=1)
        builds = [workspace.start(), workspace.start()]
        outputs = [build.communicate(timeout=HANG_S)[0] for build in builds]
        assert [build.returncode for build in builds] == [0, 0], "\n".join(outputs)
        expected.check(workspace)
        assert workspace.build().worked == {}
        expected.check(workspace)


@pytest.mark.slow
def test_two_updates_at_once_give_the_same_bytes(
    make_crowded: Callable[..., Workspace], expected: Expected
) -> None:
    workspace = make_crowded("shared-update", workers=1)
    workspace.configure("openpose", style="keypoints")
    assert workspace.build().succeeded
    workspace.configure("openpose", style=None)
    builds = [workspace.start(), workspace.start()]
    outputs = [build.communicate(timeout=HANG_S)[0] for build in builds]
    assert [build.returncode for build in builds] == [0, 0], "\n".join(outputs)
    assert workspace.exported() == expected.exported
    assert workspace.faults() == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_does_not_show_in_the_bytes(
    make_crowded: Callable[..., Workspace], expected: Expected, workers: int
) -> None:
    workspace = make_crowded(f"workers-{workers}", workers)
    build = workspace.run()
    assert build.exit_code == 0, build.output
    expected.check(workspace)


@pytest.mark.slow
def test_a_killed_worker_fails_the_build_clearly_and_a_rerun_completes_it(
    make_crowded: Callable[..., Workspace], expected: Expected
) -> None:
    workspace = make_crowded("lost-worker")
    build = workspace.start()
    os.kill(wait_for_workers(build)[0].pid, signal.SIGKILL)
    output, _ = build.communicate(timeout=HANG_S)
    assert build.returncode == 30, output
    assert "a worker process died" in output
    assert survivors(build) == []
    assert workspace.faults() == []
    again = workspace.build()
    assert again.succeeded, again.errors
    expected.check(workspace)


@pytest.mark.slow
def test_a_build_that_loses_its_fork_server_leaves_no_process_and_can_be_continued(
    make_crowded: Callable[..., Workspace], expected: Expected
) -> None:
    workspace = make_crowded("lost-server")
    build = workspace.start()
    wait_for_workers(build, count=2)
    os.kill(fork_server_of(build).pid, signal.SIGKILL)
    output, _ = build.communicate(timeout=HANG_S)
    assert build.returncode in (0, 30), output
    assert "Traceback" not in output
    assert survivors(build) == []
    assert workspace.faults() == []
    again = workspace.build()
    assert again.succeeded, again.errors
    expected.check(workspace)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_a_stopped_build_fails_leaves_no_process_and_can_be_continued(
    make_crowded: Callable[..., Workspace], expected: Expected, how: str
) -> None:
    workspace = make_crowded("stopped")
    build = workspace.start()
    wait_for_workers(build, count=2)
    if how == "Ctrl-C":  # a terminal sends it to every process of the group
        os.killpg(build.pid, signal.SIGINT)
    else:
        os.kill(build.pid, signal.SIGTERM)
    output, _ = build.communicate(timeout=HANG_S)
    assert build.returncode == (-signal.SIGINT if how == "Ctrl-C" else -signal.SIGTERM), output
    assert "Traceback" not in output
    assert survivors(build) == []
    assert workspace.faults() == []
    again = workspace.build()
    assert again.succeeded, again.errors
    expected.check(workspace)
