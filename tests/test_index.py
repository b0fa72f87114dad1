"""The index: order, exactness, what its digests depend on, and the way back from the table to records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spctrl.data.annotations.decode import read_annotations
from spctrl.data.datasets import AP10K, HUMANART, Dataset
from spctrl.data.index import INDEX_SCHEMA, index_batches, write_index
from spctrl.data.records import RECORD_SCHEMA, REJECT_SCHEMA, Record, records_from_table

Json = dict[str, Any]
MAX_PIXELS = 10**8


def annotation(annotation_id: int, image_id: int, rng: np.random.Generator, **more: Any) -> Json:
    keypoints = rng.uniform(0, 400, (17, 3))
    keypoints[:, 2] = rng.integers(0, 3, 17)
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": int(rng.integers(1, 3)),
        "bbox": rng.uniform(0, 300, 4).tolist(),
        "area": rng.uniform(1, 1e5),
        "iscrowd": int(rng.integers(0, 2)),
        "num_keypoints": int((keypoints[:, 2] > 0).sum()),
        "keypoints": keypoints.ravel().tolist(),
        **more,
    }


def document(dataset: Dataset = AP10K, images: int = 12) -> Json:
    """Images in no order of ids, annotations in no order of images; one to three instances of each."""
    rng = np.random.default_rng(5)
    ids = rng.permutation(np.arange(100, 100 + images)).tolist()
    prefix = "HumanArt/images/" if dataset is HUMANART else ""
    owners = rng.permutation([each for n, each in enumerate(ids) for _ in range(1 + n % 3)]).tolist()
    keys = rng.permutation(len(owners)).tolist()
    return {
        "images": [
            {"id": each, "file_name": f"{prefix}{each}.jpg", "width": 400, "height": 401} for each in ids
        ],
        "annotations": [annotation(key, owner, rng) for key, owner in zip(keys, owners, strict=True)],
        "categories": [{"id": 1, "name": "fox"}, {"id": 2, "name": "polar bear"}],
    }


def table_of(
    folder: Path, content: Json, dataset: Dataset = AP10K, rows_per_batch: int | None = None
) -> pa.Table:
    source = folder / "annotations.json"
    source.write_text(json.dumps(content))
    if rows_per_batch is None:
        write_index(source, dataset, "val", folder / "index.parquet", max_pixels=MAX_PIXELS)
        return pq.read_table(folder / "index.parquet")
    annotations = read_annotations(source, dataset, max_pixels=MAX_PIXELS)
    return pa.Table.from_batches(index_batches(annotations, dataset, "val", rows_per_batch=rows_per_batch))


def digests(folder: Path, content: Json) -> dict[int, str]:
    table = table_of(folder, content)
    return dict(zip(table["image_id"].to_pylist(), table["drawing_digest"].to_pylist(), strict=True))


def instances_of(content: Json, image_id: int) -> list[Json]:
    return [each for each in content["annotations"] if each["image_id"] == image_id]


def assert_equal(found: Record, content: Json) -> None:
    image = next(each for each in content["images"] if each["id"] == found.image_id)
    instances = instances_of(content, found.image_id)
    keypoints = [np.reshape(each["keypoints"], (17, 3)) for each in instances]
    assert (found.file_name, found.size_wh) == (image["file_name"], (image["width"], image["height"]))
    assert found.keypoints.dtype == found.bboxes_xywh.dtype == np.float64
    assert found.keypoints.tolist() == [each.tolist() for each in keypoints]
    assert found.bboxes_xywh.tolist() == [each["bbox"] for each in instances]


def test_the_written_schema_is_the_documented_one(tmp_path: Path) -> None:
    table = table_of(tmp_path, document())
    assert table.schema.remove_metadata() == INDEX_SCHEMA
    assert INDEX_SCHEMA.names[:-1] == RECORD_SCHEMA.names
    index = write_index(
        tmp_path / "annotations.json", AP10K, "val", tmp_path / "again.parquet", max_pixels=MAX_PIXELS
    )
    assert index.rejects.schema == REJECT_SCHEMA
    assert index.rejects.num_rows == 0


def test_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "annotations.json"
    source.write_text(json.dumps(document()))
    for name in "ab":
        write_index(source, AP10K, "val", tmp_path / name, max_pixels=MAX_PIXELS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_images_keep_the_order_of_the_file_and_instances_that_of_the_annotations(tmp_path: Path) -> None:
    content = document()
    rows = table_of(tmp_path, content).to_pylist()
    assert [row["image_id"] for row in rows] == [each["id"] for each in content["images"]]
    for row in rows:
        expected = [each["id"] for each in instances_of(content, row["image_id"])]
        assert [each["annotation_id"] for each in row["instances"]] == expected
    assert any(len(row["instances"]) > 1 for row in rows)


def test_every_number_is_kept_exactly(tmp_path: Path) -> None:
    content = document()
    content["annotations"][0]["keypoints"][0] = 0.1 + 0.2
    content["annotations"][0]["bbox"][0] = 1 / 3
    names = {1: "fox", 2: "polar bear"}
    for row in table_of(tmp_path, content).to_pylist():
        for found, raw in zip(row["instances"], instances_of(content, row["image_id"]), strict=True):
            assert [number for point in found["keypoints"] for number in point] == raw["keypoints"]
            assert found["bbox_xywh"] == raw["bbox"]
            assert found["area"] == raw["area"]
            assert found["iscrowd"] is bool(raw["iscrowd"])
            assert found["num_keypoints"] == raw["num_keypoints"]
            assert (found["category_id"], found["category"]) == (
                raw["category_id"],
                names[raw["category_id"]],
            )
            assert found["keypoints_21"] is None


def test_columns_of_ap10k(tmp_path: Path) -> None:
    content = document()
    content["images"][0]["background"] = 88
    first, second, *_ = table_of(tmp_path, content).to_pylist()
    assert (first["dataset"], first["split"], first["width"], first["height"]) == ("ap10k", "val", 400, 401)
    assert (first["background"], first["background_name"]) == (88, "dark")
    assert (second["background"], second["background_name"]) == (None, None)
    assert (first["category"], first["captions"], first["author"]) == (None, [], None)
    assert (first["licence"], first["source_url"]) == (AP10K.licence, AP10K.source_url)


def test_columns_of_humanart(tmp_path: Path) -> None:
    content = document(HUMANART)
    content["images"][0] |= {
        "page_url": "https://example.org/1",
        "author": "A. Painter",
        "description": "a dancer — 舞",
        "category": "oil_painting",
    }
    first, second, *_ = table_of(tmp_path, content, HUMANART).to_pylist()
    assert (first["dataset"], first["category"], first["author"]) == (
        "humanart",
        "oil_painting",
        "A. Painter",
    )
    assert (first["captions"], first["source_url"]) == (["a dancer — 舞"], "https://example.org/1")
    assert (second["captions"], second["source_url"]) == ([], HUMANART.source_url)


@pytest.mark.parametrize("text", ["None", "", None])
def test_an_unknown_author_or_page_of_humanart_is_none(tmp_path: Path, text: str | None) -> None:
    content = document(HUMANART)
    content["images"][0] |= {"page_url": text, "author": text}
    first, *_ = table_of(tmp_path, content, HUMANART).to_pylist()
    assert (first["author"], first["source_url"]) == (None, HUMANART.source_url)


@pytest.mark.parametrize("rows_per_batch", [1, 3, 5, 12, 100])
def test_the_batch_size_changes_nothing(tmp_path: Path, rows_per_batch: int) -> None:
    content = document()
    for position, each in enumerate(content["annotations"]):
        if position % 3:
            each["keypoints_21"] = [float(each["id"])] * 63
    whole = table_of(tmp_path, content).replace_schema_metadata()
    parts = table_of(tmp_path, content, rows_per_batch=rows_per_batch)
    assert parts.to_pylist() == whole.to_pylist()


# 21 keypoints


@pytest.mark.parametrize("having", ["none", "all", "first", "last", "every other"])
def test_21_keypoints_stay_with_the_instances_that_have_them(tmp_path: Path, having: str) -> None:
    content = document(HUMANART)
    last = len(content["annotations"]) - 1
    for position, each in enumerate(content["annotations"]):
        wanted = {"none": False, "all": True, "first": not position, "last": position == last}
        if wanted.get(having, position % 2 == 1):
            each["keypoints_21"] = [each["id"] + number / 100 for number in range(63)]
    for row in table_of(tmp_path, content, HUMANART).to_pylist():
        for found, raw in zip(row["instances"], instances_of(content, row["image_id"]), strict=True):
            flat = found["keypoints_21"] and [number for point in found["keypoints_21"] for number in point]
            assert flat == raw.get("keypoints_21")


def test_21_keypoints_stay_aligned_where_images_are_rejected(tmp_path: Path) -> None:
    content = document(HUMANART)
    for each in content["annotations"]:
        each["keypoints_21"] = [float(each["id"])] * 63
    rejected = content["annotations"][1]["image_id"]
    content["annotations"][1]["bbox"] = [0]
    rows = table_of(tmp_path, content, HUMANART).to_pylist()
    assert rejected not in [row["image_id"] for row in rows]
    found = [each for row in rows for each in row["instances"]]
    assert len(found) == sum(each["image_id"] != rejected for each in content["annotations"])
    assert all(each["keypoints_21"] == [[float(each["annotation_id"])] * 3] * 21 for each in found)


# Drawing digests


def first_with_instances(content: Json) -> int:
    found: int = content["annotations"][0]["image_id"]
    return found


@pytest.mark.parametrize("key", ["width", "height"])
def test_the_digest_changes_with_the_size(tmp_path: Path, key: str) -> None:
    content = document()
    before = digests(tmp_path, content)
    for number in (0, 1):
        content["images"][number][key] += 1
    after = digests(tmp_path, content)
    changed = {each["id"] for each in content["images"][:2]}
    assert {image_id for image_id in before if before[image_id] != after[image_id]} == changed


def test_width_and_height_do_not_change_places_unseen(tmp_path: Path) -> None:
    content = document()
    before = digests(tmp_path, content)
    for each in content["images"]:
        each["width"], each["height"] = each["height"], each["width"]
    assert set(before.values()).isdisjoint(digests(tmp_path, content).values())


@pytest.mark.parametrize("number", [0, 1, 2, 50])
def test_the_digest_changes_with_each_number_of_a_keypoint(tmp_path: Path, number: int) -> None:
    content = document()
    before = digests(tmp_path, content)
    keypoints = content["annotations"][0]["keypoints"]
    keypoints[number] = (keypoints[number] + 1) % 3 if number % 3 == 2 else np.nextafter(keypoints[number], 0)
    after = digests(tmp_path, content)
    changed = {image_id for image_id in before if before[image_id] != after[image_id]}
    assert changed == {first_with_instances(content)}


def test_the_digest_changes_with_the_order_and_number_of_instances(tmp_path: Path) -> None:
    content = document()
    owner = next(each["id"] for each in content["images"] if len(instances_of(content, each["id"])) > 1)
    before = digests(tmp_path, content)
    content["annotations"].reverse()
    swapped = digests(tmp_path, content)
    content["annotations"].remove(instances_of(content, owner)[0])
    fewer = digests(tmp_path, content)
    assert len({before[owner], swapped[owner], fewer[owner]}) == 3


def test_the_digest_does_not_depend_on_anything_else(tmp_path: Path) -> None:
    content = document()
    before = digests(tmp_path, content)
    for each in content["annotations"]:
        each |= {"bbox": [1, 2, 3, 4], "area": 7, "category_id": 1, "iscrowd": 1, "num_keypoints": 0}
        each |= {"id": each["id"] + 1000, "keypoints_21": [0] * 63}
    for each in content["images"]:
        each |= {"file_name": f"other/{each['id']}.png", "background": 3, "author": "someone"}
    assert digests(tmp_path, content) == before


def test_the_digest_does_not_depend_on_other_images(tmp_path: Path) -> None:
    content = document()
    before = digests(tmp_path, content)
    kept = content["images"][5:8]
    content["images"] = [*reversed(kept)]
    ids = {each["id"] for each in kept}
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] in ids]
    assert digests(tmp_path, content) == {image_id: before[image_id] for image_id in ids}


def test_equal_drawings_have_equal_digests(tmp_path: Path) -> None:
    content = document()
    copied = [dict(each) for each in content["images"]]
    for each in copied:
        each |= {"id": each["id"] + 1000, "file_name": f"copy/{each['file_name']}"}
    count = len(content["annotations"])
    content["annotations"] += [
        {**each, "id": each["id"] + count, "image_id": each["image_id"] + 1000}
        for each in content["annotations"]
    ]
    content["images"] += copied
    found = digests(tmp_path, content)
    assert all(found[each["id"]] == found[each["id"] - 1000] for each in copied)


# From the table back to records


def test_records_are_what_the_file_says(tmp_path: Path) -> None:
    content = document()
    records = records_from_table(table_of(tmp_path, content))
    assert [record.image_id for record in records] == [each["id"] for each in content["images"]]
    for record in records:
        assert_equal(record, content)
        assert record.keypoints.shape == (len(instances_of(content, record.image_id)), 17, 3)


@pytest.mark.parametrize("bounds", [(0, 1), (1, 3), (4, 5), (5, 12), (3, 3), (11, 12)])
@pytest.mark.parametrize("batched", [False, True])
def test_records_of_a_slice(tmp_path: Path, bounds: tuple[int, int], batched: bool) -> None:
    content = document()
    table = table_of(tmp_path, content)
    start, stop = bounds
    part = table.slice(start, stop - start)
    source = part.combine_chunks().to_batches()[0] if batched and stop > start else part
    records = records_from_table(source)
    assert [record.image_id for record in records] == [each["id"] for each in content["images"][start:stop]]
    for record in records:
        assert_equal(record, content)


def test_records_of_slices_of_record_batches(tmp_path: Path) -> None:
    content = document()
    (batch,) = table_of(tmp_path, content).combine_chunks().to_batches()
    for start in range(batch.num_rows):
        (record,) = records_from_table(batch.slice(start, 1))
        assert_equal(record, content)


def test_records_of_a_filtered_table(tmp_path: Path) -> None:
    content = document()
    table = table_of(tmp_path, content, rows_per_batch=5)
    wanted = [number % 3 != 1 for number in range(len(table))]
    for source in (table.filter(pa.array(wanted)), table.take([7, 2, 2, 0])):
        records = records_from_table(source)
        assert [record.image_id for record in records] == source["image_id"].to_pylist()
        for record in records:
            assert_equal(record, content)


def test_records_of_a_table_of_many_chunks(tmp_path: Path) -> None:
    content = document()
    table = table_of(tmp_path, content, rows_per_batch=5)
    assert table["instances"].num_chunks > 1
    for record in records_from_table(table):
        assert_equal(record, content)


def test_records_read_from_parquet_in_batches(tmp_path: Path) -> None:
    content = document()
    table_of(tmp_path, content)
    for batch in pq.ParquetFile(tmp_path / "index.parquet").iter_batches(5):
        for record in records_from_table(batch):
            assert_equal(record, content)


def test_records_of_an_empty_table(tmp_path: Path) -> None:
    assert records_from_table(table_of(tmp_path, document()).slice(0, 0)) == []
    assert records_from_table(INDEX_SCHEMA.empty_table()) == []


def test_images_without_instances_are_records_without_instances(tmp_path: Path) -> None:
    rows = [{**row, "instances": []} for row in table_of(tmp_path, document()).to_pylist()]
    records = records_from_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))
    assert [record.keypoints.shape for record in records] == [(0, 17, 3)] * 12
    assert [record.bboxes_xywh.shape for record in records] == [(0, 4)] * 12


def test_instances_with_different_numbers_of_keypoints_are_refused(tmp_path: Path) -> None:
    rows = table_of(tmp_path, document()).to_pylist()
    next(row for row in rows if row["instances"])["instances"][0]["keypoints"].pop()
    with pytest.raises(ValueError, match=r"one number of keypoints .* found \[16, 17\]"):
        records_from_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))
