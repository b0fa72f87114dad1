"""Errors of disks are one sentence that names the file, whichever library wrote it."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import faults
import pytest

from spctrl.errors import ExpectedError
from spctrl.io.disk_errors import (
    DISK_ERRORS,
    DiskError,
    access_error,
    disk_error,
    fault_in,
    is_shared_memory,
    working,
    writing,
)


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
    assert access_error(FileNotFoundError(errno.ENOENT, "No such file", "a"), None) is None
    found = access_error(OSError(errno.EDQUOT, "Disk quota exceeded"), None)
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


OF_GPUS_NETWORKS_AND_SHAPES = [
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED (13)",
    "NCCL error: Unhandled system error (5)",
    "NCCL WARN Call to connect failed: Operation not permitted (1)",
    "NCCL error in: ProcessGroupNCCL.cpp:1269, unhandled system error (run with NCCL_DEBUG=INFO), NCCL version 2.18.1",
    "CUDA driver error: Device unavailable (30)",
    "CUDA error: Operation not permitted (1)",
    "CUDA error: an illegal memory access was encountered",
    "CUDA out of memory. Tried to allocate 28.00 MiB (GPU 0; 79.15 GiB total capacity; 30 MiB already allocated)",
    "The size of tensor a (28) must match the size of tensor b (13) at non-singleton dimension 1",
    "expected scalar type: Tensor (1)",
    "mat1 and mat2 shapes cannot be multiplied: Rows (5) and columns (30)",
    "Process terminated (13)",
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: Signal (27)",
    "[Errno 28] is what another library numbers its own errors with",
]


@pytest.mark.parametrize("text", OF_GPUS_NETWORKS_AND_SHAPES)
def test_errors_of_gpus_networks_and_shapes_stay_as_they_are(text: str, tmp_path: Path) -> None:
    assert fault_in(f"line before\n{text}\nline after") is None
    for scope in (writing, working):
        with pytest.raises(RuntimeError) as caught, scope(tmp_path):
            raise RuntimeError(text)
        assert caught.value.args == (text,)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize("number", sorted(DISK_ERRORS))
def test_numbers_beside_their_own_text_count(number: int) -> None:
    said = os.strerror(number)
    for text in (
        f"unable to open file </data/x.pt> in read-write mode: {said} ({number})",
        f"unable to open shared memory object </torch_1_2>: {said} ({number})",
        f"Error while serializing: I/O error: {said} (os error {number})",
        f"OSError: [Errno {number}] {said}: '/data/x.pt'",
    ):
        assert fault_in(text) == said


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/nope/map.png"),
        PermissionError(errno.EACCES, "Permission denied", b"/nope/map.png"),
        OSError(errno.EIO, "Input/output error", "/nope/map.png"),
        IsADirectoryError(errno.EISDIR, "Is a directory", "/nope/map.png"),
    ],
)
def test_a_file_that_is_only_read_is_not_told_as_written(error: OSError, tmp_path: Path) -> None:
    for output, what in ((tmp_path, "cannot read /nope/map.png"), (None, "/nope/map.png")):
        with (
            pytest.raises(DiskError, match=rf"^{what}: {error.strerror}\. Check that the file exists"),
            working(output),
        ):
            raise error


@pytest.mark.parametrize("below", ["out", "out/a/b.png", ".", "out.x.partial"])
def test_files_in_above_and_beside_the_output_are_told_as_written(below: str, tmp_path: Path) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / below))
    with pytest.raises(DiskError, match=rf"^cannot write {tmp_path / 'out'}: "), working(tmp_path / "out"):
        raise error


def test_errors_without_a_file_say_what_they_tell(tmp_path: Path) -> None:
    assert str(access_error(OSError(errno.EIO, "I/O"), tmp_path)).startswith(
        "a file: Input/output error. Check"
    )
    assert str(access_error(OSError(errno.ENOSPC, ""), tmp_path)).startswith(
        f"cannot write {tmp_path}: No space"
    )
    assert access_error(OSError(errno.EINVAL, "Invalid argument"), tmp_path, any_code=True) is None


def test_the_file_of_another_error_is_not_named(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as caught, working(tmp_path):
        try:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/nope/cache")
        except FileNotFoundError:
            raise OSError(errno.ENOSPC, "No space left on device")  # noqa: B904 - a context, as in libraries
    assert "/nope/cache" not in str(caught.value)


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
