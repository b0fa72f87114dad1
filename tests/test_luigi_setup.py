"""When the set-up of Luigi's command is made: in the commands, and on request, but not by an import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from processes import HANG_S

STATE = """
import json, logging, signal, sys
import luigi
from luigi.cmdline_parser import CmdlineParser
from luigi import interface

def state():
    return {
        "excepthook": sys.excepthook is not sys.__excepthook__,
        "filters": len(logging.getLogger("luigi-interface").filters),
        "signals": signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "streams": sys.stdout.errors,
        "retcode": luigi.configuration.get_config().has_option("retcode", "task_failed"),
        "options": CmdlineParser._build_parser.__module__,
        "scheduler": interface._WorkerSchedulerFactory.__module__,
    }
"""


def states(tmp_path: Path, *lines: str, settings: str = "") -> Any:
    """What a process that runs some lines prints as JSON; it works in a folder with a settings file."""
    (tmp_path / "luigi.cfg").write_text(settings)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([STATE, *lines])],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", ["pipelines", "pipelines.cli.main", "pipelines.luigi_setup.messages"])
@pytest.mark.parametrize("settings", ["", "[spatxt]\nkeypoint_radius_px = 3\n"])
def test_an_import_changes_nothing(tmp_path: Path, module: str, settings: str) -> None:
    before, after = states(
        tmp_path,
        "before = state()",
        f"import {module}",
        "print(json.dumps([before, state()]))",
        settings=settings,
    )
    assert before == after


def test_a_build_of_a_program_needs_no_set_up(tmp_path: Path, sample: Path) -> None:
    settings = f"[paths]\ndata = {sample}\n[build]\ndatasets = ap10k\nsplits = val\nconditions = spatext\n"
    before, after, succeeded = states(
        tmp_path,
        "from pipelines import BuildDataset",
        "before = state()",
        "succeeded = luigi.build([BuildDataset()], local_scheduler=True, log_level='ERROR')",
        "print(json.dumps([before, state(), succeeded]))",
        settings=settings,
    )
    assert before == after
    assert succeeded
    assert (tmp_path / "exports" / "report.html").exists()


def test_luigis_command_sets_itself_up_when_it_imports_the_targets(tmp_path: Path) -> None:
    found = states(tmp_path, "import luigi.cmdline", "import pipelines", "print(json.dumps(state()))")
    assert found == {
        "excepthook": True,
        "filters": 1,
        "signals": True,
        "streams": "backslashreplace",
        "retcode": True,
        "options": "pipelines.luigi_setup.options",
        "scheduler": "pipelines.luigi_setup.scheduler",
    }


def test_a_program_can_ask_for_the_set_up_and_a_second_time(tmp_path: Path) -> None:
    first, second = states(
        tmp_path,
        "from pipelines import luigi_setup",
        "luigi_setup.configure()",
        "first = state()",
        "luigi_setup.configure()",
        "print(json.dumps([first, state()]))",
    )
    assert first == second
    assert (first["excepthook"], first["filters"], first["signals"]) == (True, 1, False)


def test_a_program_s_own_excepthook_shows_what_does_not_explain_itself(tmp_path: Path) -> None:
    shown = states(
        tmp_path,
        "from pipelines import luigi_setup",
        "shown = []",
        "sys.excepthook = lambda kind, error, trace: shown.append(str(error))",
        "luigi_setup.configure()",
        "ours = sys.excepthook",
        "sys.excepthook = lambda *facts: ours(*facts)",  # as a collector of errors does
        "luigi_setup.configure()",
        "sys.excepthook(ValueError, ValueError('unexpected'), None)",
        "from spctrl.errors import ExpectedError",
        "sys.excepthook(ExpectedError, ExpectedError('explained'), None)",
        "print(json.dumps(shown))",
    )
    assert shown == ["unexpected"]


def test_a_user_s_own_return_codes_stay(tmp_path: Path) -> None:
    lines = ["from pipelines import luigi_setup", "luigi_setup.configure()"]
    code = "print(json.dumps(luigi.configuration.get_config().get('retcode', 'task_failed')))"
    assert states(tmp_path, *lines, code, settings="[retcode]\ntask_failed = 7\n") == "7"
    assert states(tmp_path, *lines, code) == "30"


@pytest.mark.parametrize(("arguments", "expected"), [(["--version"], 0), (["status"], 1)])
def test_the_version_needs_no_valid_settings(tmp_path: Path, arguments: list[str], expected: int) -> None:
    (tmp_path / "luigi.cfg").write_text("[spatxt]\nkeypoint_radius_px = 3\n")
    done = subprocess.run(
        [sys.executable, "-m", "spctrl", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert done.returncode == expected, done.stderr
    assert ("expected [spatext]" in done.stderr) is bool(expected)
    assert "Traceback" not in done.stderr
