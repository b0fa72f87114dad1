"""Check files of ``torch.save`` before PyTorch loads them: a few bytes could ask it for any amount of memory.

The pickle is read twice: first here, with functions that only check their arguments and allocate nothing, then by
PyTorch. Whatever PyTorch calls with a number, or lets iterate over a tensor, has passed here.
"""

from __future__ import annotations

import functools
import io
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

ZIP_MAGIC = b"PK\x03\x04"
"""PyTorch decides by it, and by nothing else, that a file is a zip archive."""
MAX_PICKLE_BYTES = 2**22
"""The pickle of Stable Diffusion's UNet, which refers to 686 tensors, takes 0.1 MB."""
HIGHEST_PROTOCOL = 2
"""PyTorch writes this protocol; later ones have an instruction that allocates by a number."""
LEGACY_PICKLES = 5
"""Magic number, protocol, system, content and keys of the storages; the storages follow."""

_END, _END64, _LOCATOR64 = struct.Struct("<4s8xLLH"), struct.Struct("<4s36xQQ"), struct.Struct("<4s4xQ4x")


def is_zip(path: Path) -> bool:
    """Whether PyTorch will read the file as a zip archive.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"found no file at {path}")
    with path.open("rb") as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def check_torch_file(path: Path) -> None:
    """Refuse a file whose loading would take much more memory than its size, or would call anything unusual.

    Raises:
        OSError: it cannot be read.
        ValueError, or another error of ``pickle`` or ``zipfile``: says what was expected and found.
    """
    if not is_zip(path):
        with path.open("rb") as file:
            _check_pickles(file.read(MAX_PICKLE_BYTES), LEGACY_PICKLES, path.stat().st_size)
        return
    import torch

    _check_archive(path)
    data = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")  # the member that PyTorch will take
    _check_pickles(data, 1, path.stat().st_size)


def _check_archive(path: Path) -> None:
    """Require members that are stored, not compressed, and a directory that is the same for every reader."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _END.size - _LOCATOR64.size - _END64.size))
        _check_directory_end(file.read(), size)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    for each in members:
        if each.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"expected members that are not compressed, found {each.filename!r}")
        if each.filename.lower().endswith("data.pkl") and each.file_size > MAX_PICKLE_BYTES:
            raise ValueError(
                f"expected a pickle of at most {MAX_PICKLE_BYTES:,} bytes, found {each.file_size:,}"
            )
    if (total := sum(each.file_size for each in members)) > size:
        raise ValueError(f"expected members of at most {size:,} bytes, the file's size, found {total:,}")


def _check_directory_end(tail: bytes, size: int) -> None:
    """Require that the directory ends where its end records begin, and that no comment follows them.

    Python and PyTorch find the directory in different ways; otherwise they could find different ones.
    """
    magic, length, start, comment = _END.unpack(tail[-_END.size :])
    end = size - _END.size
    locator = tail[-_END.size - _LOCATOR64.size : -_END.size]
    is_whole = magic == b"PK\x05\x06" and comment == 0
    if locator.startswith(b"PK\x06\x07"):
        end -= _LOCATOR64.size + _END64.size
        magic, length, start = _END64.unpack(tail[: _END64.size])
        is_whole &= magic == b"PK\x06\x06" and _LOCATOR64.unpack(locator)[1] == end
    if not is_whole or start + length != end:
        raise ValueError("expected a zip directory at the end of the file, without a comment, found another")


def _check_pickles(data: bytes, count: int, file_size: int) -> None:
    file = io.BytesIO(data)
    reader = _Checker(file, file_size)
    for _ in range(count):
        start = file.tell()
        for instruction, _, _ in pickletools.genops(file):
            if instruction.proto > HIGHEST_PROTOCOL:
                raise pickle.UnpicklingError(
                    f"expected a pickle of protocol {HIGHEST_PROTOCOL}, found {instruction.name} of {instruction.proto}"
                )
        file.seek(start)
        reader.load()


class _Tensor:
    """Stands for a tensor or a type, which has no length, items or attributes of its own."""

    def __setstate__(self, state: Any) -> None:
        """Accept what is set on it."""


