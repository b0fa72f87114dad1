"""A disk that fails while a network is trained: one sentence, whole checkpoints, and a next run that continues."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import faults
import msgspec
import numpy as np
import pytest
from processes import HANG_S

torch = pytest.importorskip("torch", reason="the train extra is not installed")
pytest.importorskip("accelerate", reason="the train extra is not installed")

from test_training_loop import command_line, inputs, settings  # noqa: E402, F401 - a fixture

from spctrl.errors import ExpectedError  # noqa: E402
from spctrl.training.checkpoints import check_digests, checkpoints, write_checkpoint  # noqa: E402
from spctrl.training.config import TrainingConfig  # noqa: E402
from spctrl.training.loop import _explaining_workers  # noqa: E402
from spctrl.training.resumption import keep_history  # noqa: E402
from spctrl.training.watch import Watcher  # noqa: E402

if TYPE_CHECKING:
    from spctrl.training.loop import TrainingInputs

ROOT = Path(__file__).parents[1]
PAGE = 4096
CHOSEN: dict[str, Any] = {
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 1,
    "resume_from_checkpoint": "latest",
}


@pytest.fixture(scope="module")
def one_step(inputs: TrainingInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The folder of a training of one step."""
    folder = tmp_path_factory.mktemp("one_step")
    code, said = command_line(folder, inputs, "--output", str(folder / "run"), **CHOSEN, max_train_steps=1)
    assert code == 0, said
    return folder / "run"


@pytest.mark.parametrize(
    ("options", "reason", "room"),
    [
        ({"size": 64 * PAGE}, "No space left on device", True),
        ({"size": 0}, "No space left on device", False),
        ({"nr_inodes": 4}, "No space left on device", False),
        ({"ro": True}, "Read-only file system", False),
    ],
    ids=["checkpoint", "everything", "files", "read-only"],
)
def test_a_failing_disk_is_one_sentence_and_the_next_run_continues(
    inputs: TrainingInputs,  # noqa: F811
    one_step: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    reason: str,
    room: bool,
) -> None:
    """Where ``room`` says so, there is room again afterwards."""
    monkeypatch.setattr("spctrl.training.__main__._end_without_reader", lambda: None)
    output, two_steps = tmp_path / "disk" / "run", {**CHOSEN, "max_train_steps": 2}
    with faults.disk(tmp_path / "disk", size="512m") as disk:
        shutil.copytree(one_step, output)
        used = disk.used()
        disk.change(**{name: more if more is True else used[name] + more for name, more in options.items()})
        code, said = command_line(tmp_path, inputs, f"--output={output}", "--json-progress", **two_steps)
        assert code == 1
        (error,) = [json.loads(line)["error"] for line in said.splitlines() if line.startswith('{"error"')]
        assert error in said.splitlines()
        assert "Traceback" not in said
        assert error.startswith(f"cannot write {output}")
        assert reason in error
        assert "Earlier checkpoints stay" in error
        (kept,) = checkpoints(output)
        check_digests(kept)
        if room:
            disk.change(size="512m")
            code, said = command_line(tmp_path, inputs, f"--output={output}", **two_steps)
            assert code == 0, said
            assert "continues after step 1" in said
            assert [path.name for path in checkpoints(output)] == ["checkpoint-00000002"]


def test_a_full_disk_under_validation_images_and_logs_is_named(tmp_path: Path) -> None:
    chosen = msgspec.convert(settings(), TrainingConfig)
    with faults.disk(tmp_path / "disk", size=PAGE * 2):
        output = tmp_path / "disk"
        watcher = Watcher(chosen, SimpleNamespace(), None, output, "run", lambda progress: None)  # type: ignore[arg-type]
        (output / "filler").write_bytes(bytes(2 * PAGE))
        with pytest.raises(ExpectedError, match=r"cannot write .*step-00000001: No space left .*make room"):
            watcher._keep_images(1, {7: np.zeros((64, 64, 3), np.float32)})
        report: Any = SimpleNamespace(step=1, losses={"loss": 1.0}, norms={}, rates={})
        with pytest.raises(ExpectedError, match=r"cannot write .*losses\.jsonl: No space left .*make room"):
            watcher._keep(report)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EIO, "Input/output error"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
)
def test_whatever_a_writer_raises_the_earlier_checkpoints_stay(error: Exception, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "state.pt").write_bytes(b"half")
        raise error

    write_checkpoint(tmp_path, 1, lambda folder: None, keep=1)
    with pytest.raises(
        ExpectedError, match=r"^cannot write .*checkpoint-00000002: .*Earlier checkpoints stay"
    ):
        write_checkpoint(tmp_path, 2, write, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"]


@pytest.mark.parametrize(
    "broken",
    [
        b"{}",
        b"[1]",
        b'{"step": "1"}',
        b'{"step": true}',
        b'{"step": 1',
        b"\xff",
        b"[" * 10**5,
        b"0" * 5000,
        b"\0\0",
    ],
)
def test_lines_of_losses_that_cannot_be_read_are_left_out(broken: bytes, tmp_path: Path) -> None:
    whole = [
        b'{"step": %d, "loss/loss": 0.5, "gradient_norm/control": Infinity}' % step for step in (1, 2, 3)
    ]
    path = tmp_path / "losses.jsonl"
    path.write_bytes(b"\n".join([whole[0], broken, *whole[1:], broken]))
    keep_history(path, 2)
    assert path.read_bytes() == b"".join(line + b"\n" for line in whole[:2])
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_error_of_a_disk_is_not_hidden(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        write_checkpoint(tmp_path, 1, write, keep=1)
    assert list(tmp_path.iterdir()) == []


class Broken(torch.utils.data.Dataset):  # type: ignore[misc, name-defined]
    """Fails in a loader's process."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        raise self.error


def batches(error: Exception) -> Iterator[dict[str, Any]]:
    loader = torch.utils.data.DataLoader(Broken(error), num_workers=1)
    return _explaining_workers(loader)


def test_full_shared_memory_of_a_loader_says_what_to_change() -> None:
    full = RuntimeError(
        "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
    )
    with pytest.raises(
        ExpectedError, match=r"^expected room in shared memory .*dataloader_num_workers"
    ) as caught:
        list(batches(full))
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="another"):
        list(batches(RuntimeError("another")))


def test_an_error_of_a_loader_s_process_is_its_sentence_alone() -> None:
    with pytest.raises(ExpectedError) as caught:
        list(batches(ExpectedError("expected latents of image 7, found none")))
    assert str(caught.value) == "expected latents of image 7, found none"


@pytest.mark.slow
def test_a_training_with_little_shared_memory_says_so(inputs: TrainingInputs, tmp_path: Path) -> None:  # noqa: F811
    """In a mount namespace of its own, so that no other process has a full /dev/shm."""
    small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=8k tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs: run as root")
    (tmp_path / "run.yaml").write_bytes(msgspec.yaml.encode(settings(dataloader_num_workers=1)))
    given = [
        *("-m", "spctrl.training", str(tmp_path / "run.yaml"), f"--manifest={inputs.manifest}"),
        *(f"--store={inputs.store}", f"--data-root={inputs.data_root}", f"--weights={inputs.weights}"),
        f"--output={tmp_path / 'run'}",
    ]
    done = subprocess.run(
        [*small, sys.executable, *given],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 1
    first = done.stderr.splitlines()[
        0
    ]  # torch complains of a loader that it has made in part, at the very end
    assert first.startswith("expected room in shared memory (/dev/shm)")
    assert (tmp_path / "run" / "error.txt").read_text() == f"{first}\n"
