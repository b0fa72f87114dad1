"""The ``luigi`` command as typed: it builds on this machine, asks luigid only where told to, guesses no option."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import luigi
import pytest
from luigi.cmdline_parser import CmdlineParser
from luigi.interface import core
from processes import HANG_S

import pipelines
from pipelines import luigi_setup
from pipelines.luigi_setup.scheduler import ANSWER_TIMEOUT_S, fault_at

TARGETS = tuple(pipelines.__all__)

# The command, which ends at once where it connects to anything over a network.
OFFLINE = """
import os, sys

def refuse(event, arguments):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
        os.write(2, f"{event} {arguments}".encode())
        os._exit(99)

sys.addaudithook(refuse)
from luigi.cmdline import luigi_run
luigi_run(sys.argv[1:])
"""


@contextlib.contextmanager
def settings(tmp_path: Path, **values: object) -> Iterator[None]:
    """Luigi with nothing but these settings of [core]."""
    from conftest import _luigi_settings

    path = tmp_path / "core.cfg"
    path.write_text("\n".join(["[core]", *(f"{name} = {value}" for name, value in values.items())]))
    with _luigi_settings(path):
        yield


def environment(config: Path | None = None) -> dict[str, str]:
    from conftest import REPOSITORY

    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LUIGI")}
    given = {"LUIGI_CONFIG_PATH": str(config)} if config else {}
    return {**inherited, **given, "PYTHONPATH": str(REPOSITORY), "NO_PROXY": "*"}


def run(
    folder: Path, *arguments: str, config: Path | None = None, script: str = OFFLINE
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, "--module", "pipelines", *arguments],
        cwd=folder,
        env=environment(config),
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )


ONLINE = "import sys; from luigi.cmdline import luigi_run; luigi_run(sys.argv[1:])"


@pytest.fixture
def closed_port() -> int:
    """A port of this machine at which nothing answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(autouse=True, scope="module")
def _set_up_as_in_the_command() -> None:
    luigi_setup.configure()


# Which scheduler


@pytest.mark.slow
def test_the_bare_command_builds_in_a_folder_without_settings(sample: Path, tmp_path: Path) -> None:
    shutil.copytree(sample, tmp_path / "data")
    done = run(tmp_path, "BuildDataset")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "exports" / "report.html").is_file()
    again = run(tmp_path, "BuildDataset", "--local-scheduler")
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_an_explicit_local_scheduler_needs_no_luigid(sample: Path, tmp_path: Path, closed_port: int) -> None:
    shutil.copytree(sample, tmp_path / "data")
    config = tmp_path / "mine.cfg"
    config.write_text(
        f"[core]\nlocal_scheduler = true\nscheduler_host = 127.0.0.1\nscheduler_port = {closed_port}\n"
    )
    done = run(tmp_path, "BuildDataset", "--split", "val", config=config)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("values", "arguments", "is_local"),
    [
        ({}, [], True),
        ({}, ["--local-scheduler"], True),
        ({"log_level": "INFO"}, [], True),
        ({"local_scheduler": "false"}, [], False),
        ({"local_scheduler": "false"}, ["--local-scheduler"], True),
        ({"scheduler_host": "localhost"}, [], False),
        ({"scheduler-host": "localhost"}, [], False),
        ({"default-scheduler-host": "localhost"}, [], False),
        ({"scheduler_port": 8082}, [], False),
        ({"scheduler_url": "http://localhost:8082"}, [], False),
        ({"scheduler_host": "localhost"}, ["--local-scheduler"], True),
        ({"scheduler_host": "localhost", "local_scheduler": "true"}, [], True),
        ({}, ["--scheduler-host", "localhost"], False),
        ({}, ["--scheduler-host=localhost"], False),
        ({}, ["--scheduler-port", "8082"], False),
        ({}, ["--scheduler-url=http://localhost:8082"], False),
        ({}, ["--scheduler-url=http://localhost:8082", "--local-scheduler"], True),
    ],
)
def test_luigid_is_asked_only_where_something_says_so(
    tmp_path: Path, target: str, values: dict[str, object], arguments: list[str], is_local: bool
) -> None:
    with settings(tmp_path, **values), CmdlineParser.global_instance([target, *arguments]):
        assert core().local_scheduler is is_local


def test_luigi_build_of_a_notebook_is_as_luigi_has_it(tmp_path: Path) -> None:
    with settings(tmp_path):
        assert core().local_scheduler is False
        assert core(local_scheduler=True).local_scheduler is True
        assert core(scheduler_host="there").local_scheduler is False


@pytest.mark.parametrize("how", ["cluster.cfg", "old cluster.cfg", "option", "option=", "url"])
def test_a_luigid_that_does_not_answer_is_one_line(tmp_path: Path, closed_port: int, how: str) -> None:
    from conftest import REPOSITORY

    text = (REPOSITORY / "configs" / "cluster.cfg").read_text().replace("8082", str(closed_port))
    arguments, address = [], f"localhost:{closed_port}"
    if how == "old cluster.cfg":
        text = text.replace("local_scheduler = false\n", "")
    elif how != "cluster.cfg":
        text, address = "", f"127.0.0.1:{closed_port}"
        arguments = {
            "option": ["--scheduler-host", "127.0.0.1", "--scheduler-port", str(closed_port)],
            "option=": ["--scheduler-host=127.0.0.1", f"--scheduler-port={closed_port}"],
            "url": ["--scheduler-url", f"http://{address}/"],
        }[how]
    config = tmp_path / "cluster.cfg"
    config.write_text(f"{text}\n[retcode]\nunhandled_exception = 7\n")
    done = run(tmp_path, "BuildDataset", *arguments, config=config, script=ONLINE)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"ERROR: expected luigid at http://{address}/, found none: Connection refused. ")
    assert "Start it there, or remove scheduler_host" in line
    assert done.returncode == 7
    assert not done.stdout
    assert not (tmp_path / "store").exists()


