"""One worker process for each device of this machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from processes import HANG_S

pytest.importorskip("torch", reason="the models extra is not installed")

from spctrl.errors import ExpectedError
from tasks.execution.devices import devices_of_workers, first_device
from tasks.execution.executor import run_jobs


@pytest.mark.parametrize(
    ("setting", "visible", "expected"),
    [
        ("auto", None, ["0", "1", "2"]),
        ("cuda:2", None, ["2"]),
        ("cuda:2,0", None, ["2", "0"]),
        ("auto", "4,7, 9", ["4", "7", "9"]),
        ("cuda:1,2", "GPU-a1,GPU-b2,GPU-c3", ["GPU-b2", "GPU-c3"]),
    ],
)
def test_a_worker_sees_its_own_gpu_alone(
    setting: str, visible: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = devices_of_workers(setting)
    assert found.device == "cuda:0"
    assert found.environments == [{"CUDA_VISIBLE_DEVICES": each} for each in expected]


def test_stages_on_one_device_use_the_first() -> None:
    settings = ["auto", "cpu", "cuda:3", "cuda:2,0"]
    assert [first_device(each) for each in settings] == ["auto", "cpu", "cuda:3", "cuda:2"]


@pytest.mark.parametrize("setting", ["auto", "cpu"])
def test_one_worker_without_a_gpu(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert devices_of_workers(setting) == ("cpu", [{}])


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(
        ExpectedError, match=r"^\[executor\] device: expected a device among auto, cpu, cuda:0, found"
    ):
        devices_of_workers("cuda:0,1")


def meet(folder: Path) -> str:
    """The GPU of this worker, when as many workers have come as there are to be."""
    own = os.environ["CUDA_VISIBLE_DEVICES"]
    (folder / own).touch()
    end = time.monotonic() + HANG_S
    while len(list(folder.iterdir())) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    return own


def test_every_worker_has_an_environment_of_its_own(tmp_path: Path) -> None:
    environments = [{"CUDA_VISIBLE_DEVICES": each} for each in ("5", "0", "GPU-c3")]
    jobs = [tmp_path] * 12
    found = list(run_jobs(meet, jobs, 3, start_method="spawn", environments=environments))
    assert len(found) == 12
    assert set(found) == {"5", "0", "GPU-c3"}
    assert os.environ.get("CUDA_VISIBLE_DEVICES") not in found
