"""Files of poses that users bring, from any writer, read into memory that is bounded by their size."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from spctrl.io.documents import MAX_CONTAINERS
from spctrl.io.parquet import BYTES_PER_BYTE, BYTES_PER_VALUE, FREE_BYTES
from spctrl.io.real_size import real_size
from spctrl.io.utf8 import utf8_fault

MAX_JSON_BYTES = 2**31
"""COCO's own annotations of 118,000 images take a tenth."""
BYTES_PER_CONTAINER = 8
"""Least text of a list or object, which takes far more memory; points as lists of two numbers need no less."""
MAX_LIST_SIZE = 4
"""Of lists of a fixed size: a box. Arrow makes as many values of each, also of a missing one."""


def read_json(path: Path) -> Any:
    """The content of a JSON file, also of one with NaN and infinity, as Python writes them.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, nested too deep or no JSON.
    """
    _check_regular(path)
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"expected at most {MAX_JSON_BYTES:,} bytes, found more")
    data = data.removeprefix(codecs.BOM_UTF8)
    if fault := utf8_fault(data):
        raise ValueError(fault)
    limit = MAX_CONTAINERS + len(data) // BYTES_PER_CONTAINER
    if (containers := data.count(b"[") + data.count(b"{")) > limit:
        raise ValueError(f"expected at most {limit:,} lists and objects, found {containers:,}")
    try:
        try:
            return msgspec.json.decode(data)
        except msgspec.DecodeError as error:
            try:
                return json.loads(data)
            except ValueError:
                raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("expected lists and objects of few levels, found too many") from None


def read_numbers(path: Path, names: Sequence[str]) -> pa.Table:
    """Those of the named columns of a Parquet file that it has, with numbers or lists of numbers.

    ``spctrl.io.parquet`` reads only what this project writes. Here the footer's own counts are the bound.

    Raises:
        OSError, pa.ArrowException: it cannot be read.
        ValueError: it is no file, has texts, or expands to more than a genuine one of its size.
    """
    _check_regular(path)
    with path.open("rb") as raw, pq.ParquetFile(raw, pre_buffer=False) as file:
        fields = [field for field in file.schema_arrow if field.name in names]
        for field in fields:
            _check_numbers(field.name, field.type)
        limit = FREE_BYTES + BYTES_PER_BYTE * real_size(raw.fileno())
        if (expanded := _expanded_bytes(file.metadata, {field.name for field in fields})) > limit:
            raise ValueError(f"expected it to expand to at most {limit:,} bytes, found {expanded:,}")
        return file.read([field.name for field in fields])


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise ValueError("expected a file, found something else")  # a pipe would never end


def _check_numbers(name: str, kind: pa.DataType) -> None:
    if pa.types.is_fixed_size_list(kind) and kind.list_size > MAX_LIST_SIZE:
        raise ValueError(f"{name!r}: expected lists of at most {MAX_LIST_SIZE}, found {kind.list_size:,}")
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        _check_numbers(name, kind.value_type)
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise ValueError(f"{name!r}: expected numbers, found {kind}")


def _expanded_bytes(metadata: pq.FileMetaData, names: set[str]) -> int:
    chunks = (
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    )
    return sum(
        max(chunk.total_uncompressed_size, MAX_LIST_SIZE * BYTES_PER_VALUE * chunk.num_values)
        for chunk in chunks
        if chunk.path_in_schema.partition(".")[0] in names
    )
