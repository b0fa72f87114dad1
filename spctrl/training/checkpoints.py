"""Checkpoints: everything that training needs to go on, written whole or not at all.

    checkpoint-00000500/controlnet/ or adapter/     the trained network, in diffusers' format
    checkpoint-00000500/learned_embeds.bin          the keypoint tokens, where they are trained
    checkpoint-00000500/state.pt                    optimizer and loss scale
    checkpoint-00000500/run.json                    step, settings, images and processes
    checkpoint-00000500/SHA256SUMS                  digests of these files, as ``sha256sum`` writes them

The number of the next step stands for the order of the images and for every random number (``schedule``). The first
two are also what generation reads, so any checkpoint can be used as it is.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spctrl.errors import ExpectedError
from spctrl.io.disk_errors import disk_error
from spctrl.io.documents import read_document_file
from spctrl.weights import TorchFileError, read_torch_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STATE, RUN, SUMS = "state.pt", "run.json", "SHA256SUMS"
TOKENS = "learned_embeds.bin"
MAX_RUN_BYTES = 2**20
LOCK = "lock"
"""Beside the checkpoints, held by the one run that writes there."""
_NAME = re.compile(r"checkpoint-(\d{8})")
_PARTIAL, _DAMAGED = "partial-", "damaged-"
CHECKPOINTS_STAY = (
    "Earlier checkpoints stay; make room or fix the permissions, then run again to continue from the latest"
)


class DamagedCheckpointError(ExpectedError):
    """A checkpoint that is not what was written."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """The checkpoint after so many steps, whether or not it is there."""
    return folder / f"checkpoint-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Steps that were done before a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, earliest first."""
    return sorted(path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name))


def write_checkpoint(folder: Path, step: int, write: Callable[[Path], None], *, keep: int | None) -> Path:
    """Write a checkpoint unless it is there, then remove the earliest up to it beyond the number to keep.

    Args:
        folder: of the checkpoints.
        step: steps that were done.
        write: writes the files into the folder that it is given.
        keep: how many stay; None for all.

    Raises:
        DiskError: it cannot be written (full disk, no permission); the earlier ones are as they were.
    """
    final = checkpoint_path(folder, step)
    if final.exists():
        return final
    partial = folder / f"{_PARTIAL}{final.name}"
    try:
        remove_partial(folder)
        partial.mkdir(parents=True)
        write(partial)
        sums = [f"{_sha256(partial / name)}  {name}\n" for name in _files(partial)]
        (partial / SUMS).write_text("".join(sums))
        _sync(partial)
        partial.rename(final)
    except Exception as error:  # torch's and safetensors' writers raise others than OSError
        shutil.rmtree(partial, ignore_errors=True)
        if (explained := disk_error(error, final, CHECKPOINTS_STAY)) is None:
            raise
        raise explained from error
    if keep is not None:
        for path in [each for each in checkpoints(folder) if step_of(each) <= step][:-keep]:
            remove_checkpoint(path)
    return final


def adopt_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """Put another run's checkpoint among those of a folder, for as long as this folder needs it.

    Files are hard-linked where the file system can: a checkpoint is never written to again.

    Raises:
        ExpectedError: it cannot be written, or the other run removed its own meanwhile.
    """

    def write(partial: Path) -> None:
        try:
            shutil.copytree(
                checkpoint,
                partial,
                ignore=shutil.ignore_patterns(SUMS),  # is written to
                copy_function=_link_or_copy,
                dirs_exist_ok=True,
            )
        finally:
            checkpoint.stat()  # fails if it was removed, and so perhaps copied in part

    return write_checkpoint(folder, step_of(checkpoint), write, keep=None)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def remove_partial(folder: Path) -> None:
    """Remove what a killed run was writing or removing."""
    for path in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path)


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints."""
    for path in checkpoints(folder):
        remove_checkpoint(path)


def has_digests(checkpoint: Path) -> bool:
    """Whether digests were written with a checkpoint; those of earlier versions have none."""
    return (checkpoint / SUMS).exists()


def check_contents(checkpoint: Path, names: Sequence[str]) -> None:
    """Open files of a checkpoint, as far as their formats show damage; for those that have no digests.

    Raises:
        DamagedCheckpointError: one is missing or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    for name in names:
        path = checkpoint / name
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            else:
                read_torch_file(path)
        except (OSError, SafetensorError, TorchFileError) as error:
            raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error


def check_digests(checkpoint: Path, *names: str) -> None:
    """Compare a checkpoint's files, all unless named, with the digests that were written with them.

    Checkpoints of earlier versions have no digests and pass.

    Raises:
        DamagedCheckpointError: a file is missing or has changed.
    """
    if not has_digests(checkpoint):
        return
    try:
        lines = (checkpoint / SUMS).read_text().splitlines()
        expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        is_whole = {STATE, *names} <= expected.keys() <= set(_files(checkpoint)) and all(
            _sha256(checkpoint / name) == expected[name] for name in names or expected
        )
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{checkpoint} cannot be read: {error}") from error
    if not is_whole:
        raise DamagedCheckpointError(
            f"{checkpoint}: expected files with the digests in {SUMS}, found others: it was damaged after writing"
        )


def read_run(checkpoint: Path) -> dict[str, Any]:
    """Step, settings, images and processes of the run that wrote a checkpoint.

    Raises:
        DamagedCheckpointError: they cannot be read.
    """
    path = checkpoint / RUN
    if not path.exists():
        return read_state(checkpoint)  # of an earlier version, which had them there alone
    check_digests(checkpoint, RUN)
    try:
        run = read_document_file(path, MAX_RUN_BYTES)
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(run, dict):
        raise DamagedCheckpointError(f"{path}: expected a JSON object, found {type(run).__name__}")
    return run


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state of a checkpoint, on the processor; nothing in the file is executed.

    Raises:
        DamagedCheckpointError: it is missing or damaged.
    """
    path = checkpoint / STATE
    try:
        state = read_torch_file(path)
    except TorchFileError as error:
        raise DamagedCheckpointError(f"{path}: the state of training cannot be read: {error}") from error
    optimizer = state.get("optimizer") if isinstance(state, dict) else None
    if not (isinstance(optimizer, dict) and {"state", "param_groups"} <= optimizer.keys()):
        raise DamagedCheckpointError(f"{path}: expected the state of training, found something else")
    return dict(state)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that its step can be written again; returns where it is now."""
    aside = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}")
    if aside.exists():
        shutil.rmtree(aside)
    return checkpoint.rename(aside)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint so that half of it is never taken for one."""
    partial = checkpoint.with_name(f"{_PARTIAL}{checkpoint.name}-removed")
    checkpoint.rename(partial)
    shutil.rmtree(partial)


def _files(folder: Path) -> list[str]:
    """Names of all files below a folder, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Have the disk hold everything before the folder gets its name."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
