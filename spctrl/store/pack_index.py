"""The index of a pack, a Parquet file beside it: where in the pack each key's artifact lies, or why there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from spctrl.storage import Info
from spctrl.store.digests import KEY_BYTES
from spctrl.store.packs import (
    MAX_ARTIFACT_BYTES,
    SAFETENSORS,
    TAR,
    container_size,
)

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from numpy.typing import NDArray

MAX_INDEX_BYTES, MAX_INDEX_ROWS, FREE_INDEX_BYTES = 2**23, 2**16, 2**26
"""Of a pack's index, which has some ten thousand rows at most; the last is what it may expand to whatever its size."""
LARGEST_OFFSET = 2**62
ODD_NUMBER, LARGEST_NUMBER = 0x9E3779B97F4A7C15, 2**64 - 1


class Location(NamedTuple):
    """Where an artifact lies, or why there is none (``code`` and ``message``)."""

    pack: str
    offset: int
    size: int
    digest: str
    code: str | None = None
    message: str | None = None


def pack_name(stage: str, pack: str) -> str:
    """A pack's name in the store."""
    return f"packs/{stage}/{pack}"


def index_name(stage: str, pack: str) -> str:
    """The name of a pack's index."""
    return f"packs/{stage}/{PurePosixPath(pack).stem}.parquet"


def results_table(locations: Mapping[str, Location]) -> pa.Table:
    """Results by key as columns: a row takes a hundred bytes, where an object takes a thousand."""
    import pyarrow as pa

    columns = list(zip(*locations.values(), strict=True)) or [()] * len(Location._fields)
    pack = pa.field("pack", pa.dictionary(pa.int32(), pa.string()))
    return pa.table([list(locations), *columns], schema=_index_schema().insert(1, pack))


def packs_in(listing: Mapping[str, Info]) -> dict[str, Info]:
    names = sorted(name for name in listing if name.endswith((TAR, SAFETENSORS)))
    return {PurePosixPath(name).name: listing[name] for name in names}


def has_index(stage: str, pack: str, listing: Mapping[str, Info]) -> bool:
    """Whether a pack has an index of a size that can be read."""
    found = listing.get(index_name(stage, pack))
    return found is not None and found.size <= MAX_INDEX_BYTES


def _wanted_results(pack: str, size: int, index: bytes, wanted: NDArray[np.uint64]) -> pa.Table:
    """Rows of a pack's index whose keys have a wanted number; none where the pack or its index is damaged."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    nothing = results_table({})
    try:
        # Most packs hold nothing that is wanted: their other columns are not even looked at.
        keys = _open_index(index, ["key"]).read(["key"], use_threads=False).column("key").cast(pa.string())
        numbers = _key_numbers(keys)
        is_wanted = wanted[np.searchsorted(wanted, numbers)] == numbers
        table = _index_table(_open_index(index)) if is_wanted.any() else None
    except (OSError, ValueError, KeyError, pa.ArrowException):  # ValueError: keys that are not ASCII
        return nothing
    if table is None:
        return nothing
    end = pc.max(pc.add(table.column("offset"), table.column("size"))).as_py()
    if size != container_size(PurePosixPath(pack).suffix, [(0, end)]):
        return nothing
    rows = table.filter(pa.array(is_wanted))
    return rows.add_column(1, nothing.field("pack"), pa.array([pack] * len(rows)).dictionary_encode())


def matching_results(packs: Iterable[tuple[str, int, bytes]], keys: pa.ChunkedArray) -> pa.Table:
    """What packs hold of some keys, as ``results_table``.

    Args:
        packs: of each its file name, its size in bytes, and the contents of its index.
        keys: ASCII strings.

    Returns:
        The rows in the order of the packs. Rows of a few other keys may be among them; a pack that is cut or has a
        damaged index gives none.
    """
    import numpy as np
    import pyarrow as pa

    wanted = np.sort(np.concatenate([*map(_key_numbers, keys.chunks), [LARGEST_NUMBER]]))
    found = (_wanted_results(pack, size, index, wanted) for pack, size, index in packs)
    return pa.concat_tables([results_table({}), *found])


def _key_numbers(keys: pa.Array | pa.ChunkedArray) -> NDArray[np.uint64]:
    """A number for each key. Two keys that share one would be found together, which does no harm."""
    import numpy as np

    words = np.array(keys.to_pylist(), f"S{2 * KEY_BYTES}").view(np.uint64).reshape(-1, KEY_BYTES // 4)
    return words[:, 0] * ODD_NUMBER + words[:, 1]


def locations_in(pack: str, index: bytes) -> dict[str, Location] | None:
    """What an index lists, by key; None where it is damaged."""
    import pyarrow as pa

    try:
        table = _index_table(_open_index(index))
    except (OSError, ValueError, pa.ArrowException):
        table = None
    if table is None:
        return None
    columns = (column.to_pylist() for column in table.columns)
    return {key: Location(pack, *row) for key, *row in zip(*columns, strict=True)}


def _open_index(index: bytes, columns: Sequence[str] | None = None) -> pq.ParquetFile:
    """A pack's index, or some of its columns, before it is decoded.

    Raises:
        OSError, ValueError, pa.ArrowException: it is damaged.
    """
    from spctrl.io.parquet import open_table

    file = open_table(index, columns, free_bytes=FREE_INDEX_BYTES)
    rows = file.metadata.num_rows
    # Every row has a key of its own, and keys are digests, which cannot be compressed.
    if rows > min(len(index) // KEY_BYTES, MAX_INDEX_ROWS):
        raise ValueError(
            f"expected a pack's index of {len(index):,} bytes to have fewer rows, found {rows:,}"
        )
    return file


def _index_table(file: pq.ParquetFile) -> pa.Table | None:
    """A pack's index; None where it is damaged."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        table = file.read(use_threads=False).select(_index_schema().names).cast(_index_schema())
        table.validate(full=True)
    except (OSError, ValueError, KeyError, pa.ArrowException):  # ValueError: names that are no UTF-8
        return None
    if any(table.column(name).null_count for name in ("key", "offset", "size", "digest")):
        return None
    if len(table) == 0:
        return table
    offsets, sizes = table.column("offset"), table.column("size")
    lowest = min(pc.min(offsets).as_py(), pc.min(sizes).as_py())
    if lowest < 0 or pc.max(offsets).as_py() >= LARGEST_OFFSET or pc.max(sizes).as_py() > MAX_ARTIFACT_BYTES:
        return None
    # Artifacts do not overlap; those that did would take any time to read.
    return table if pc.sum(sizes).as_py() <= pc.max(pc.add(offsets, sizes)).as_py() else None


def _index_schema() -> pa.Schema:
    """Columns of a pack's index."""
    import pyarrow as pa

    texts = {name: pa.string() for name in ("key", "digest", "code", "message")}
    numbers = {name: pa.int64() for name in ("offset", "size")}
    order = ("key", "offset", "size", "digest", "code", "message")
    return pa.schema([(name, {**texts, **numbers}[name]) for name in order])
