"""Checkpoints: everything that training needs to go on, written whole or not at all.

    checkpoint-00000500/controlnet/ or adapter/     the trained network, in diffusers' format
    checkpoint-00000500/learned_embeds.bin          the keypoint tokens, where they are trained
    checkpoint-00000500/state.pt                    step, optimizer and loss scale

The number of the next step stands for the order of the images and for every random number (``schedule``). The first
two are also what generation reads, so any checkpoint can be used as it is.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spctrl.errors import ExpectedError
from spctrl.weights import TorchFileError, read_torch_file

if TYPE_CHECKING:
    from collections.abc import Callable

STATE = "state.pt"
TOKENS = "learned_embeds.bin"
_NAME = re.compile(r"checkpoint-(\d{8})")
_PARTIAL = "partial-"


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, earliest first."""
    return sorted(path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name))


def write_checkpoint(folder: Path, step: int, write: Callable[[Path], None], *, keep: int | None) -> Path:
    """Write a checkpoint unless it is there, then remove the earliest beyond the number to keep.

    Args:
        folder: of the checkpoints.
        step: steps that were done.
        write: writes the files into the folder that it is given.
        keep: how many stay; None for all.

    Raises:
        ExpectedError: it cannot be written (full disk, no permission); the earlier ones are as they were.
    """
    final = folder / f"checkpoint-{step:08d}"
    if final.exists():
        return final
    partial = folder / f"{_PARTIAL}{final.name}"
    try:
        remove_partial(folder)
        partial.mkdir(parents=True)
        write(partial)
        _sync(partial)
        partial.rename(final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ExpectedError(
            f"cannot write the checkpoint {final}: {error.strerror or error}. Earlier checkpoints stay; make room or "
            "fix the permissions, then run again: training goes on from the latest"
        ) from error
    if keep is not None:
        for path in checkpoints(folder)[:-keep]:
            _remove(path)
    return final


def remove_partial(folder: Path) -> None:
    """Remove what a killed run was writing or removing."""
    for path in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path)


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints."""
    for path in checkpoints(folder):
        _remove(path)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state of a checkpoint, on the processor; nothing in the file is executed.

    Raises:
        ExpectedError: it is missing or damaged.
    """
    path = checkpoint / STATE
    try:
        state: dict[str, Any] = read_torch_file(path)
    except TorchFileError as error:
        raise ExpectedError(
            f"{path}: the state of training cannot be read: {error}. Remove the folder {checkpoint}: training then "
            "goes on from an earlier one"
        ) from error
    return state


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that half of it is never taken for one."""
    partial = checkpoint.with_name(f"{_PARTIAL}{checkpoint.name}-removed")
    checkpoint.rename(partial)
    shutil.rmtree(partial)


def _sync(folder: Path) -> None:
    """Have the disk hold everything before the folder gets its name."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
