"""What a build tells others while it runs: JSON lines, Luigi's Prometheus metrics, ``spctrl status --watch``."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace
from processes import HANG_S

from tasks.execution.logs import JsonLines

STAGES = {"index", "images", "spatext", "openpose", "manifest", "export", "report"}


def parsed(output: str) -> list[dict[str, Any]]:
    """JSON objects of all lines; a line that is none fails the test."""
    return [json.loads(line) for line in output.splitlines()]


# Log lines


def formatted(message: str, *arguments: object, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    record = logging.LogRecord("name", logging.WARNING, __file__, 1, message, arguments, None)
    if facts is not None:
        record.facts = facts
    line = JsonLines().format(record)
    assert "\n" not in line
    found: dict[str, Any] = json.loads(line)
    return found


def test_a_line_says_when_who_and_what() -> None:
    found = formatted("%d of %s", 3, "x")
    assert found.keys() == {"time", "level", "logger", "pid", "message"}
    assert (found["level"], found["logger"], found["message"]) == ("WARNING", "name", "3 of x")
    assert found["pid"] == os.getpid()
    moment = datetime.fromisoformat(found["time"])
    assert moment.utcoffset() == timedelta(0)
    assert abs(moment.timestamp() - time.time()) < 60


@pytest.mark.parametrize(
    "text", ["two\nlines", '{"level": "INFO"}', "\x1b[31mred", "鹿", "\ud800", "\r\u2028\x00"]
)
def test_no_text_can_pass_for_another_line(text: str) -> None:
    assert formatted("%s", text)["message"] == text


def test_facts_are_fields_and_what_json_lacks_is_text() -> None:
    found = formatted("x", facts={"done": 3, "folder": Path("a")})
    assert (found["done"], found["folder"]) == (3, "a")


def test_an_exception_is_a_field() -> None:
    try:
        raise RuntimeError("why")
    except RuntimeError:
        record = logging.LogRecord("n", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    found = json.loads(JsonLines().format(record))
    assert found["message"] == "failed"
    assert found["exception"].endswith("RuntimeError: why")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_build_logs_json_lines_only(workspace: Workspace, workers: str) -> None:
    build = workspace.run("--log-format", "json", "--workers", workers)
    assert build.exit_code == 0
    lines = parsed(build.output)
    done = {line["stage"]: line for line in lines if line["message"] == "stage done"}
    assert set(done) == STAGES
    assert done["spatext"]["part"] == "ap10k-train"
    assert done["spatext"]["counts"] == {"records": 8, "made": 8, "artifacts": 8, "rejected": 0}
    assert done["spatext"]["duration_s"] >= 0
    (built,) = (line for line in lines if line["message"] == "built")
    assert (built["dataset"], built["split"], built["made"]) == ("ap10k", "train", 8)
    assert any("This progress looks :)" in line["message"] for line in lines)


def test_a_failure_is_one_line_that_explains_itself(workspace: Workspace) -> None:
    path = workspace.annotation_path("ap10k", "train")
    path.write_text("no\nJSON")
    build = workspace.run("--log-format", "json")
    assert build.exit_code == 30
    errors = [line for line in parsed(build.output) if line["level"] == "ERROR"]
    assert any(str(path) in line["message"] and "exception" not in line for line in errors)


def test_how_lines_look_is_no_ingredient(workspace: Workspace) -> None:
    assert workspace.build().succeeded
    workspace.configure("log", format="json")
    again = workspace.run()
    assert (again.exit_code, again.committed) == (0, {})
    assert parsed(again.output)


def test_progress_is_lines_too(workspace: Workspace) -> None:
    script = (
        "import tasks.execution.progress as p, tasks.execution.logs as l, logging; p.LINE_EVERY_S = 0\n"
        "l.LOGGER.addHandler(logging.StreamHandler()); l.LOGGER.setLevel('INFO')\n"
        "with p.progress('spatext ap10k-train', 4, None) as advance:\n"
        "    advance(1); advance(1, 'note')\n"
    )
    workspace.configure("log", format="json")
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={
            **os.environ,
            "PYTHONPATH": str(workspace.code),
            "LUIGI_CONFIG_PATH": str(workspace.settings_file()),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = parsed(done.stderr)
    assert (first["message"], first["what"], first["done"], first["total"], first["left_s"]) == (
        "progress",
        "spatext ap10k-train",
        1,
        4,
        None,
    )
    assert (second["done"], second["note"]) == (2, "note")
    assert second["left_s"] >= 0


# Metrics


@contextlib.contextmanager
def luigid(workspace: Workspace) -> Iterator[str]:
    """A scheduler of its own on this machine; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "import luigi.cmdline; luigi.cmdline.luigid()"]
    process = subprocess.Popen(
        [*command, "--address", "127.0.0.1", "--port", str(port)],
        cwd=workspace.folder,
        env={**os.environ, "LUIGI_CONFIG_PATH": str(workspace.settings_file())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + HANG_S
        while True:
            try:
                fetch(f"{address}/api/graph")
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                assert process.poll() is None, "luigid ended"
                assert time.monotonic() < end, "luigid does not answer"
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(HANG_S)


def fetch(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=HANG_S) as answer:
        text: str = answer.read().decode()
    return text


def test_the_scheduler_gives_prometheus_metrics_of_a_build(workspace: Workspace) -> None:
    pytest.importorskip("prometheus_client")
    workspace.configure("scheduler", metrics_collector="prometheus")
    luigi = [sys.executable, "-m", "luigi"]
    with luigid(workspace) as address:
        process = subprocess.run(
            [*luigi, "--module", "pipelines", "BuildDataset", "--scheduler-url", address],
            cwd=workspace.folder,
            env={
                **os.environ,
                "PYTHONPATH": str(workspace.code),
                "LUIGI_CONFIG_PATH": str(workspace.settings_file()),
                "NO_PROXY": "127.0.0.1",
            },
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        found = fetch(f"{address}/metrics")
    for family in ("Index", "Images", "Spatext", "Openpose", "Manifest", "Export", "Report", "BuildDataset"):
        assert f'luigi_task_done_total{{family="{family}"}} 1.0' in found
        assert f'luigi_task_execution_time_seconds{{family="{family}"}}' in found
    assert "luigi_task_failed_total{" not in found


# spctrl status --watch


class Terminal:
    """A command that runs in a terminal."""

    def __init__(self, workspace: Workspace, *arguments: str) -> None:
        ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "spctrl", *arguments],
            cwd=workspace.folder,
            env={**workspace.environment(), "COLUMNS": "160", "LINES": "60", "TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._ours = ours
        self.shown = ""

    def wait_for(self, text: str) -> None:
        """Read until the text is shown."""
        start, end = len(self.shown), time.monotonic() + HANG_S
        while text not in self.shown[start:]:
            assert time.monotonic() < end, self.shown
            assert self._read(0.2) or self.process.poll() is None, self.shown

    def interrupt(self) -> int:
        """Ctrl-C; gives the exit code."""
        self.process.send_signal(signal.SIGINT)
        end = time.monotonic() + HANG_S
        while self._read(5):
            assert time.monotonic() < end, (
                "Ctrl-C was ignored, as by jobs that a script starts in the background"
            )
        return self.process.wait(HANG_S)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._ours], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # the command ended
            return False
        self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data.decode(errors="replace"))
        return bool(data)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_watch_follows_a_build_and_ends_with_an_interrupt(workspace: Workspace) -> None:
    with contextlib.closing(Terminal(workspace, "status", "--watch", "--every-s", "0.1")) as terminal:
        terminal.wait_for("never built")
        assert workspace.build().succeeded
        terminal.wait_for("Everything is up to date.")
        with workspace.edit_annotations("ap10k", "train") as content:
            content["annotations"][0]["keypoints"][0] += 1
        terminal.wait_for("index runs first")
        assert terminal.interrupt() == 0
    assert "Traceback" not in terminal.shown
    assert "Aborted" not in terminal.shown
