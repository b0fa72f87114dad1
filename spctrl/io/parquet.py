"""Parquet files of unknown origin, read into memory that is bounded by their size on disk.

A few bytes of Parquet can stand for terabytes: a value may be repeated any number of times, a compressed page may have
any size, and a text of a dictionary may stand in every row. So the headers of the pages are read first. They state how
many values and bytes each page expands to, which is what Arrow allocates.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from spctrl.errors import ExpectedError
from spctrl.io.real_size import real_size

BYTES_PER_BYTE, FREE_BYTES = 128, 2**28
"""Bytes of memory that a table may take for each byte of its file, and besides. The densest tables of this project are
of rejects that are all alike: they take 35 for each byte, and besides what their messages take."""
BYTES_PER_VALUE, BYTES_PER_PAGE = 8, 64
"""Least memory that values and pages count for: what they expand to may be nothing."""
MAX_FOOTER_BYTES, MAX_HEADER_BYTES = 2**24, 2**16
MAGIC, TAIL_BYTES = b"PAR1", 8
TEXTS_AT_LEAST = 16
"""Texts of a dictionary are only counted if they could take so many times what is known of their column."""
TEXTS_AT_ONCE = 4096
LENGTH_BYTES = 4
MAX_RUNS = 8
"""Of texts of one length, one after the other, in a dictionary."""
MAX_DEPTH = 4
"""Of structs in the header of a page."""
LARGEST_I32 = 2**31 - 1
WRITER = "parquet-cpp-arrow"
PLAIN_TYPES = (
    pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null, pa.types.is_string,
    pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary,
)  # fmt: skip
DICTIONARY_PAGE = 2
DICTIONARY_ENCODINGS = frozenset({2, 8})
ENCODINGS = frozenset({0, 3, 4}) | DICTIONARY_ENCODINGS
"""Plain, run length and dictionary, by their numbers in Parquet. Others, which this project never writes, may repeat
the start of a text at no cost."""


class TableError(ExpectedError, ValueError):
    """A Parquet file that is damaged, or expands to more than a genuine one of its size can."""


def read_table(source: Path | bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or some of its columns; raises what ``open_table`` does."""
    file = open_table(source, columns)
    if columns is None:
        return file.read()
    if missing := set(columns) - set(file.schema_arrow.names):
        raise TableError(
            f"{_name(source)}: expected the columns {', '.join(columns)}, found no {min(missing)}"
        )
    return file.read(list(columns)).select(list(columns))


def open_table(
    source: Path | bytes, columns: Sequence[str] | None = None, *, free_bytes: int = FREE_BYTES
) -> pq.ParquetFile:
    """A Parquet file to read in batches, after a look at what it expands to.

    Args:
        source: its path, or its contents.
        columns: those that are to be read; by default all.
        free_bytes: what it may expand to besides ``BYTES_PER_BYTE`` for each byte of the file.

    Raises:
        TableError: it expands to more than a genuine one of its size can.
        OSError, pa.ArrowException: it cannot be read.
    """
    if isinstance(source, Path):
        raw = LocalFileSystem().open_input_file(str(source))
        with source.open("rb") as data:
            file_bytes = real_size(data.fileno())
    else:
        raw, file_bytes = pa.BufferReader(source), len(source)
    budget = _Budget(_name(source), file_bytes, free_bytes + BYTES_PER_BYTE * file_bytes)
    _check_footer(raw, budget)
    file = pq.ParquetFile(raw, pre_buffer=False)
    _check_schema(file, budget)
    _check_texts(raw, file, _check_pages(raw, file, columns, budget), budget)
    return file


class _Budget:
    """Memory that is left for a table."""

    def __init__(self, name: str, file_bytes: int, limit: int) -> None:
        self.name = name
        self.left = limit
        self._bound = f"expected a Parquet file of {file_bytes:,} bytes to expand to at most {limit:,}"

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise TableError(
                f"{self.name}: {self._bound}, found more. It is damaged, or made to exhaust the memory; "
                "`spctrl verify` drops what is damaged"
            )

    def damaged(self, fault: str) -> TableError:
        return TableError(
            f"{self.name}: expected a Parquet file, found {fault}. `spctrl verify` drops what is damaged"
        )


def _name(source: Path | bytes) -> str:
    return str(source) if isinstance(source, Path) else "a table"


