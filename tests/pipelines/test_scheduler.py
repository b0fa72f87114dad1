"""luigid and workers on one store: each stage is made once, whoever dies is replaced, and all end when all is done."""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from processes import HANG_S

if TYPE_CHECKING:
    import luigi
    from conftest import Workspace

SILENCE_S, RETRY_S = 3.0, 0.5
"""``worker_disconnect_delay`` where a worker falls silent, and ``retry_delay``."""
SLACK_S = 45.0
"""What a busy machine may add; less than luigid's own delay, 60 s."""
RECORDS_PER_PACK = 2
HELD = "spatext"
"""The stage that a worker holds on in."""

# A worker that makes small packs, each of which may take a while. Where it is told to, it holds on after the second
# one of a stage while a file is there: a stage that takes as long as a test likes, in a worker that is alive.
WORKER = f"""
import os, pathlib, time
import tasks.stage.record_stage
from pipelines.cli.main import app
from spctrl.store.store import Store

tasks.stage.record_stage.SMALLEST_PACK = {RECORDS_PER_PACK}
write_pack, written, gate = Store.write_pack, [], os.environ.get("GATE")

def write_and_hold(self, stage, *arguments):
    made = write_pack(self, stage, *arguments)
    written.append(stage)
    time.sleep(float(os.environ.get("PACE_S", 0)))
    while gate and stage == "{HELD}" and written.count(stage) == 2 and pathlib.Path(gate).exists():
        time.sleep(0.02)
    return made

Store.write_pack = write_and_hold
app()
"""

Found = TypeVar("Found")


def wait_for(look: Callable[[], Found | None], what: str) -> Found:
    """What a look gives, as soon as that is anything."""
    end = time.monotonic() + HANG_S
    while not (found := look()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)
    return found


def cluster_settings() -> dict[str, dict[str, str]]:
    """Sections of the file that a lab starts from."""
    from conftest import REPOSITORY

    parser = configparser.ConfigParser()
    parser.read_string((REPOSITORY / "configs" / "cluster.cfg").read_text())
    return {section: dict(parser[section]) for section in parser.sections()}


