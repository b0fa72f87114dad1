"""Errors of disks are one sentence that names the file, whichever library wrote it."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import faults
import pytest

from spctrl.disk_errors import DISK_ERRORS, DiskError, disk_error, fault_in, is_shared_memory, writing
from spctrl.errors import ExpectedError


@pytest.mark.parametrize("number", sorted(DISK_ERRORS))
def test_an_error_of_the_system_names_the_file_and_what_to_do(number: int, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(DiskError) as caught, writing(path, "Make room"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == f"cannot write {path}: {os.strerror(number)}. Make room"


def test_the_file_below_a_folder_is_named_too(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskError, match=rf"cannot write {tmp_path}: .* at {tmp_path / 'a'}\. "),
        writing(tmp_path),
    ):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "a"))


def test_what_failed_first_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExpectedError, match=r"^the first$"), writing(tmp_path):
        try:
            raise ExpectedError("the first")
        finally:
            raise OSError(errno.ENOSPC, "while a log was closed")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("[Errno 28] No space left on device"),
        RuntimeError("size mismatch"),
        OSError("no file named config.json"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    ],
)
def test_other_errors_stay_as_they_are(error: Exception, tmp_path: Path) -> None:
    assert disk_error(error, tmp_path) is None
    with pytest.raises(type(error)) as caught, writing(tmp_path):
        raise error
    assert caught.value is error


def test_an_error_of_unknown_code_is_taken_for_the_disk_s_only_where_the_system_says_so() -> None:
    assert disk_error(FileNotFoundError(errno.ENOENT, "No such file", "a"), None) is None
    found = disk_error(OSError(errno.EDQUOT, "Disk quota exceeded"), None)
    assert str(found).startswith("cannot write a file: Disk quota exceeded. ")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("OSError: [Errno 122] Disk quota exceeded: '/tmp/x'", "Disk quota exceeded"),
        ("FileNotFoundError: [Errno 2] No usable temporary directory found in ['/tmp']", "TMPDIR"),
        ("unable to write to file </x>: No space left on device (28)", "No space left on device"),
        ("basic_ios::clear: iostream error", "cut short"),
        ("OSError: [Errno 2] No such file or directory", None),
        ("took 5 s (28)", None),
    ],
)
def test_what_a_log_says_of_a_disk_is_found(text: str, fault: str | None) -> None:
    found = fault_in(text)
    assert found == fault if fault is None else fault in (found or "")


def test_full_shared_memory_is_recognised() -> None:
    for text in (
        "unable to open shared memory object </torch_1_2> in read-write mode: No space left on device (28)",
        "unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)",
        "DataLoader worker (pid 1) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
    ):
        assert is_shared_memory(RuntimeError(text))
    assert not is_shared_memory(RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."))


def writers() -> dict[str, Callable[[Path], object]]:
    torch = pytest.importorskip("torch", reason="the models extra is not installed")
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    from spctrl.weights import save_torch_file

    large, many = {"a": torch.zeros(10**6)}, {str(i): torch.zeros(1000) for i in range(1000)}

    def pickled(path: Path) -> None:
        with path.open("wb") as file:
            pickle.dump(bytes(4 * 10**6), file)

    return {
        "one tensor": lambda path: save_torch_file(large, path),
        "many tensors": lambda path: save_torch_file(many, path),
        "torch's own writer": lambda path: torch.save(large, path),
        "safetensors": lambda path: save_file(many, path),
        "diffusers": lambda path: AutoencoderKL(block_out_channels=(64,), norm_num_groups=8).save_pretrained(
            path
        ),
        "pickle": pickled,
    }


@pytest.mark.parametrize(
    "name", ["one tensor", "many tensors", "torch's own writer", "safetensors", "diffusers", "pickle"]
)
def test_a_full_disk_is_told_by_every_writer(name: str, tmp_path: Path) -> None:
    write = writers()[name]
    reason = "cut short, as by a full disk" if name == "torch's own writer" else "No space left on device"
    with faults.disk(tmp_path / "disk", size="256k"):
        path = tmp_path / "disk" / "weights"
        with pytest.raises(DiskError, match=rf"cannot write {path}: .*{reason}\. .*make room"), writing(path):
            write(path)


def test_saved_tensors_are_read_again(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the models extra is not installed")
    from spctrl.weights import read_torch_file, save_torch_file

    save_torch_file({"a": torch.arange(5)}, tmp_path / "a.pt")
    assert torch.equal(read_torch_file(tmp_path / "a.pt")["a"], torch.arange(5))