def test_what_answers_but_is_no_luigid_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *arguments: Any) -> None:
            pass

    monkeypatch.setenv("NO_PROXY", "*")
    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fault = fault_at(f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()
    assert fault == "something answers there that is not luigid"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        fault = fault_at(f"http://127.0.0.1:{silent.getsockname()[1]}/")
    assert fault == f"no answer within {ANSWER_TIMEOUT_S:g} s"


@pytest.mark.parametrize(
    ("values", "arguments", "expected"),
    [
        ({}, [], {"local_scheduler": False}),
        ({"scheduler_host": "there"}, [], {"local_scheduler": False}),
        ({"local_scheduler": "false"}, [], {}),
        ({"local_scheduler": "true"}, [], {}),
        ({}, ["--local-scheduler"], {}),
    ],
)
def test_join_asks_luigid_also_where_nothing_says_where_it_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, object],
    arguments: list[str],
    expected: dict[str, bool],
) -> None:
    from typer.testing import CliRunner

    from pipelines.cli import cluster
    from pipelines.cli.main import app
    from spctrl.errors import ExpectedError

    asked: list[dict[str, Any]] = []

    def build(tasks: list[luigi.Task], worker_scheduler_factory: Any, **given: Any) -> None:
        asked.append(given)
        raise ExpectedError("enough")

    monkeypatch.setattr(cluster.luigi, "build", build)
    with settings(tmp_path, **values):
        CliRunner().invoke(app, ["join", "BuildDataset", *arguments])
    assert asked == [expected]


# Options


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_, CmdlineParser.global_instance(list(arguments)):
        pass
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "found", "nearest"),
    [
        (["BuildDataset", "--condition", "spatext"], "--condition", "--conditions"),
        (["BuildDataset", "--condition=spatext"], "--condition", "--conditions"),
        (["BuildDataset", "--data", "ap10k"], "--data", "--dataset"),
        (["BuildDataset", "--executor-worker", "2"], "--executor-worker", "--executor-workers"),
        (["BuildDataset", "--local-sched"], "--local-sched", "--local-scheduler"),
        (["BuildDataset", "--scheduler-hos=there"], "--scheduler-hos", "--scheduler-host"),
        (["BuildDataset", "--max-reject", "0"], "--max-reject", "--max-reject-share"),
        *((([each, "--conf", "x.yaml"]), "--conf", "--config") for each in TARGETS if each != "BuildDataset"),
    ],
)
def test_an_abbreviation_is_refused_with_the_nearest_option(
    capsys: pytest.CaptureFixture[str], arguments: list[str], found: str, nearest: str
) -> None:
    line = refusal(capsys, *arguments)
    assert line == (
        f"ERROR: expected an option of {arguments[0]}, found {found}. Did you mean {nearest}? "
        f"`luigi --module pipelines {arguments[0]} --help` lists them"
    )


def test_other_faults_of_the_command_line_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean" not in refusal(capsys, "BuildDataset", "--qqqqqq")
    assert "found -x" in refusal(capsys, "BuildDataset", "-x")
    assert "expected one argument" in refusal(capsys, "BuildDataset", "--dataset")
    assert "Generate" in refusal(capsys, "BuildDataset", "Generate")
    assert "found --paths-stor. Did you mean --paths-store?" in refusal(
        capsys, "--paths-stor", "x", "BuildDataset"
    )
    assert "found Benchmrk. Did you mean Benchmark?" in refusal(capsys, "Benchmrk", "--config", "x")
    assert "Kid" not in refusal(capsys, "BuildDataset", "--build-max-reject-share=2"), (
        "no option of other tasks"
    )
    for arguments in (("--dataset", "ap10k", "BuildDataset"), ("ap10k", "--dataset", "x")):
        assert "expected a target before its options, found ap10k" in refusal(capsys, *arguments)


def test_full_names_are_read_as_before() -> None:
    arguments = ["--split=val", "--executor-workers", "3", "--no-lock", "--conditions", "mask,depth"]
    with CmdlineParser.global_instance(["--workers", "2", "BuildDataset", *arguments]) as parser:
        task = parser.get_task_obj()
        assert (task.split, task.conditions) == (("val",), ("mask", "depth"))
        assert parser.known_args.executor_workers == "3"
        assert core().workers == 2
    with CmdlineParser.global_instance(["Generate", "--config", "x.yaml"]) as parser:
        assert parser.known_args.config == "x.yaml"


def test_the_command_and_join_refuse_alike(tmp_path: Path) -> None:
    done = run(tmp_path, "BuildDataset", "--condition", "spatext")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "found --condition. Did you mean --conditions?" in line
    joined = subprocess.run(
        [sys.executable, "-m", "spctrl", "join", "BuildDataset", "--condition", "spatext"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )
    assert (joined.returncode, joined.stderr) == (2, done.stderr)


@pytest.mark.parametrize("command", [["status"], ["gc", "--dry-run"]])
def test_spctrl_refuses_abbreviations_too(command: list[str]) -> None:
    from typer.testing import CliRunner

    from pipelines.cli.main import app

    result = CliRunner().invoke(app, [*command, "--condition", "spatext"])
    assert result.exit_code == 2
    assert "--condition" in result.output and "--conditions" in result.output