@dataclass
class Helper:
    """A worker, in a folder of its own."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    def ends(self) -> int:
        """Its exit code, when it has ended. One that hangs has all its processes say where."""
        try:
            return self.process.wait(HANG_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGABRT)
            self.process.wait(HANG_S)
            pytest.fail(f"a worker did not end within {HANG_S:g} s:\n{self.output}")

    def done(self) -> Counter[tuple[str, str]]:
        """How often it finished each stage, by stage and part."""
        lines = [json.loads(line) for line in self.output.splitlines() if line.startswith("{")]
        return Counter((line["stage"], line["part"]) for line in lines if line["message"] == "stage done")


class Cluster:
    """A workspace, a luigid, and workers that come and go."""

    def __init__(self, workspace: Workspace, **scheduler: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.workspace = workspace
        self.gate = workspace.folder / "gate"
        self.gate.touch()
        self.helpers: list[Helper] = []
        for section, values in cluster_settings().items():
            workspace.configure(section, **values)
        workspace.configure("core", scheduler_host="127.0.0.1", scheduler_port=self.port)
        workspace.configure("scheduler", retry_delay=RETRY_S, **scheduler)
        workspace.configure("worker", wait_interval=0.2, wait_jitter=0, ping_interval=0.2)
        workspace.configure("log", format="json")
        self.luigid = self.start_luigid()

    def start_luigid(self) -> subprocess.Popen[bytes]:
        folder = self.workspace.folder / "luigid"
        folder.mkdir(exist_ok=True)
        options = {
            "address": "127.0.0.1",
            "port": self.port,
            "logdir": folder,
            "state-path": folder / "state",
        }
        self.luigid = self._start(
            folder,
            "import luigi.cmdline; luigi.cmdline.luigid()",
            *(word for name, value in options.items() for word in (f"--{name}", str(value))),
        )
        wait_for(self._answers, "luigid")
        return self.luigid

    def _answers(self) -> bool:
        assert self.luigid.poll() is None, "luigid ended"
        try:
            self.ask("is_paused")
        except OSError:
            return False
        return True

    def ask(self, method: str, **arguments: Any) -> Any:
        """What luigid answers, as its visualiser asks."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        data = urllib.parse.urlencode({"data": json.dumps(arguments)}).encode()
        with opener.open(f"http://127.0.0.1:{self.port}/api/{method}", data, timeout=HANG_S) as answer:
            return json.load(answer)["response"]

    def tasks(self, family: str = "") -> list[dict[str, Any]]:
        return [each for each in self.ask("task_list").values() if family in ("", each["name"])]

    def help(
        self, *options: str, target: str = "BuildDataset", holds: bool = False, pace_s: float = 0
    ) -> Helper:
        """Start a worker, in another folder than the others."""
        folder = self.workspace.folder / f"machine-{len(self.helpers)}"
        folder.mkdir()
        environment = {"PACE_S": str(pace_s), **({"GATE": str(self.gate)} if holds else {})}
        process = self._start(folder, WORKER, "join", target, *options, **environment)
        self.helpers.append(Helper(process, folder))
        return self.helpers[-1]

    def wait_for_helpers(self, count: int, target: str = "BuildDataset") -> None:
        """Until so many have said what they want."""

        def are_there() -> bool:
            waiting = [each for each in self.tasks(target) if len(each["workers"]) == count]
            return bool(waiting)

        wait_for(are_there, f"{count} workers")

    def wait_for_hold(self) -> dict[str, Any]:
        """Until a worker holds on in the middle of the stage, and luigid knows how far it is."""

        def held() -> dict[str, Any] | None:
            tasks = [each for each in self.tasks("Spatext") if each["progress_percentage"]]
            return tasks[0] if tasks else None

        wait_for(lambda: len(self.workspace.packs(HELD)) == 2, "two packs")
        return wait_for(held, "a percentage")

    def _start(
        self, folder: Path, script: str, *arguments: str, **environment: str
    ) -> subprocess.Popen[bytes]:
        with (folder / "output").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-c", script, *arguments],
                cwd=folder,
                env={
                    **os.environ,
                    "PYTHONPATH": str(self.workspace.code),
                    "LUIGI_CONFIG_PATH": str(self.workspace.settings_file()),
                    "NO_PROXY": "127.0.0.1",
                    "PYTHONFAULTHANDLER": "1",
                    **environment,
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def close(self) -> None:
        for process in (self.luigid, *(each.process for each in self.helpers)):
            process.kill()
            process.wait(HANG_S)


@dataclass(frozen=True)
class Expected:
    """What a build by one process made."""

    exported: dict[str, str]
    packs: dict[str, str]

    def check(self, workspace: Workspace) -> None:
        assert workspace.exported() == self.exported
        assert workspace.packs("images", "spatext", "openpose") == self.packs
        assert workspace.faults() == []


@pytest.fixture(scope="module")
def expected(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    from conftest import Workspace

    import tasks.stage.record_stage

    workspace = Workspace(tmp_path_factory.mktemp("single"), sample)
    workspace.configure("build", datasets=["ap10k", "humanart"], splits=["train"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.stage.record_stage, "SMALLEST_PACK", RECORDS_PER_PACK)
        build = workspace.build()
    assert build.succeeded, build.errors
    return Expected(workspace.exported(), workspace.packs("images", "spatext", "openpose"))


@pytest.fixture
def start_cluster(workspace: Workspace) -> Iterator[Callable[..., Cluster]]:
    """Starts a scheduler, with settings of its own, for the training splits of both datasets; no worker yet."""
    workspace.configure("build", datasets=["ap10k", "humanart"])
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(contextlib.closing(Cluster(workspace, **settings)))


@pytest.fixture
def cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    return start_cluster()


@pytest.mark.slow
def test_workers_share_the_stages_and_each_is_made_once(cluster: Cluster, expected: Expected) -> None:
    cluster.ask("pause")
    helpers = [cluster.help() for _ in range(3)]
    cluster.wait_for_helpers(3)
    cluster.ask("unpause")
    assert [each.ends() for each in helpers] == [0, 0, 0], "\n".join(each.output for each in helpers)
    parts = ("ap10k-train", "humanart-train")
    stages = ("index", "images", "spatext", "openpose", "manifest", "export")
    once = {**{(stage, part): 1 for stage in stages for part in parts}, ("report", "all"): 1}
    assert sum((each.done() for each in helpers), Counter()) == once
    assert sum(bool(each.done()) for each in helpers) >= 2, "one worker did it all"
    expected.check(cluster.workspace)
    tasks = cluster.tasks()
    assert {each["status"] for each in tasks} == {"DONE"}
    assert {each["progress_percentage"] for each in tasks if each["name"] == "Spatext"} == {100}
    late = cluster.help()
    assert (late.ends(), late.done()) == (0, {})


@pytest.mark.slow
def test_a_build_by_luigi_shows_up_at_the_luigid_of_its_settings(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    workspace = cluster.workspace
    workspace.configure("log", format=None)
    workspace.configure("core", local_scheduler=None)  # a copy of an older cluster.cfg
    build = workspace.run("--dataset", "ap10k")
    assert build.succeeded, build.output
    assert {each["status"] for each in cluster.tasks()} == {"DONE"}
    assert len(cluster.tasks("BuildDataset")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_silent_worker_is_replaced_in_time(
    start_cluster: Callable[..., Cluster], expected: Expected, how: int
) -> None:
    cluster = start_cluster(worker_disconnect_delay=SILENCE_S)
    first = cluster.help(holds=True)
    held = cluster.wait_for_hold()
    assert (held["status"], held["progress_percentage"]) == ("RUNNING", 25)
    second = cluster.help()
    cluster.wait_for_helpers(2)
    if how == signal.SIGKILL:  # a stage may well take longer than a worker may be silent
        time.sleep(max(held["time_running"] + 1.5 * SILENCE_S - time.time(), 0))
    (same,) = (each for each in cluster.tasks("Spatext") if each["params"] == held["params"])
    assert (same["status"], same["worker_running"]) == ("RUNNING", held["worker_running"])
    assert not list(cluster.workspace.store.glob(f"runs/{HELD}/{part_of(held)}/*/provenance.json"))
    first.process.send_signal(how)
    silent_at = time.monotonic()
    wait_for(lambda: second.done()[HELD, part_of(held)], "the stage of the silent worker")
    assert time.monotonic() - silent_at < SILENCE_S + RETRY_S + SLACK_S
    assert second.ends() == 0
    # What the first had finished is not made again.
    (made,) = (line["counts"]["made"] for line in stage_lines(second, HELD, part_of(held)))
    assert made == 8 - 2 * RECORDS_PER_PACK
    if how == signal.SIGSTOP:  # back again, it finds that all is done
        cluster.gate.unlink()
        first.process.send_signal(signal.SIGCONT)
        assert first.ends() == 0
    expected.check(cluster.workspace)


def part_of(task: dict[str, Any]) -> str:
    return f"{task['params']['dataset']}-{task['params']['split']}"


def stage_lines(helper: Helper, stage: str, part: str) -> list[dict[str, Any]]:
    """What a worker logged of stages that it finished."""
    lines = [json.loads(line) for line in helper.output.splitlines() if line.startswith("{")]
    return [line for line in lines if (line.get("stage"), line.get("part")) == (stage, part)]


@pytest.mark.slow
def test_a_worker_waits_while_another_makes_the_target_itself(cluster: Cluster) -> None:
    stage = ("--dataset", "ap10k", "--split", "train")
    first = cluster.help(*stage, target="Spatext", holds=True)
    cluster.wait_for_hold()
    second = cluster.help(*stage, target="Spatext")
    cluster.wait_for_helpers(2, "Spatext")
    time.sleep(1)  # five questions for work
    assert second.process.poll() is None
    cluster.gate.unlink()
    assert [first.ends(), second.ends()] == [0, 0]
    assert "joining again" not in second.output
    assert not second.done()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_outlive_luigid(cluster: Cluster, expected: Expected, how: int) -> None:
    cluster.workspace.configure("core", rpc_retry_attempts=3, rpc_retry_wait=1)
    first = cluster.help(holds=True)
    cluster.wait_for_hold()
    second = cluster.help()
    cluster.wait_for_helpers(2)
    cluster.luigid.send_signal(how)
    cluster.luigid.wait(HANG_S)
    cluster.gate.unlink()  # the stage ends while there is nobody to be told
    wait_for(lambda: len(cluster.workspace.packs(HELD)) >= 4, "the stage")
    cluster.start_luigid()
    assert [first.ends(), second.ends()] == [0, 0], first.output + second.output
    if how == signal.SIGKILL:  # luigid did not keep what it knew
        # The first to ask it again may also register what the other needs.
        assert "joining again" in first.output + second.output
    expected.check(cluster.workspace)


@pytest.mark.slow
@pytest.mark.parametrize("send", [os.kill, os.killpg])  # the latter as Slurm does
def test_a_worker_that_is_asked_to_leave_finishes_its_stage(cluster: Cluster, send: Any) -> None:
    helper = cluster.help(holds=True)
    held = cluster.wait_for_hold()
    send(helper.process.pid, signal.SIGUSR1)
    cluster.gate.unlink()
    assert helper.ends() == 25
    assert helper.done()[HELD, part_of(held)] == 1
    assert "sent away" in helper.output
    assert {each["status"] for each in cluster.tasks("Manifest")} == {"PENDING"}


@pytest.mark.slow
def test_a_worker_that_is_interrupted_says_so(cluster: Cluster) -> None:
    helper = cluster.help(holds=True)
    cluster.wait_for_hold()
    helper.process.send_signal(signal.SIGINT)
    assert helper.ends() == 130
    assert "stopped. What was finished stays" in helper.output
    assert "Traceback" not in helper.output


@pytest.mark.slow
def test_stages_that_cannot_be_made_end_all_workers(cluster: Cluster) -> None:
    workspace = cluster.workspace
    workspace.configure("build", max_reject_share=0)
    sorted((workspace.data / "AP-10K" / "data").iterdir())[0].write_bytes(b"no image")
    workspace.annotation_path("humanart", "train").unlink()
    helpers = [cluster.help(), cluster.help()]
    codes = {each.ends() for each in helpers}
    assert codes == {30}, "\n".join(each.output for each in helpers)
    for each in helpers:
        says = [json.loads(line)["message"] for line in each.output.splitlines() if line.startswith("{")]
        (last,) = (line for line in says if line.startswith("BuildDataset cannot be built"))
        assert re.search(r"^Images\(dataset=ap10k.*max_reject_share = 0 allows", last, re.MULTILINE)
        assert re.search(r"^AnnotationFile\(dataset=humanart.*does not exist", last, re.MULTILINE)
        assert "Traceback" not in last
    assert {each["name"] for each in cluster.tasks() if each["status"] == "DISABLED"} == {
        "Images",
        "AnnotationFile",
    }


def test_every_setting_for_clusters_is_one_of_luigis() -> None:
    from luigi.interface import core
    from luigi.scheduler import scheduler
    from luigi.worker import worker

    settings = cluster_settings()
    assert settings.keys() == {"core", "scheduler", "resources", "worker"}
    for section in (core, scheduler, worker):
        assert settings[section.__name__].keys() <= {*dict(section.get_params())}


def task_ids(workspace: Workspace) -> set[str]:
    """What luigid would call everything that a build looks at."""
    from conftest import _luigi_settings

    with _luigi_settings(workspace.settings_file()):
        import pipelines

        found: set[str] = set()
        waiting: list[luigi.Task] = [pipelines.BuildDataset()]
        while waiting:
            task = waiting.pop()
            found.add(task.task_id)
            waiting += task.requires()
    return found


def test_machines_agree_on_tasks_where_they_make_the_same_thing(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.configure("build", conditions=["spatext", "mask", "depth", "masked_depth"])
    here = task_ids(workspace)
    assert len(here) == 11
    monkeypatch.chdir(tmp_path)
    workspace.configure("executor", workers=7, device="cpu")
    workspace.configure("depth", batch_size=3)
    workspace.configure("paths", cache=tmp_path / "cache", weights=tmp_path)
    workspace.configure("log", format="json")
    assert task_ids(workspace) == here


@pytest.mark.parametrize("what", ["style", "weights", "store", "folder"])
def test_builds_of_different_things_share_no_task(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "folder":
        workspace.configure("paths", store="store")
    here = task_ids(workspace)
    if what == "style":
        workspace.configure("openpose", style="coco")
    elif what == "weights":
        workspace.configure("mask", weights=tmp_path / "other.pth")
    elif what == "store":
        workspace.configure("paths", store=tmp_path / "other")
    else:  # the same words, but another place
        monkeypatch.chdir(tmp_path)
    assert not task_ids(workspace) & here


def test_join_without_luigid_says_so(workspace: Workspace) -> None:
    with contextlib.closing(Cluster(workspace)) as cluster:
        workspace.configure("core", rpc_retry_attempts=1)
        cluster.luigid.kill()
        cluster.luigid.wait()
        helpers = [cluster.help(), cluster.help("--local-scheduler")]
        assert helpers[0].ends() == 40
        assert f"luigid does not answer at http://127.0.0.1:{cluster.port}/: " in helpers[0].output
        assert helpers[1].ends() == 35
        assert "leave it out" in helpers[1].output
        for each in helpers:
            assert "Traceback" not in each.output


def test_join_refuses_what_is_no_target() -> None:
    from typer.testing import CliRunner

    from pipelines.cli.main import app

    for arguments in (["NoSuch"], ["BuildDataset", "--dataset", "no-such"]):
        result = CliRunner().invoke(app, ["join", *arguments])
        assert result.exit_code == 2, result.output
        assert arguments[-1] in result.output


def test_a_scheduler_that_is_away_neither_holds_up_nor_fails_a_stage() -> None:
    from tasks.execution.progress import progress

    back = threading.Event()
    told: list[int] = []

    def away(percentage: int) -> None:
        told.append(percentage)
        back.wait(HANG_S)
        raise OSError("no scheduler")

    started = time.monotonic()
    with progress("stage", 4, away) as advance:
        for _ in range(4):
            advance(1)
    assert time.monotonic() - started < HANG_S / 2
    back.set()
    wait_for(lambda: told == [25, 50, 75, 100], "all percentages")


@pytest.mark.slow
@pytest.mark.skipif("SPCTRL_KILLS" not in os.environ, reason="takes 5 s a kill: SPCTRL_KILLS=20 asks for 20")
def test_workers_killed_at_any_moment_are_replaced(
    make_workspace: Callable[..., Workspace], sample: Path, expected: Expected
) -> None:
    rng = random.Random(os.environ.get("SPCTRL_SEED", "0"))
    wanted, killed, in_a_stage = int(os.environ["SPCTRL_KILLS"]), 0, 0
    while killed < wanted:
        workspace: Workspace = make_workspace(f"round-{killed}", sample)
        workspace.configure("build", datasets=["ap10k", "humanart"], splits=["train"])
        with contextlib.closing(Cluster(workspace, worker_disconnect_delay=SILENCE_S)) as cluster:
            cluster.ask("pause")
            helpers = [cluster.help(pace_s=0.2) for _ in range(3)]
            cluster.wait_for_helpers(3)
            cluster.ask("unpause")
            started = time.monotonic()
            moments = sorted(rng.uniform(0, 3) for _ in range(2))
            for moment_s, victim in zip(moments, rng.sample(helpers, 2), strict=True):
                time.sleep(max(started + moment_s - time.monotonic(), 0))
                running = [
                    str(each["worker_running"]) for each in cluster.tasks() if each["status"] == "RUNNING"
                ]
                victim.process.kill()
                if victim.process.wait(HANG_S) == -signal.SIGKILL:
                    killed += 1
                    in_a_stage += any(f"pid={victim.process.pid})" in each for each in running)
            codes = [each.ends() for each in helpers]
            assert {*codes} <= {0, -signal.SIGKILL}, "\n".join(each.output for each in helpers)
            assert 0 in codes
            expected.check(workspace)
    print(f"{killed} workers killed, {in_a_stage} of them in a stage")