def _check_footer(raw: pa.NativeFile, budget: _Budget) -> None:
    """Arrow reads as much as the last bytes say that the footer has."""
    if raw.size() < TAIL_BYTES:
        raise budget.damaged(f"one of {raw.size()} bytes")
    raw.seek(raw.size() - TAIL_BYTES)
    tail = raw.read(TAIL_BYTES)
    footer_bytes = int.from_bytes(tail[:4], "little")
    if not tail.endswith(MAGIC) or footer_bytes > MAX_FOOTER_BYTES:
        raise budget.damaged("one without its footer")


def _check_schema(file: pq.ParquetFile, budget: _Budget) -> None:
    """Arrow reads files of some other writers in ways that their pages do not show."""
    if not str(file.metadata.created_by).startswith(WRITER):
        raise budget.damaged(f"one that {file.metadata.created_by} has written, not {WRITER}")
    if len(_lengths(file.schema_arrow, budget)) != file.metadata.num_columns:
        raise budget.damaged("one with columns that its schema does not have")


def _lengths(fields: Iterable[pa.Field], budget: _Budget, length: int = 1) -> list[int]:
    """For each column of numbers or texts how many of them Arrow makes of one in the file."""
    found = []
    for field in fields:
        kind = field.type
        if pa.types.is_struct(kind):
            found += _lengths(kind.fields, budget, length)
        elif pa.types.is_fixed_size_list(kind):
            found += _lengths([kind.value_field], budget, length * kind.list_size)
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            found += _lengths([kind.value_field], budget, length)
        elif any(is_kind(kind) for is_kind in PLAIN_TYPES):
            found.append(length)
        else:
            raise budget.damaged(f"one with the type {kind}, which this project does not write")
    return found


def _check_pages(
    raw: pa.NativeFile, file: pq.ParquetFile, columns: Sequence[str] | None, budget: _Budget
) -> set[str]:
    """Count what pages expand to; returns paths of texts that a dictionary may expand further, which are to be counted
    one by one.
    """
    metadata = file.metadata
    widths = [length * BYTES_PER_VALUE for length in _lengths(file.schema_arrow, budget)]
    repeated_texts = set()
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for i, width in enumerate(widths):
            chunk = row_group.column(i)
            path = chunk.path_in_schema
            if columns is not None and path.partition(".")[0] not in columns:
                continue
            dictionaries = []
            known = repeated = 0
            for page in _pages(raw, chunk, budget):
                page_bytes = BYTES_PER_PAGE + page.expanded_bytes + page.values * width
                budget.spend(page_bytes)
                known += page_bytes
                if page.kind == DICTIONARY_PAGE:
                    dictionaries.append(page)
                elif page.encoding in DICTIONARY_ENCODINGS:
                    repeated += page.values
            if chunk.physical_type == "BYTE_ARRAY" and repeated:
                longest = max(
                    (_longest_text(raw, page, chunk.compression) for page in dictionaries), default=0
                )
                if longest * repeated > TEXTS_AT_LEAST * known:
                    repeated_texts.add(path)
                else:
                    budget.spend(longest * repeated)
    return repeated_texts


def _longest_text(raw: pa.NativeFile, page: _Page, compression: str) -> int:
    """Bytes that no text of a dictionary exceeds: the longest where most have one length, as digests do; else all."""
    if compression != "ZSTD":
        return page.expanded_bytes
    raw.seek(page.start)
    data = np.frombuffer(pa.decompress(raw.read(page.stored_bytes), page.expanded_bytes, "zstd"), np.uint8)
    at = longest = 0
    for _ in range(MAX_RUNS):
        # Each text comes after its length.
        length = int.from_bytes(data[at : at + LENGTH_BYTES].tobytes(), "little")
        entries = data[at : len(data) - (len(data) - at) % (length + LENGTH_BYTES)].reshape(
            -1, length + LENGTH_BYTES
        )
        lengths = np.ascontiguousarray(entries[:, :LENGTH_BYTES]).view("<u4").ravel()
        others = np.flatnonzero(lengths != length)
        at += (others[0] if len(others) else len(lengths)) * (length + LENGTH_BYTES)
        longest = max(longest, length)
        if at == len(data):
            return longest
    return page.expanded_bytes


def _check_texts(raw: pa.NativeFile, file: pq.ParquetFile, paths: set[str], budget: _Budget) -> None:
    """Count the bytes of texts, each of which is in memory only once."""
    if not paths:
        return
    once = pq.ParquetFile(raw, metadata=file.metadata, read_dictionary=sorted(paths), pre_buffer=False)
    for path in sorted(paths):
        for batch in once.iter_batches(TEXTS_AT_ONCE, columns=[path], use_threads=False):
            budget.spend(_text_bytes(batch.column(0)))


