"""Shards of any samples, as `datasets` and `webdataset` read them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spctrl.data.images import FORMATS
from spctrl.data.manifest import manifest_schema
from spctrl.export.shards import SHARD_WRITERS, shard_columns, shard_rows

Row = dict[str, Any]
NAMES = ("image", "spatext", "mask")
_MANIFEST_SCHEMA = manifest_schema(NAMES[1:])
SCHEMA = pa.schema([_MANIFEST_SCHEMA.field(name) for name in shard_columns(_MANIFEST_SCHEMA)])
FORMATS_AND_MPO = ("MPO", *FORMATS)
HEIGHT = 6
TYPES_COME_FROM = 6
"""One sample more than those from which `datasets` infers the types of columns."""


def bare_row(image_id: int) -> Row:
    """A record with an image and without anything optional."""
    required = {"dataset": "ap10k", "split": "train", "file_name": f"{image_id}.b.jpg", "image_digest": "0f"}
    lists: Row = {"captions": [], "instances": []}
    return {
        **dict.fromkeys(SCHEMA.names),
        **required,
        **lists,
        "image_id": image_id,
        "width": width_px(image_id),
        "height": HEIGHT,
    }


def full_row(image_id: int) -> Row:
    """A record with everything optional."""
    keypoints = [[1.0, 2.5, 2.0]]
    instance = {
        "annotation_id": 7,
        "category_id": 1,
        "category": "fox",
        "bbox_xywh": [0.5, 1.0, 2.0, 3.0],
        "area": 3.25,
        "iscrowd": False,
        "num_keypoints": 1,
        "keypoints": keypoints,
        "keypoints_21": keypoints,
    }
    mask = {"annotation_index": 0, "size": [2, 3], "counts": "06", "area": 6, "predicted_iou": 0.5}
    texts = {field.name: f"{field.name} of {image_id}" for field in SCHEMA if pa.types.is_string(field.type)}
    return {
        **bare_row(image_id),
        **texts,
        "background": 3,
        "image_orientation": 1,
        "captions": ["a fox", ""],
        "instances": [instance],
        "mask_instances": [mask],
    }


def without_image(row: Row) -> Row:
    return {**row, "image_digest": None, "image_phash": None, "image_orientation": None}


def width_px(image_id: int) -> int:
    return 8 + image_id


def image_file(image_id: int, kind: str, mode: str = "RGB") -> bytes:
    """A uniform image whose width tells images apart."""
    image = Image.new(mode, (width_px(image_id), HEIGHT), 128 if mode == "L" else (200, 120, 40))
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"save_all": True, "append_images": [image]} if kind == "MPO" else {}))
    return buffer.getvalue()


def written(
    folder: Path,
    rows: Sequence[Row],
    *,
    size: int,
    kind: str = "webdataset",
    formats: Mapping[int, str] | None = None,
) -> list[str]:
    """Paths of shards of the rows; `formats` are those of images, by id."""
    has_image = {row["image_id"] for row in rows if row["image_digest"] is not None}

    def read_files(image_id: int) -> dict[str, bytes]:
        files = {name: image_file(image_id, "PNG", "L") for name in NAMES[1:]}
        if image_id in has_image:
            files["image"] = image_file(image_id, (formats or {}).get(image_id, "JPEG"))
        return files

    folder.mkdir(exist_ok=True)
    paths = []
    for number, part in enumerate(shard_rows(pa.Table.from_pylist(list(rows), SCHEMA), kind, size)):
        paths.append(folder / f"{number:06d}.{kind}")
        SHARD_WRITERS[kind](paths[-1], part, NAMES, read_files)
    return [str(path) for path in paths]


Load = Callable[..., list[Row]]


@pytest.fixture(params=[False, True], ids=["whole", "streaming"])
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Load:
    """Samples as `datasets` reads them from files."""

    def loaded(paths: Sequence[str], kind: str = "webdataset") -> list[Row]:
        found = datasets.load_dataset(
            kind,
            data_files=list(paths),
            split="train",
            streaming=request.param,
            cache_dir=str(tmp_path / "cache"),
        )
        return list(found)

    return loaded


def key_of(row: Row) -> str:
    return f"{row['image_id']:012d}"


def row_of(fields: Row) -> Row:
    """A manifest's row from the JSON object of a sample, as README says to read it."""
    found: Row = {}
    for field in SCHEMA:
        value = fields[field.name]
        if pa.types.is_string(field.type):
            found[field.name] = value or None
        elif pa.types.is_integer(field.type):
            found[field.name] = None if value == -1 else value
        else:
            found[field.name] = json.loads(value)
    return found


BARE = [bare_row(image_id) for image_id in range(1, TYPES_COME_FROM + 1)]
FULL = [full_row(image_id) for image_id in range(11, 11 + TYPES_COME_FROM)]
LATER_FOX = {**bare_row(30), "category": "fox", "background": 1}
ORDERS = {
    "bare ones first": [*BARE, *FULL],
    "full ones first": [*FULL, *BARE],
    "mixed": [each for pair in zip(BARE, FULL, strict=True) for each in pair],
    "bare ones and one value": [*BARE, LATER_FOX],
}


