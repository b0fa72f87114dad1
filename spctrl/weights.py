"""The weight files that stages can use: what they are, where they come from, and whether they are real."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from spctrl.configuration import ConfigurationError, PathText, read_yaml, with_expanded_paths
from spctrl.errors import ExpectedError
from spctrl.io.disk_errors import writing
from spctrl.io.documents import read_document_file
from spctrl.io.torch_pickles import check_torch_file, is_zip
from spctrl.resources import override, packaged

if TYPE_CHECKING:
    import torch

REGISTRY = "weights.yaml"


class KnownWeights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry of weights.yaml.

    Attributes:
        what: in words.
        file: file or folder below ``[paths] weights``.
        publisher: who offers it, and where.
        licence: as its publisher states it.
        setting: the settings that ask for it.
        sha256: of the file, or its first digits, which publishers like to put into its name.
    """

    what: str
    file: PathText
    publisher: str
    licence: str
    setting: str
    sha256: str | None = None


def known_weights() -> dict[str, KnownWeights]:
    """All entries of weights.yaml, by name; those of ``configs/weights.yaml`` add to the package's or replace them.

    Raises:
        ConfigurationError: a file does not hold such entries, or a path that cannot be expanded.
    """
    own = override(REGISTRY)
    return _entries(packaged(REGISTRY)) | (_entries(own.absolute()) if own else {})


def random_weights_path(folder: Path, name: str) -> Path:
    """Where random weights are written for an entry: below a folder, under the file name that the package has for it.

    Raises:
        ExpectedError: other weights are there.
    """
    path = folder / _entries(packaged(REGISTRY))[name].file
    if path.exists() and not are_random(path) and not (path.is_dir() and not any(path.iterdir())):
        raise ExpectedError(
            f"expected nothing at {path}, or random weights to replace, found other weights. Choose another folder, or "
            "move them"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@functools.cache
def _entries(path: Path) -> dict[str, KnownWeights]:
    try:
        entries = msgspec.convert(read_yaml(path) or {}, dict[str, KnownWeights])
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    return {name: with_expanded_paths(entry, f"{path}: {name}.") for name, entry in entries.items()}


MAX_NOTE_BYTES = 2**20


def are_random(weights: Path) -> bool:
    """Whether weights say of themselves, in a JSON file beside or in them, that they are random."""
    beside = weights / "spctrl.json" if weights.is_dir() else weights.with_name(f"{weights.name}.json")
    try:
        return bool(read_document_file(beside, MAX_NOTE_BYTES).get("weights") == "random")
    except (OSError, ValueError, AttributeError):
        return False


def find_weights(name_or_path: str, folder: Path) -> Path:
    """Where weights are: below ``folder`` for an entry of weights.yaml, else at the path itself."""
    entry = known_weights().get(name_or_path)
    return folder / entry.file if entry else Path(name_or_path)


MOST_TIMES_FILE = 64
"""Bytes of tensors for each byte of their file. A stride of 0 makes one number look like any many, which the first copy
writes out; random weights use it to stay small."""


class TorchFileError(ExpectedError):
    """A file that ``torch.save`` did not write, or not whole, or not for us."""


def read_torch_file(path: Path) -> Any:
    """What ``torch.save`` wrote: tensors, on the processor, in containers of numbers and texts. Nothing in it is run.

    Raises:
        TorchFileError: the file is missing, cut short, of another kind, holds code, or tensors that are far larger
            than it is.
    """
    return _torch_file(path)


def mapped_torch_file(path: Path) -> Any:
    """``read_torch_file`` whose tensors stay in the file, to look at their shapes."""
    return _torch_file(path, mapped=True)


def _torch_file(path: Path, *, mapped: bool = False) -> Any:
    import torch

    try:
        check_torch_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip(path))
        total_bytes = sum(tensor.nbytes for tensor in _tensors(found))
        most_bytes = MOST_TIMES_FILE * path.stat().st_size
    except Exception as error:  # a damaged pickle leads its reader to nearly any of them
        reason = str(error).strip().partition("\n")[0]
        raise TorchFileError(
            f"{path}: expected a PyTorch file of tensors, found one that is missing, cut short, of another kind, or "
            f"holds code, which is not run ({type(error).__name__}: {reason})"
        ) from None
    if total_bytes > most_bytes:
        raise TorchFileError(
            f"{path}: expected a PyTorch file whose tensors take at most {most_bytes:,} bytes, {MOST_TIMES_FILE} times "
            f"its own size, found {total_bytes:,}"
        )
    return found


def save_torch_file(value: Any, path: Path) -> None:
    """Write what ``read_torch_file`` reads.

    Raises:
        DiskError: it cannot be written.
    """
    import torch

    # torch's own writer of files forgets what the system says of a full disk; Python's raises it.
    with writing(path), path.open("wb") as file:
        torch.save(value, file)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested containers; a container that holds itself is looked at once."""
    import torch

    waiting, seen = [value], set[int]()
    while waiting:
        each = waiting.pop()
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, dict | list | tuple | set) and id(each) not in seen:
            seen.add(id(each))
            waiting += each.values() if isinstance(each, dict) else each
