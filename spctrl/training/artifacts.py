"""What stages made of the records, read from the store's packs (spctrl/store/store.py has their format)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spctrl.errors import ExpectedError
from spctrl.io.parquet import read_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

PACK_SUFFIXES = (".tar", ".safetensors")
_PLACES = pa.schema([("key", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
REMEDY = "`spctrl verify` drops what is damaged, the next build makes it again"


class StoredArtifacts:
    """One artifact of a stage for each record. No file stays open, and nothing is read before it is asked for.

    Attributes:
        sizes: (records,) int64, bytes.
    """

    def __init__(self, store: Path, stage: str, keys: pa.Array) -> None:
        """Find the artifacts of ``keys``.

        Raises:
            ExpectedError: some are not there; says how many, and which stage makes them.
        """
        self._stage = stage
        self._packs, table = _pack_indexes(store / "packs" / stage)
        found = pc.index_in(keys, value_set=table["key"].combine_chunks())
        missing = found.null_count
        if missing:
            raise ExpectedError(missing_artifacts(stage, missing, len(keys), f"the packs of {store}"))
        rows = table.take(found)
        self._pack: NDArray[np.int32] = rows["pack"].to_numpy()
        self._offsets: NDArray[np.int64] = rows["offset"].to_numpy()
        self.sizes: NDArray[np.int64] = rows["size"].to_numpy()

    def read(self, i: int) -> bytes:
        """Record i's artifact.

        Raises:
            ExpectedError: the pack is gone, or cut.
        """
        path, size = self._packs[self._pack[i]], int(self.sizes[i])
        try:
            with path.open("rb") as file:
                file.seek(int(self._offsets[i]))
                data: bytes = file.read(size)
        except OSError as error:
            raise ExpectedError(f"cannot read {path}: {error.strerror}. {REMEDY}") from error
        if len(data) < size:
            raise ExpectedError(
                f"{path}: expected {size} bytes at {self._offsets[i]}, found {len(data)}. {REMEDY}"
            )
        return data


def missing_artifacts(stage: str, missing: int, total: int, where: str) -> str:
    """The message for records that a stage has not made an artifact of."""
    return (
        f"expected {stage} of all {total:,} records in {where}, found none of {missing:,}. The stage {stage} makes "
        f"them: build with {stage} among [build] conditions (luigi --module pipelines BuildDataset)"
    )


def _pack_indexes(folder: Path) -> tuple[list[Path], pa.Table]:
    """Packs that are whole, and a row (key, offset, size, place in that list) for each of their artifacts."""
    packs: list[Path] = []
    tables = []
    for pack in sorted(path for path in folder.glob("[!.]*") if path.suffix in PACK_SUFFIXES):
        try:
            table = read_table(pack.with_suffix(".parquet"))
            table = table.filter(pc.is_null(table["code"])).select(_PLACES.names).cast(_PLACES)
        except (OSError, ValueError, KeyError, pa.ArrowException):
            continue  # a pack counts once its index is there
        if len(table) and _lie_within(table, pack.stat().st_size):
            tables.append(
                table.append_column("pack", pa.repeat(pa.scalar(len(packs), pa.int32()), len(table)))
            )
            packs.append(pack)
    schema = _PLACES.append(pa.field("pack", pa.int32()))
    return packs, pa.concat_tables([schema.empty_table(), *tables])


def _lie_within(table: pa.Table, pack_bytes: int) -> bool:
    """Whether all places are inside the pack; an index may claim any."""
    offsets, sizes = (table[name].to_numpy() for name in ("offset", "size"))
    return bool(
        ((offsets >= 0) & (sizes >= 0) & (sizes <= pack_bytes) & (offsets <= pack_bytes - sizes)).all()
    )