class _Checker(pickle._Unpickler):  # the one in C allocates by the index of a memo
    """Unpickles plain containers and stand-ins for all else.

    Args:
        file: of pickles.
        most_numbers: that all storages together may have.
    """

    def __init__(self, file: io.BytesIO, most_numbers: int) -> None:
        super().__init__(file)
        self._left, self._storages = most_numbers, set[Any]()
        self._items_left = MAX_PICKLE_BYTES

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in _CALLED:
            return functools.partial(self._call, _CALLED[full_name])
        if not _NAMED.fullmatch(full_name):
            raise pickle.UnpicklingError(f"expected tensors, numbers and texts, found {full_name[:80]!r}")
        return _Tensor()

    def _call(self, check: Callable[..., Any], *args: Any) -> Any:
        """Check a call, which copies its arguments, and may be repeated in 4 bytes."""
        self._items_left -= sum(len(each) for each in args if isinstance(each, Sized))
        _require(self._items_left >= 0, f"calls with at most {MAX_PICKLE_BYTES:,} items")
        return check(*args)

    def persistent_load(self, pid: Any) -> Any:
        _, _, key, _, numbers, *_ = pid
        _require(type(numbers) is int and numbers >= 0, "storages of as many numbers as the file holds")
        if key not in self._storages:
            self._storages.add(key)
            self._left -= numbers
        _require(self._left >= 0, "storages of as many numbers as the file holds")
        return _Tensor()


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise pickle.UnpicklingError(f"expected {what}, found others")


def _tensor(*_: Any) -> _Tensor:
    return _Tensor()


def _tensor_of_type(make: Callable[..., Any], _type: Any, args: tuple[Any, ...], _state: Any) -> Any:
    return make(*args)


def _ordered_dict(*pairs: Any) -> OrderedDict[Any, Any]:
    _require(
        all(
            type(each) in (list, tuple) and all(type(pair) in (list, tuple) for pair in each)
            for each in pairs
        ),
        "OrderedDict of pairs",
    )
    return OrderedDict(*pairs)


def _counter(*counts: Any) -> dict[Any, Any]:
    _require(all(type(each) is dict for each in counts), "Counter of a dictionary")
    return dict(*counts)


def _set(*items: Any) -> set[Any]:
    _require(all(type(each) in (list, tuple) for each in items), "set of a list")
    return set(*items)


def _size(sides: Any) -> tuple[Any, ...]:
    _require(type(sides) in (list, tuple), "torch.Size of a list")
    return tuple(sides)


def _bytes(text: Any, encoding: Any) -> bytes:
    _require(type(text) is str and encoding == "latin1", "bytes written as latin1")
    return bytes(text, "latin1")


def _numpy_type(kind: Any, *_: Any) -> _Tensor:
    _require(
        type(kind) is str and re.fullmatch(r"[biuf][1248]", kind) is not None, "numpy's types of numbers"
    )
    return _Tensor()


def _numpy_number(_type: Any, data: Any) -> float:
    _require(type(data) is bytes, "numpy's numbers with their bytes")
    return 0.0


_CALLED: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
    **dict.fromkeys(("builtins.set", "__builtin__.set"), _set),
    **dict.fromkeys(("builtins.complex", "__builtin__.complex"), complex),
    "_codecs.encode": _bytes,
    "torch.Size": _size,
    "torch.device": _tensor,
    **dict.fromkeys((f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")), _tensor),
    **dict.fromkeys(
        (f"torch._utils._rebuild_parameter{version}" for version in ("", "_with_state")), _tensor
    ),
    "torch._tensor._rebuild_from_type_v2": _tensor_of_type,
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray.scalar": _numpy_number,
    "numpy._core.multiarray.scalar": _numpy_number,
}
"""What is called, and what checks the arguments instead."""
_NAMED = re.compile(
    r"torch\.(\w+Storage|storage\.UntypedStorage|Tensor|nn\.parameter\.Parameter"
    r"|u?int\d+|b?float\d+\w*|complex\d+|bool)"
)
"""What is named as a type, and may not be called."""
