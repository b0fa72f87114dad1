"""Exports that hold the files themselves, many samples a file: WebDataset tars and Parquet with image columns."""

from __future__ import annotations

import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spctrl.data.images import opened_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    ReadFiles = Callable[[int], Mapping[str, bytes]]
    """Files of an image id by name; what the record lacks is not there."""

IMAGE = "image"
_IMAGE_MEMBER = "jpg"
"""Suffix of the image in a tar, whatever its format. Loaders take a member's suffix for a column's name, which all
samples must share; they open images by content, and all versions of them know this suffix for one of images."""
_ABSENT_TEXT, _ABSENT_NUMBER = "", -1
ROWS_PER_GROUP = 100
"""Of a Parquet file, and held in memory at a time; viewers and loaders read whole groups of rows."""
_IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""Storage of the feature ``Image`` of Hugging Face's ``datasets``."""


def shard_columns(schema: pa.Schema) -> list[str]:
    """A manifest's columns without those that name files of the triplet folders."""
    return [name for name in schema.names if not name.endswith("_path")]


def shard_rows(rows: pa.Table, kind: str, size: int) -> Iterator[pa.Table]:
    """The rows of each shard of a split, at most ``size``.

    Loaders of tars take the columns of all samples from the first few, so no tar mixes samples with and without an
    image; those without come last. Parquet files state their columns and keep the manifest's order.

    Args:
        rows: of a manifest.
        kind: ``webdataset`` or ``parquet``.
        size: in rows, above 0.
    """
    for part in _by_image(rows) if kind == "webdataset" else [rows]:
        for first in range(0, len(part), size):
            yield part.slice(first, size).combine_chunks()


def _by_image(rows: pa.Table) -> list[pa.Table]:
    """The rows that have an image, and those that have none."""
    digests = rows.column("image_digest")
    if not digests.null_count:  # nearly always: filters copy
        return [rows]
    has_image = pc.is_valid(digests)
    return [rows.filter(has_image), rows.filter(pc.invert(has_image))]


def write_webdataset(path: Path, rows: pa.Table, names: Sequence[str], read_files: ReadFiles) -> None:
    """Write a tar that ``webdataset`` and ``datasets.load_dataset("webdataset", ...)`` read; equal input gives equal
    bytes.

    A sample's members are ``<key>.jpg`` (the image, whatever its format), ``<key>.<condition>.png`` and
    ``<key>.json``. The key is made from the image id: loaders split names at the first dot, and names of
    annotation files may hold anything. The JSON object holds the row in types that are the same in all samples, since
    ``datasets`` infers them from the first few: an absent text is ``""``, an absent whole number -1, and a list, empty
    or not, is JSON text.

    Args:
        path: of the tar.
        rows: of a manifest.
        names: of the files that samples have, in order; ``image`` is the image, others are conditions (PNG).
        read_files: asked for each row.
    """
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for batch in _batches(rows):
            for row in batch.to_pylist():
                fields = {
                    name: _field_value(value, rows.schema.field(name).type) for name, value in row.items()
                }
                for name, data in _members(fields, names, read_files(row["image_id"])):
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
    fields: dict[str, Any], names: Sequence[str], files: Mapping[str, bytes]
) -> Iterator[tuple[str, bytes]]:
    key = _key(fields["image_id"])
    for name in names:
        if name in files:
            yield f"{key}.{_IMAGE_MEMBER if name == IMAGE else f'{name}.png'}", files[name]
    yield f"{key}.json", msgspec.json.encode(fields)


def _field_value(value: Any, kind: pa.DataType) -> str | int:
    """A value of a manifest's column in a JSON type that depends on the column alone."""
    if pa.types.is_string(kind):
        return _ABSENT_TEXT if value is None else str(value)
    if pa.types.is_integer(kind):
        return _ABSENT_NUMBER if value is None else int(value)
    return msgspec.json.encode(value).decode()


def _image_value(image_id: int, name: str, files: Mapping[str, bytes]) -> dict[str, Any] | None:
    if name not in files:
        return None
    suffix = _image_suffix(files[name]) if name == IMAGE else f"{name}.png"
    return {"bytes": files[name], "path": f"{_key(image_id)}.{suffix}"}


def _key(image_id: int) -> str:
    return f"{image_id:012d}"


def _image_suffix(data: bytes) -> str:
    """By content: the annotated name may have none, or a wrong one.

    MPO, which many phones write, is a JPEG with more images behind the first; readers know it by JPEG's suffix.
    """
    with opened_image(data) as image:  # reads the header only
        found = str(image.format)
    return "jpg" if found in ("JPEG", "MPO") else found.lower()
