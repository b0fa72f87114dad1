"""Networks that are no larger than their weights.

A configuration of a few bytes can ask for a network of any size, which libraries allocate, and fill with random
numbers, before they read any weights. Here the file of weights, which is as large as what it holds, bounds the network.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spctrl.documents import parse_document, read_document_file
from spctrl.errors import ExpectedError
from spctrl.real_size import real_size
from spctrl.weights import mapped_torch_file

Shapes = Mapping[str, tuple[int, ...]]

MAX_CONFIG_BYTES, MAX_HEADER_BYTES = 2**20, 2**24
MAX_NUMBER = 2**16
"""Of the integers in a configuration whose weights have no larger dimension."""
MAX_SIDE = 2**10
"""Pixels of the square that images are resized to for a network; the largest is SAM's."""
MAX_TOKENIZER_BYTES = 2**23
TOKENIZER_FILES = (
    "vocab.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
NO_LENGTH_LIMIT = 10**20
"""What tokenizers write that have no longest text."""
MARGIN, FREE_PARAMETERS, FREE_NUMBERS = 2, 2**8, 2**22
"""Parameters, and numbers in them, that a network may have for each of its file, and besides. Not exactly as many: of a
network that is a little too large the caller names the keys that do not fit."""
NUMBERS_PER_BYTE = 2
"""The smallest types of numbers take half a byte."""


class NetworkSizeError(ExpectedError, ValueError):
    """A configuration that asks for more than its weights hold."""


def read_config(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES, most: int = MAX_NUMBER) -> dict[str, Any]:
    """The content of a small JSON file beside weights.

    Args:
        path: of the file.
        max_bytes: of its content.
        most: largest integer in it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file; says what was expected and found.
    """
    found = read_document_file(path, max_bytes)
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found {type(found).__name__}")
    check_numbers(found, most)
    return found


def check_numbers(config: Any, most: int) -> None:
    """Refuse large integers, which are layers, widths and sizes, anywhere in a configuration.

    Raises:
        NetworkSizeError: names the first one.
    """
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{name}.{key}" if name else str(key), each) for key, each in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(name, each) for each in value]
        elif isinstance(value, int) and abs(value) > most:
            is_no_limit = name == "model_max_length" and value > NO_LENGTH_LIMIT
            if not is_no_limit:
                raise NetworkSizeError(
                    f"expected integers of at most {most:,}, found {name[:80]} = {str(value)[:20]}"
                )


def check_tokenizer(folder: Path) -> None:
    """Refuse files of a tokenizer that are far larger than CLIP's, or have ids or lengths that are.

    Raises:
        OSError: a file cannot be read.
        ValueError: names the file.
    """
    for name in TOKENIZER_FILES:
        if not (folder / name).exists():
            continue
        try:
            config = read_config(folder / name, max_bytes=MAX_TOKENIZER_BYTES)
            added = config.get("added_tokens_decoder")
            check_numbers([int(key) for key in added] if isinstance(added, dict) else [], MAX_NUMBER)
        except ValueError as error:
            raise NetworkSizeError(f"{name}: {error}") from None
    merges = folder / "merges.txt"
    if merges.exists() and (not merges.is_file() or merges.stat().st_size > MAX_TOKENIZER_BYTES):
        raise NetworkSizeError(
            f"merges.txt: expected a file of at most {MAX_TOKENIZER_BYTES:,} bytes, found another"
        )


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a folder's ``.safetensors`` files, or else its ``.bin`` files, by name; none is read.

    Raises:
        OSError: a file cannot be read.
        ValueError: a header is damaged, or states more than its file can hold.
        TorchFileError: see ``read_torch_file``.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    for path in files:
        shapes |= _header_shapes(path)
    for path in [] if files else sorted(path for path in folder.glob("*.bin") if path.is_file()):
        found = mapped_torch_file(path)
        shapes |= {key: tuple(each.shape) for key, each in found.items()} if isinstance(found, dict) else {}
    return shapes


def _header_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with path.open("rb") as file:
        size = real_size(file.fileno())  # before anything is read: it moves the file's position
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size):
            raise ValueError(
                f"{path.name}: expected a safetensors file, found one that is cut short or of another kind"
            )
        header = parse_document(file.read(length))
    try:
        shapes = {
            name: tuple(map(int, each["shape"])) for name, each in header.items() if name != "__metadata__"
        }
    except (AttributeError, LookupError, TypeError, ValueError):
        raise ValueError(f"{path.name}: expected a safetensors header with shapes, found another") from None
    for name, shape in shapes.items():
        if min(shape, default=0) < 0 or math.prod(shape) > NUMBERS_PER_BYTE * size:
            raise NetworkSizeError(
                f"{path.name}: expected tensors that fit in {size:,} bytes, found {name}: {shape}"
            )
    return shapes


@contextmanager
def within_weights(folder: Path) -> Iterator[None]:
    """Let a folder's ``config.json`` ask for no larger network than its weights are, while one is loaded.

    Raises:
        NetworkSizeError: names the number, or the parameter and the module, with which it becomes too large.
        OSError, ValueError, TorchFileError: the configuration or the weights cannot be read.
    """
    shapes = tensor_shapes(folder)
    try:
        read_config(folder / "config.json", most=largest(shapes))
    except NetworkSizeError as error:
        raise NetworkSizeError(f"config.json: {error}, as the weights have no larger dimension") from None
    with parameters_within(shapes, "config.json"):
        yield


def largest(shapes: Shapes) -> int:
    """The largest integer that a configuration of such weights may have."""
    return max([MAX_NUMBER, *(side for shape in shapes.values() for side in shape)])


@contextmanager
def parameters_within(shapes: Shapes, config: str) -> Iterator[None]:
    """Stop the making of a network, in this thread, at the parameter with which it outgrows its weights.

    Memory of a parameter is not written to before that, and so not taken from the system.

    Args:
        shapes: of the weights.
        config: what describes the network, for the message.

    Raises:
        NetworkSizeError: names the parameter.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook as on_parameter

    most_parameters = MARGIN * len(shapes) + FREE_PARAMETERS
    in_file = sum(math.prod(shape) for shape in shapes.values())
    most_numbers = MARGIN * in_file + FREE_NUMBERS
    thread, total, sizes = threading.get_ident(), 0, dict[tuple[int, str], int]()

    def count(module: Any, name: str, parameter: Any) -> None:
        nonlocal total
        if parameter is None or threading.get_ident() != thread:
            return
        key = id(module), name  # of the same name replace each other, as when values are loaded
        total += parameter.numel() - sizes.get(key, 0)
        sizes[key] = parameter.numel()
        if total > most_numbers or len(sizes) > most_parameters:
            raise NetworkSizeError(
                f"{config}: expected a network as large as its weights ({len(shapes):,} tensors, {in_file:,} numbers), "
                f"found one of {len(sizes):,} tensors with {total:,} numbers, and perhaps more, at "
                f"{type(module).__name__}.{name} of shape {tuple(parameter.shape)}"
            )

    handle = on_parameter(count)
    try:
        yield
    finally:
        handle.remove()
