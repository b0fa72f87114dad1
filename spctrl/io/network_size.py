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

from spctrl.errors import ExpectedError
from spctrl.io.documents import read_document_file
from spctrl.io.real_size import real_size
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
ID_FILES = ("vocab.json", "added_tokens.json")
ANY_NUMBER = frozenset({"model_max_length"})
"""Names of integers of any size, which allocate nothing: tokenizers without a longest text write 10**30."""
WEIGHT_FILES = (
    ("model.safetensors", "diffusion_pytorch_model.safetensors"),
    ("pytorch_model.bin", "diffusion_pytorch_model.bin"),
)
"""Of transformers and diffusers, or indexes of their shards; the second kind is loaded where the first is missing."""
REFUSED = ("quantization_config", "transformers_weights")
"""What would have a library read the weights in another way, or other weights."""
MARGIN, FREE_PARAMETERS, FREE_NUMBERS = 2, 2**8, 2**22
"""Parameters, and numbers in them, that a network may have for each of its file, and besides. Not exactly as many: of a
network that is a little too large the caller names the keys that do not fit."""


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
    """Refuse large integers, which are layers, widths and sizes, and numbers that are not finite, anywhere.

    Raises:
        NetworkSizeError: names the first one.
    """
    waiting: list[tuple[str, str, Any]] = [("", "", config)]
    while waiting:
        path, key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [
                (f"{path}.{key}" if path else str(key), str(key), each) for key, each in value.items()
            ]
        elif isinstance(value, list | tuple):
            waiting += [(path, key, each) for each in value]
        elif isinstance(value, float) and not math.isfinite(value):
            raise NetworkSizeError(f"expected finite numbers, found {path[:80]} = {value}")
        elif isinstance(value, int) and abs(value) > most and key not in ANY_NUMBER:
            raise NetworkSizeError(
                f"expected integers of at most {most:,}, found {path[:80]} = {str(value)[:20]}"
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
            if name in ID_FILES:
                _check_ids(config)
            added = config.get("added_tokens_decoder")
            _check_ids({key: int(key) for key in added} if isinstance(added, dict) else {})
        except ValueError as error:
            raise NetworkSizeError(f"{name}: {error}") from None
    merges = folder / "merges.txt"
    if merges.exists() and (not merges.is_file() or merges.stat().st_size > MAX_TOKENIZER_BYTES):
        raise NetworkSizeError(
            f"merges.txt: expected a file of at most {MAX_TOKENIZER_BYTES:,} bytes, found another"
        )


def _check_ids(ids: Mapping[str, Any]) -> None:
    for token, number in ids.items():
        if type(number) is not int or not 0 <= number <= MAX_NUMBER:
            raise ValueError(
                f"expected ids of tokens from 0 to {MAX_NUMBER:,}, found {token[:80]} = {str(number)[:20]}"
            )


def weight_files(folder: Path) -> list[Path]:
    """The files that diffusers and transformers load from a folder; what else lies there is not opened.

    Raises:
        OSError: an index cannot be read.
        ValueError: an index is damaged, or names files that are elsewhere.
    """
    for names in WEIGHT_FILES:
        files = [folder / name for name in names if (folder / name).is_file()]
        indexes = [folder / f"{name}.index.json" for name in names]
        for index in filter(Path.is_file, indexes):
            files += [folder / shard for shard in _shards(index)]
        if files:
            return files
    return []


def _shards(index: Path) -> list[str]:
    found = read_document_file(index, MAX_HEADER_BYTES)
    names = found.get("weight_map") if isinstance(found, dict) else None
    shards = set(map(str, names.values())) if isinstance(names, dict) else set()
    if not shards or any(Path(shard).name != shard for shard in shards):
        raise ValueError(f"{index.name}: expected a weight_map to files beside it, found another")
    return sorted(shards)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a folder's ``weight_files``, by name; none is read.

    Raises:
        OSError: a file cannot be read.
        ValueError: a header is damaged, or states more than its file holds.
        TorchFileError: see ``read_torch_file``.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            shapes |= _header_shapes(path)
        elif isinstance(found := mapped_torch_file(path), dict):
            shapes |= {key: tuple(each.shape) for key, each in found.items() if hasattr(each, "shape")}
    return shapes


def _header_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        size = real_size(file.fileno())  # before anything is read: it moves the file's position
        length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, size):
        raise ValueError(
            f"{path.name}: expected a safetensors file, found one that is cut short or of another kind"
        )
    try:
        # It checks that the tensors follow each other without gaps, from the header's end to the file's.
        with safe_open(path, framework="np") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OverflowError) as error:
        raise ValueError(
            f"{path.name}: expected a safetensors header of what the file holds, found another: {error}"
        ) from None


@contextmanager
def within_weights(folder: Path) -> Iterator[None]:
    """Let a folder's ``config.json`` ask for no larger network than its weights are, while one is loaded.

    Raises:
        NetworkSizeError: names the number, or the parameter and the module, with which it becomes too large.
        OSError, ValueError, TorchFileError: the configuration or the weights cannot be read.
    """
    shapes = tensor_shapes(folder)
    try:
        config = read_config(folder / "config.json", most=largest(shapes))
    except NetworkSizeError as error:
        raise NetworkSizeError(f"config.json: {error}; the weights have no larger dimension") from None
    for part in (config, *(each for each in config.values() if isinstance(each, dict))):
        for name in REFUSED:
            if part.get(name) is not None:
                raise NetworkSizeError(
                    f"config.json: expected no {name}, as weights are read as they are, found one"
                )
    with parameters_within(shapes, "config.json"):
        yield


def largest(shapes: Shapes) -> int:
    """The largest integer that a configuration of such weights may have; empty tensors do not count."""
    return max([MAX_NUMBER, *(side for shape in shapes.values() if math.prod(shape) for side in shape)])


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
