"""The GPU check, on the CPU in tiny sizes: every step runs, budgets hold, and no result is lost."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from processes import HANG_S

torch = pytest.importorskip("torch", reason="the models extra is not installed")
pytest.importorskip("accelerate", reason="the train extra is not installed")
pytest.importorskip("torch_fidelity", reason="the eval extra is not installed")

from benchmarks.gpu import runner, wheels  # noqa: E402
from benchmarks.gpu.measure import Measurements, append_line  # noqa: E402
from benchmarks.gpu.steps import STEPS, correctness  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
NO_INDEX = re.compile("NewConnectionError|NameResolutionError|Max retries|Network is unreachable")


def check(out: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", "--out", str(out), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    return finished, json.loads((out / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("step", [step.name for step in STEPS])
def test_every_step_runs(step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dry-run", "--out", str(tmp_path), "--only", step, "--budget", str(HANG_S)]
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        code = runner.main(options)
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
    output = capsys.readouterr().out
    assert code == 0, output
    lines = json.loads((tmp_path / "results.json").read_text())
    (status,) = (line for line in lines if line["kind"] == "step")
    assert status["status"] == "done"
    measured = [line for line in lines if line["kind"] in ("result", "target")]
    assert measured and {line["step"] for line in measured} == {step}
    assert all(line["met"] for line in measured if line["kind"] == "target"), "these are of correctness alone"
    assert measured[0]["case"] in " ".join(output.replace("│", " ").split())


@pytest.mark.slow
def test_steps_that_do_not_fit_are_skipped(tmp_path: Path) -> None:
    finished, lines = check(tmp_path, "--budget", "1")
    assert finished.returncode == 0
    assert [line["step"] for line in lines[1:]] == [step.name for step in STEPS]
    assert {line["status"] for line in lines[1:]} == {"skipped"}
    assert {"torch", "diffusers", "transformers"} <= set(lines[0]["versions"])


def test_a_step_is_ended_at_its_limit(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    append_line(results, {"kind": "result"})
    start = time.monotonic()
    status = runner.run_step(STEPS[0], results, tmp_path / "log.txt", 0.5, dry_run=True)
    assert status.status == "ended"
    assert time.monotonic() - start < HANG_S
    assert results.read_text() == '{"kind": "result"}\n'
    assert not running_steps(tmp_path)


def test_a_step_that_fails_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unknown = replace(STEPS[0], name="unknown")
    status = runner.run_step(unknown, tmp_path / "results.jsonl", tmp_path / "log.txt", HANG_S, dry_run=True)
    assert status[:2] == ("failed", "exit code 2")
    assert "invalid choice: 'unknown'" in capsys.readouterr().out
    assert "invalid choice: 'unknown'" in (tmp_path / "log.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--out", str(tmp_path / "out")]) == 2
    assert "expected a GPU, found none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--only", "masks,unknown"], ["--onl", "masks"], ["--budget", "soon"]])
def test_options_that_cannot_be(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        runner.main(["--out", str(tmp_path / "out"), *options])
    assert "usage:" in capsys.readouterr().err


def test_a_stage_beyond_its_tolerance_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stages(_: Path, *, small: bool) -> Iterator[correctness.Stage]:
        outputs = iter([1.0, 1.001, 1.0, 1.1, 1.0, math.nan])
        for name in ("near", "far", "broken"):
            yield correctness.Stage(name, lambda *_: torch.tensor([next(outputs)]))

    monkeypatch.setattr(correctness, "STAGES", (stages,))
    measurements = Measurements("correctness", tmp_path / "results.jsonl", torch.device("cpu"), True)
    with pytest.raises(RuntimeError, match=r"found others: far, float32; broken, float32$"):
        correctness.run(measurements)
    lines = [json.loads(line) for line in measurements.path.read_text().splitlines()]
    assert [(line["case"], line["met"]) for line in lines] == [
        ("near, float32", True),
        ("far, float32", False),
        ("broken, float32", False),
    ]


def test_a_check_that_is_ended_keeps_its_results_and_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + HANG_S
    while not running_steps(tmp_path) and time.monotonic() < end:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(HANG_S) == 128 + signal.SIGTERM
    assert not running_steps(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())[0]["kind"] == "machine"


def running_steps(out: Path) -> list[str]:
    """Commands of processes that write into a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # a process that has ended meanwhile
            found.append(entry.read_text())
    return [each for each in found if str(out / "results.jsonl") in each]


@pytest.mark.parametrize(("found", "met"), [(1.9, False), (2.0, True), (float("nan"), False)])
def test_targets(found: float, met: bool, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for small in (False, True):
        measurements = Measurements("masks", path, torch.device("cpu"), small)
        measurements.target("kept always", found, at_least=2)
        measurements.target("kept always", -found, at_most=-2)
        measurements.speed_target("not of a dry run", found, at_least=2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["case"] for line in lines] == [
        *["kept always"] * 2,
        "not of a dry run",
        *["kept always"] * 2,
    ]
    assert {line["met"] for line in lines} == {met}


# Wheels for a machine without a network


@pytest.mark.slow
def test_wheels_fit_and_are_complete(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.wheels", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        env={**os.environ, "PIP_RETRIES": "1"},
        check=False,
    )
    if finished.returncode and NO_INDEX.search(finished.stderr):
        pytest.skip("no package index can be reached")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    wanted = [line for line in wheels.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    found = re.search(r"^(\d+) wheels for Python 3.12: \d+\.\d MB; source tree: \d+\.\d MB$", finished.stdout)
    assert found and int(found[1]) == len(wanted)


def test_packages_that_are_missing(tmp_path: Path) -> None:
    needs = [
        "numpy",
        "nowhere>=2",
        'old; python_version < "3.9"',
        'more; extra == "all"',
        "Some_Name",
        'win; sys_platform == "win32"',
    ]
    for name, required in {"one": needs, "some-name": []}.items():
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            lines = [f"Name: {name}", *(f"Requires-Dist: {each}" for each in required)]
            wheel.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines))
    assert wheels.missing_packages(sorted(tmp_path.glob("*.whl"))) == ["nowhere"]