def _text_bytes(array: pa.Array) -> int:
    """Bytes of all texts of an array of dictionary indices, or of lists and structs of such."""
    while not pa.types.is_dictionary(array.type):
        array = array.flatten()[0] if pa.types.is_struct(array.type) else array.flatten()
    lengths = array.dictionary.cast(pa.large_binary()).buffers()[1]
    offsets = np.frombuffer(lengths, np.int64)[: len(array.dictionary) + 1]
    counts = np.bincount(array.indices.drop_null().to_numpy(zero_copy_only=False), minlength=len(offsets) - 1)
    return int(counts @ np.diff(offsets))


# Headers of pages, in Thrift's compact protocol


class _Page(NamedTuple):
    """What the header of a page says.

    Attributes:
        kind: ``DICTIONARY_PAGE``, or one of those with values.
        values: how many there are.
        encoding: of the values, by its number in Parquet.
        expanded_bytes: size when decompressed.
        start: where the file has its contents.
        stored_bytes: their size there.
    """

    kind: int
    values: int
    encoding: int
    expanded_bytes: int
    start: int
    stored_bytes: int


KIND, EXPANDED_BYTES, STORED_BYTES = 1, 2, 3
VALUES = 1
ENCODING = {0: (5, 2), DICTIONARY_PAGE: (7, 2), 3: (8, 4)}
"""By kind of page: the field of its own header, and there the field of its encoding. Other kinds hold nothing."""


def _pages(raw: pa.NativeFile, chunk: pq.ColumnChunkMetaData, budget: _Budget) -> Iterator[_Page]:
    """Headers of all pages of a column chunk, found where Arrow finds them; one without rows has none."""
    if not chunk.num_values and not chunk.total_compressed_size:
        return
    starts = (chunk.dictionary_page_offset, chunk.data_page_offset)
    at = min(start for start in starts if start) if any(starts) else 0
    end = at + chunk.total_compressed_size
    if not 0 < at <= end <= raw.size():
        raise budget.damaged("a column outside of it")
    values = 0
    while at < end:
        raw.seek(at)
        try:
            page = _page(raw.read(min(MAX_HEADER_BYTES, end - at)), at)
        except (IndexError, KeyError, TypeError, ValueError):
            raise budget.damaged(f"no page at {at:,}") from None
        at = page.start + page.stored_bytes
        if at > end or page.encoding not in ENCODINGS:
            raise budget.damaged(f"a page before {at:,} that this project does not write")
        values += page.values if page.kind != DICTIONARY_PAGE else 0
        yield page
    if values != chunk.num_values:
        raise budget.damaged(f"{values:,} values in a column of {chunk.num_values:,}")


def _page(data: bytes, at: int) -> _Page:
    """The page whose header is at the start of some bytes, which the file has at ``at``.

    Raises:
        IndexError, KeyError, TypeError, ValueError: there is none.
    """
    header, header_bytes = _struct(data, 0)
    kind = header[KIND]
    field, encoding = ENCODING[kind]
    numbers = (header[field][VALUES], header[field][encoding], header[EXPANDED_BYTES], header[STORED_BYTES])
    if not all(0 <= number <= LARGEST_I32 for number in numbers):
        raise ValueError("expected sizes and counts")
    values, own_encoding, expanded_bytes, stored_bytes = numbers
    return _Page(kind, values, own_encoding, expanded_bytes, at + header_bytes, stored_bytes)


def _struct(data: bytes, at: int, depth: int = MAX_DEPTH) -> tuple[dict[int, Any], int]:
    """32-bit numbers and structs of a Thrift struct by field, and where it ends; fields of other types are None.

    Raises:
        IndexError, ValueError: there is none, or one that readers could understand in different ways.
    """
    if not depth:
        raise ValueError("expected fewer levels")
    fields: dict[int, Any] = {}
    number = 0
    while kind := data[at] & 15:
        step, at = data[at] >> 4, at + 1
        following, at = (number + step, at) if step else _integer(data, at)
        if following <= number:
            raise ValueError("expected fields in order")
        number = following
        fields[number] = None
        match kind:
            case 1 | 2:  # true and false
                pass
            case 3:
                at += 1
            case 5:
                fields[number], at = _integer(data, at)
            case 4 | 6:
                _, at = _integer(data, at)
            case 7:
                at += 8
            case 8:
                length, at = _varint(data, at)
                at += length
            case 12:
                fields[number], at = _struct(data, at, depth - 1)
            case _:
                raise ValueError(f"unexpected type {kind}")
    return fields, at + 1


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 128:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
    return value | data[at] << shift, at + 1


def parquet_bytes(table: pa.Table) -> bytes:
    """A small table as a Parquet file (zstd)."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
