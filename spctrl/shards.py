"""Exports that hold the files themselves, many samples a file: WebDataset tars and Parquet with image columns."""

from __future__ import annotations

import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from spctrl.images import opened_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    ReadFiles = Callable[[int], Mapping[str, bytes]]
    """Files of an image id by name; what the record lacks is not there."""

IMAGE = "image"
ROWS_PER_GROUP = 100
"""Of a Parquet file, and held in memory at a time; viewers and loaders read whole groups of rows."""
_IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""Storage of the feature ``Image`` of Hugging Face's ``datasets``."""


def shard_columns(schema: pa.Schema) -> list[str]:
    """A manifest's columns without those that name files of the triplet folders."""
    return [name for name in schema.names if not name.endswith("_path")]


def write_webdataset(path: Path, rows: pa.Table, names: Sequence[str], read_files: ReadFiles) -> None:
    """Write a tar that WebDataset loaders read; equal input gives equal bytes.

    A sample's members are ``<key>.jpg`` (or what the image's bytes are), ``<key>.<condition>.png`` and
    ``<key>.json``. The key is made from the image id: loaders split names at the first dot, and names of
    annotation files may hold anything.

    Args:
        path: of the tar.
        rows: of a manifest.
        names: of the files that samples have, in order; ``image`` is the image, others are conditions (PNG).
        read_files: asked for each row.
    """
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for batch in _batches(rows):
            for row in batch.to_pylist():
                for name, data in _members(row, names, read_files(row["image_id"])):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_parquet(path: Path, rows: pa.Table, names: Sequence[str], read_files: ReadFiles) -> None:
    """Write a Parquet file that ``datasets.load_dataset("parquet", ...)`` shows with images.

    The columns are those of ``rows``, then one struct of ``bytes`` and ``path`` (a name such as
    ``000000000001.spatext.png``) for each file; null where a record lacks it. Arguments as for
    ``write_webdataset``.
    """
    features = {"info": {"features": {name: {"_type": "Image"} for name in names}}}
    fields = [*rows.schema, *(pa.field(name, _IMAGE_TYPE) for name in names)]
    schema = pa.schema(fields, {"huggingface": json.dumps(features)})
    # Images do not compress, and a dictionary of them would hold each a second time.
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for batch in _batches(rows):
            found = [(image_id, read_files(image_id)) for image_id in batch.column("image_id").to_pylist()]
            images = [
                pa.array([_image_value(image_id, name, files) for image_id, files in found], _IMAGE_TYPE)
                for name in names
            ]
            writer.write_batch(pa.RecordBatch.from_arrays([*batch.columns, *images], schema=schema))


SHARD_WRITERS = {"webdataset": write_webdataset, "parquet": write_parquet}


def _batches(rows: pa.Table) -> list[pa.RecordBatch]:
    """The same whatever chunks the table has."""
    batches: list[pa.RecordBatch] = rows.combine_chunks().to_batches(ROWS_PER_GROUP)
    return batches


def _members(
    row: dict[str, Any], names: Sequence[str], files: Mapping[str, bytes]
) -> Iterator[tuple[str, bytes]]:
    for name in names:
        if name in files:
            yield _file_name(row["image_id"], name, files[name]), files[name]
    yield f"{_key(row['image_id'])}.json", msgspec.json.encode(row)


def _image_value(image_id: int, name: str, files: Mapping[str, bytes]) -> dict[str, Any] | None:
    if name not in files:
        return None
    return {"bytes": files[name], "path": _file_name(image_id, name, files[name])}


def _file_name(image_id: int, name: str, data: bytes) -> str:
    return f"{_key(image_id)}.{_image_suffix(data) if name == IMAGE else f'{name}.png'}"


def _key(image_id: int) -> str:
    return f"{image_id:012d}"


def _image_suffix(data: bytes) -> str:
    """By content: the annotated name may have none, or a wrong one."""
    with opened_image(data) as image:  # reads the header only
        found = str(image.format).lower()
    return "jpg" if found == "jpeg" else found