@pytest.mark.parametrize("size", [100, 5])
@pytest.mark.parametrize("rows", ORDERS.values(), ids=ORDERS)
def test_datasets_reads_all_labels_whatever_the_first_samples_lack(
    rows: list[Row], size: int, load: Load, tmp_path: Path
) -> None:
    found = load(written(tmp_path / "shards", rows, size=size))
    assert [each["__key__"] for each in found] == [key_of(row) for row in rows]
    assert [row_of(each["json"]) for each in found] == rows
    for row, sample in zip(rows, found, strict=True):
        assert set(sample) == {"__key__", "__url__", "jpg", "spatext.png", "mask.png", "json"}
        assert all(sample[name].width == row["width"] for name in ("jpg", "spatext.png", "mask.png"))


@pytest.mark.parametrize("first", FORMATS_AND_MPO)
def test_datasets_opens_images_of_all_formats_whichever_comes_first(
    first: str, load: Load, tmp_path: Path
) -> None:
    later = [kind for kind in FORMATS_AND_MPO if kind != first]
    formats = dict(enumerate([*[first] * TYPES_COME_FROM, *later], 1))
    rows = [bare_row(image_id) for image_id in formats]
    found = load(written(tmp_path / "shards", rows, size=TYPES_COME_FROM + 2, formats=formats))
    assert [each["jpg"].size for each in found] == [(width_px(image_id), HEIGHT) for image_id in formats]
    assert [each["jpg"].format for each in found] == list(formats.values())


@pytest.mark.parametrize("size", [100, 3])
@pytest.mark.parametrize("without_image_ids", [{1}, {2, 8}, set(range(1, 7)), set(range(1, 9))])
def test_samples_without_an_image_come_last_and_in_tars_of_their_own(
    without_image_ids: set[int], size: int, load: Load, tmp_path: Path
) -> None:
    rows = [full_row(image_id) for image_id in range(1, 9)]
    rows = [without_image(row) if row["image_id"] in without_image_ids else row for row in rows]
    paths = written(tmp_path / "shards", rows, size=size)
    expected = sorted(rows, key=lambda row: row["image_id"] in without_image_ids)
    found = load(paths)
    assert [row_of(each["json"]) for each in found] == expected
    for row, sample in zip(expected, found, strict=True):
        image = sample.get("jpg")
        assert (image is None) == (row["image_id"] in without_image_ids)
        assert image is None or image.width == row["width"]
        assert sample["mask.png"].width == row["width"]
    apart = [{each.get("jpg") is None for each in load([path])} for path in paths]
    assert all(len(kinds) == 1 for kinds in apart)


def test_rows_of_parquet_files_keep_their_order() -> None:
    rows = [without_image(bare_row(1)), bare_row(2), bare_row(3)]
    parts = shard_rows(pa.Table.from_pylist(rows, SCHEMA), "parquet", 2)
    assert [part.column("image_id").to_pylist() for part in parts] == [[1, 2], [3]]


def test_datasets_reads_parquet_whatever_the_first_samples_lack(load: Load, tmp_path: Path) -> None:
    rows = [*map(without_image, BARE), *FULL]
    formats = dict(zip((row["image_id"] for row in FULL), FORMATS_AND_MPO, strict=False))
    found = load(
        written(tmp_path / "shards", rows, size=TYPES_COME_FROM, kind="parquet", formats=formats), "parquet"
    )
    assert [{name: each[name] for name in SCHEMA.names} for each in found] == rows
    assert [each["image"] and each["image"].width for each in found] == [
        row["width"] if row["image_digest"] else None for row in rows
    ]


@pytest.mark.parametrize(
    ("kind", "suffix"), [("MPO", "jpg"), ("JPEG", "jpg"), ("PNG", "png"), ("TIFF", "tiff")]
)
def test_names_of_images_in_parquet_have_the_suffix_of_their_contents(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    (path,) = written(tmp_path / "shards", BARE[:1], size=1, kind="parquet", formats={1: kind})
    (value,) = pq.read_table(path).column("image").to_pylist()
    assert value["path"] == f"000000000001.{suffix}"


def webdataset_samples(paths: Sequence[str], spec: str) -> Iterator[Row]:
    import webdataset

    yield from webdataset.WebDataset(list(paths), shardshuffle=False).decode(spec)


@pytest.mark.parametrize("size", [100, 3])
def test_webdataset_decodes_images_of_all_formats_and_labels(size: int, tmp_path: Path) -> None:
    formats = dict(enumerate(FORMATS_AND_MPO, 1))
    rows = [full_row(image_id) if image_id % 2 else bare_row(image_id) for image_id in formats]
    paths = written(tmp_path / "shards", rows, size=size, formats=formats)
    found = list(webdataset_samples(paths, "pil"))
    assert [row_of(each["json"]) for each in found] == rows
    for row, sample in zip(rows, found, strict=True):
        assert all(sample[name].width == row["width"] for name in ("jpg", "spatext.png", "mask.png"))
    shapes = [each["jpg"].shape for each in webdataset_samples(paths, "rgb8")]
    assert shapes == [(HEIGHT, row["width"], 3) for row in rows]
