"""Parquet files that expand to more than their size allows are refused before they are decoded."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memory import MIB, memory_of

from spctrl.io import parquet
from spctrl.io.parquet import TableError, open_table, read_table

MOST_MEMORY = 300 * MIB
"""Of reading a small file that means harm; the free bytes of a table are 256 MiB."""
LONG = "x" * 10**7


def written(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **{"compression": "zstd", **options})
    return buffer.getvalue()


def genuine() -> pa.Table:
    """Texts of all kinds, nested ones among them."""
    names = [f"{i:012}.jpg" for i in range(4000)]
    instances = [[{"category": "dog", "keypoints": [1.5, i]}] * (i % 3) for i in range(4000)]
    return pa.table(
        {
            "image_id": range(4000),
            "file_name": names,
            "code": ["bad_image", None] * 2000,
            "captions": [["a dog", "größer"], None, [], ["a dog"]] * 1000,
            "instances": instances,
            "is_there": [True, None] * 2000,
            "width": pa.array([64] * 4000, pa.int32()),
        }
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "as written": {},
    "snappy": {"compression": "snappy"},
    "stored": {"compression": "none"},
    "small groups": {"row_group_size": 100},
    "small pages": {"data_page_size": 256},
    "small dictionaries": {"dictionary_pagesize_limit": 1024},
    "pages of version 2": {"data_page_version": "2.0"},
    "no dictionaries": {"use_dictionary": False},
    "no statistics": {"write_statistics": False},
    "page index": {"write_page_index": True},
    "checksums": {"write_page_checksum": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_genuine_files_are_read_as_arrow_reads_them(options: dict[str, Any], tmp_path: Path) -> None:
    table = genuine()
    data = written(table, **options)
    (tmp_path / "x").write_bytes(data)
    assert read_table(data) == read_table(tmp_path / "x") == table
    assert read_table(data, ["captions", "image_id"]) == table.select(["captions", "image_id"])
    batches = list(open_table(tmp_path / "x").iter_batches(1000))
    assert pa.Table.from_batches(batches) == table


def test_an_empty_file_is_read() -> None:
    table = genuine().slice(0, 0)
    assert read_table(written(table)) == table
    assert read_table(written(pa.table({}))) == pa.table({})


def test_the_densest_genuine_tables_are_far_from_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rejects that are all alike; without the bytes that any file may expand to."""
    monkeypatch.setattr(parquet, "FREE_BYTES", 0)
    count = 500_000
    alike = {"code": "bad_image", "message": "expected the image, found none"}
    columns = {
        "image_id": pa.array(np.arange(count)),
        "file_name": pa.array([f"{i:012}.jpg" for i in range(count)]),
        "key": pa.nulls(count, pa.string()),
        **{name: pa.array([text] * count) for name, text in alike.items()},
    }
    monkeypatch.setattr(parquet, "BYTES_PER_BYTE", parquet.BYTES_PER_BYTE * 3 // 4)
    file = open_table(written(pa.table(columns)), free_bytes=0)
    assert file.metadata.num_rows == count


def test_columns_that_are_not_there_are_named() -> None:
    with pytest.raises(TableError, match="expected the columns image_id, weight, found no weight"):
        read_table(written(genuine()), ["image_id", "weight"])


BOMBS: dict[str, Callable[[], bytes]] = {
    "rows": lambda: written(pa.table({"x": pa.nulls(80_000_000, pa.string())})),
    "equal numbers": lambda: written(pa.table({"x": np.zeros(40_000_000, np.int64)})),
    "page": lambda: written(
        pa.table({"x": [bytes(4 * 10**8)]}), use_dictionary=False, write_statistics=False
    ),
    "dictionary page": lambda: written(pa.table({"x": [bytes(4 * 10**8)]}), write_statistics=False),
    "repeated text": lambda: written(pa.table({"x": repeated(LONG, 100_000)})),
    "nested text": lambda: written(
        pa.table({"x": pa.ListArray.from_arrays([0, 50_000], repeated(LONG[: 10**6], 50_000))})
    ),
    "shared starts": lambda: written(
        pa.table({"x": repeated(LONG[: 10**5], 10_000).dictionary_decode()}),
        use_dictionary=False,
        column_encoding={"x": "DELTA_BYTE_ARRAY"},
    ),
}


def repeated(text: str, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), [text])


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_small_file_takes_little_memory(bomb: Callable[[], bytes], tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    assert (
        memory_of(lambda: path.write_bytes(bomb())) >= 0
    )  # in a process of its own: it takes memory to make
    assert path.stat().st_size < 4 * MIB

    def refuse() -> None:
        for read in (open_table, read_table):
            with pytest.raises(TableError, match=f"^{re.escape(str(path))}: expected a Parquet file"):
                read(path)

    assert memory_of(refuse) < MOST_MEMORY


def test_holes_do_not_count_as_size(tmp_path: Path) -> None:
    """A file that is as large as a disk may still take no more memory than what is in it allows."""
    path = tmp_path / "x.parquet"
    data = written(pa.table({"x": pa.nulls(80_000_000, pa.string())}))
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") :]
    with path.open("wb") as file:
        file.write(data.removesuffix(footer))
        file.seek(40 * 10**9)
        file.write(footer)
    with pytest.raises(TableError, match="to expand to"):
        open_table(path)


@pytest.mark.parametrize("footer_bytes", [0, 2**24 + 1, 2**32 - 1])
def test_a_footer_is_not_read_at_any_size(footer_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with path.open("wb") as file:
        file.truncate(10**10)
        file.seek(10**10)
        file.write(footer_bytes.to_bytes(4, "little") + b"PAR1")

    def refuse() -> None:
        with pytest.raises((OSError, ValueError)):
            open_table(path)

    assert memory_of(refuse) < 20 * MIB


def test_chunks_that_share_their_pages_count_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups may all name the same pages; the check ends before it has looked at all of them."""
    looked = 0
    real = parquet._struct

    def count(*arguments: Any) -> Any:
        nonlocal looked
        looked += 1
        return real(*arguments)

    monkeypatch.setattr(parquet, "_struct", count)
    data = written(pa.table({"x": np.zeros(10**6, np.int64)}), row_group_size=1000)
    with pytest.raises(TableError):
        open_table(data, free_bytes=-parquet.BYTES_PER_BYTE * len(data) + 50_000)
    assert 0 < looked < 50


@pytest.mark.parametrize(
    "texts",
    [
        ["one"],
        [f"{i:064}" for i in range(500)],
        [f"{i:064}" for i in range(500)] + [""] + [f"{i:064}" for i in range(500, 900)],
        ["x" * i for i in range(60)],
        ["", "a", "größer"],
    ],
    ids=["one", "digests", "digests and none", "of many lengths", "short"],
)
def test_texts_of_one_length_are_counted_without_reading_them(texts: list[str]) -> None:
    """Their longest, or all of them together where their lengths change too often."""
    data = written(pa.table({"x": texts * 3}))
    raw = pa.BufferReader(data)
    chunk = pq.ParquetFile(raw).metadata.row_group(0).column(0)
    page = next(parquet._pages(raw, chunk, parquet._Budget("x", len(data), 10**9)))
    longest = max(len(text.encode()) for text in texts)
    found = parquet._longest_text(raw, page, "ZSTD")
    assert found == (page.expanded_bytes if len(texts) == 60 else longest)


def varint(number: int) -> bytes:
    low = bytes([number & 127 | (128 if number > 127 else 0)])
    return low + varint(number >> 7) if number > 127 else low


def field(step: int, kind: int, content: bytes) -> bytes:
    """A field of a Thrift struct, so many numbers after the one before."""
    return bytes([step << 4 | kind]) + content


def number(value: int) -> bytes:
    return varint(value << 1 if value >= 0 else -value << 1 | 1)


I16, I32, DOUBLE, TEXT, STRUCT = 4, 5, 7, 8, 12
COUNTED = field(1, I32, number(10)) + field(1, I32, number(0))
START = field(1, I32, number(0)) + field(1, I32, number(80)) + field(1, I32, number(50))
HEADERS = {
    "fields twice": START + field(2, STRUCT, field(1, I32, number(10**9)) + b"\x04" + number(1) + number(1) + b"\0"),
    "another type": START + field(2, STRUCT, field(1, I16, number(1)) + field(1, I32, number(0)) + b"\0"),
    "a double": START + field(2, STRUCT, field(1, DOUBLE, bytes(8)) + field(1, I32, number(0)) + b"\0"),
    "a struct": START + field(2, STRUCT, field(1, STRUCT, b"\0") + field(1, I32, number(0)) + b"\0"),
    "a struct for a number": START + field(2, STRUCT, field(1, I32, number(1)) + field(1, STRUCT, b"\0") + b"\0"),
    "below zero": START + field(2, STRUCT, field(1, I32, number(-1)) + field(1, I32, number(0)) + b"\0"),
    "more than 32 bits": START + field(2, STRUCT, field(1, I32, number(2**32 + 1)) + field(1, I32, number(0)) + b"\0"),
    "deep": b"\x1c" * 2000,
    "cut": START + field(2, STRUCT, COUNTED),
    "no page of its kind": START,
    "an index": field(1, I32, number(1)) + START[2:] + field(2, STRUCT, COUNTED + b"\0"),
    "a list": field(1, 9, b"\0"),
}  # fmt: skip


def test_a_header_is_read() -> None:
    header = START + field(2, STRUCT, COUNTED + field(1, TEXT, b"\2xx") + b"\0") + b"\0"
    assert parquet._page(header + b"more", 7) == (0, 10, 0, 80, 7 + len(header), 50)


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_could_be_read_in_two_ways_is_refused(header: bytes) -> None:
    with pytest.raises((IndexError, KeyError, TypeError, ValueError)):
        parquet._page(header + b"\0", 0)


def test_headers_that_mean_harm_are_refused_or_read() -> None:
    data = written(genuine().slice(0, 300))
    columns = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    starts = [
        columns.column(i).dictionary_page_offset or columns.column(i).data_page_offset for i in range(8)
    ]
    rng = np.random.default_rng(0)
    refused = 0
    for seed in range(400):
        damaged = bytearray(data)
        at = int(starts[seed % len(starts)] + rng.integers(20))
        damaged[at] = rng.choice([0, 0x15, 0x1C, 0x2C, 0x5C, 0xFF, rng.integers(256)])
        try:
            read_table(bytes(damaged))
        except (OSError, ValueError, pa.ArrowException):  # and nothing else
            refused += 1
    assert refused > 200


def test_what_arrow_reads_otherwise_than_its_pages_say_is_refused() -> None:
    lists = pa.FixedSizeListArray.from_arrays(pa.nulls(40_000_000, pa.int8()), 4_000_000)
    few = written(pa.table({"x": pa.array([None] * 10, lists.type)}))
    assert len(few) < 10_000
    with pytest.raises(TableError, match="to expand to at most"):
        open_table(few)
    other = written(genuine()).replace(b"parquet-cpp-arrow", b"parquet-mr-arrows")
    with pytest.raises(TableError, match=r"found one that parquet-mr-arrows .* has written"):
        open_table(other)
    with pytest.raises(TableError, match=r"found one with the type decimal128\(9, 2\)"):
        open_table(written(pa.table({"x": pa.array([None], pa.decimal128(9, 2))})))
