"""Reading annotation files: a fault gives a clear error, or costs the records concerned and no others."""

from __future__ import annotations

import copy
import gzip
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spctrl.data.annotations.decode import AnnotationFileError, _decode_whole, read_document, unsafe_path
from spctrl.data.datasets import AP10K, HUMANART, Dataset
from spctrl.data.index import Index, write_index

MAX_PIXELS = 1_000_000
HUGE = 10**30
Json = dict[str, Any]
Edit = Callable[[Json], object]


def small_document() -> Json:
    """Three images (ids 1, 2, 3) with one annotation each (ids 10, 20, 30)."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48, "background": i} for i in (1, 2, 3)
        ],
        "annotations": [
            {
                "id": 10 * i,
                "image_id": i,
                "category_id": 1,
                "bbox": [1, 2, 30, 40],
                "area": 1200,
                "iscrowd": 0,
                "num_keypoints": 17,
                "keypoints": [5 + i, 6, 2] * 17,
            }
            for i in (1, 2, 3)
        ],
        "categories": [{"id": 1, "name": "fox", "keypoints": [], "skeleton": [[1, 2]]}],
    }


class Outcome:
    """What the index made of a file."""

    def __init__(self, index: Index, rows: list[Json]) -> None:
        self.index = index
        self.rows = {row["image_id"]: row for row in rows}
        self.rejects: list[Json] = index.rejects.to_pylist()

    @property
    def kept(self) -> set[int]:
        return set(self.rows)

    @property
    def codes(self) -> set[str]:
        return {row["code"] for row in self.rejects}


def unassigned(found: Outcome) -> int:
    return found.index.adjustments.get("unassigned", 0)


def indexed(folder: Path, content: Json | str | bytes, dataset: Dataset = AP10K) -> Outcome:
    if isinstance(content, dict):
        content = json.dumps(content)
    source = folder / "annotations.json"
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    index = write_index(source, dataset, "train", folder / "index.parquet", max_pixels=MAX_PIXELS)
    return Outcome(index, pq.read_table(folder / "index.parquet").to_pylist())


def edited(edit: Edit) -> Json:
    document = small_document()
    edit(document)
    return document


def image(document: Json) -> Json:
    found: Json = document["images"][1]
    return found


def annotation(document: Json) -> Json:
    found: Json = document["annotations"][1]
    return found


def put(part: Callable[[Json], Json], key: str, value: object) -> Edit:
    return lambda document: part(document).__setitem__(key, value)


def keypoint(number: int, *values: object) -> Edit:
    """Other values from the given position of the second annotation's keypoints on."""

    def edit(document: Json) -> None:
        annotation(document)["keypoints"][number : number + len(values)] = values

    return edit


def test_a_good_file_has_no_rejects(tmp_path: Path) -> None:
    found = indexed(tmp_path, small_document())
    assert found.kept == {1, 2, 3}
    assert found.rejects == []
    assert found.index.images_in_file == 3
    assert found.index.image_paths == ["data/1.jpg", "data/2.jpg", "data/3.jpg"]


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    assert indexed(tmp_path, b"\xef\xbb\xbf" + json.dumps(small_document()).encode()).kept == {1, 2, 3}


# Images that show no pose


@pytest.mark.parametrize("lost", [{1}, {3}, {1, 2}, {2, 3}])
@pytest.mark.parametrize("beside", ["nothing", "a number as text", "a fault"])
def test_images_without_an_annotation_are_left_out_and_counted(
    tmp_path: Path, lost: set[int], beside: str
) -> None:
    """Whether the file is decoded as a whole or entry by entry."""
    document = small_document()
    document["annotations"] = [each for each in document["annotations"] if each["image_id"] not in lost]
    if beside == "a number as text":
        document["images"][0]["width"] = "64"
    if beside == "a fault":
        document["images"].append({**image(document), "id": 4, "file_name": "4.jpg", "width": 0})
    found = indexed(tmp_path, document)
    assert found.kept == {1, 2, 3} - lost
    assert found.codes == ({"bad_size"} if beside == "a fault" else set())
    assert found.index.adjustments["unannotated_images"] == len(lost)
    assert found.index.images_in_file == len(document["images"])


def test_an_image_whose_only_annotation_is_faulty_is_rejected_not_left_out(tmp_path: Path) -> None:
    found = indexed(tmp_path, edited(put(annotation, "category_id", 7)))
    assert found.kept == {1, 3}
    assert "unannotated_images" not in found.index.adjustments


@pytest.mark.parametrize("kept", [1, 2])
def test_images_without_a_labelled_keypoint_are_kept_and_counted(tmp_path: Path, kept: int) -> None:
    document = small_document()
    for each in document["annotations"][kept:]:
        each["keypoints"] = [5, 6, 0] * 17
    found = indexed(tmp_path, document)
    assert found.kept == {1, 2, 3}
    assert found.index.adjustments["blank_maps"] == 3 - kept


# Boxes that the file does not state


@pytest.mark.parametrize("stated", ["absent", None, []])
@pytest.mark.parametrize(
    "points", [{0: (5, 6), 3: (25.5, 46)}, {7: (-3, 2), 8: (2, 8), 16: (0, 12)}, {4: (9, 9)}]
)
def test_a_box_that_is_absent_is_the_extent_of_the_labelled_keypoints(
    tmp_path: Path, stated: object, points: dict[int, tuple[float, float]]
) -> None:
    document = small_document()
    instance = annotation(document)
    instance["keypoints"] = [
        number for k in range(17) for number in (*points.get(k, (60, 1)), 1 if k in points else 0)
    ]
    del instance["area"], instance["num_keypoints"]
    if stated == "absent":
        del instance["bbox"]
    else:
        instance["bbox"] = stated
    found = indexed(tmp_path, document)
    x, y = zip(*points.values(), strict=True)
    assert found.rejects == []
    assert found.rows[2]["instances"][0]["bbox_xywh"] == [
        *(min(x), min(y), max(max(x) - min(x), 1), max(max(y) - min(y), 1)),
    ]
    assert found.rows[1]["instances"][0]["bbox_xywh"] == [1, 2, 30, 40]
    assert found.index.adjustments["boxes_of_keypoints"] == 1


@pytest.mark.parametrize("stated", ["absent", None, []])
def test_an_instance_with_neither_box_nor_labelled_keypoint_is_rejected(
    tmp_path: Path, stated: object
) -> None:
    document = edited(put(annotation, "keypoints", [5, 6, 0] * 17))
    annotation(document)["bbox"] = stated
    if stated == "absent":
        del annotation(document)["bbox"]
    found = indexed(tmp_path, document)
    assert found.kept == {1, 3}
    assert found.codes == {"bad_bbox"}


# Files that cannot be used at all

TEXT = json.dumps(small_document(), indent=1)
NOT_USABLE: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", r"after its last byte \(0 bytes\)"),
    "blank": (" \n ", "after its last byte"),
    "not JSON": ("\x00\x01 hello", "line 1, byte 0"),
    "HTML": ("<!DOCTYPE html><title>404</title>", "line 1, byte 0.*DOCTYPE"),
    "not JSON on line 3": ('{"images": [],\n"annotations": [],\n"categories": [oops]}', "line 3, byte.*oops"),
    "UTF-16": (TEXT.encode("utf-16"), "UTF-8, found other bytes at line 1, byte 0, near .*iconv -f UTF-16"),
    "UTF-16 without a mark": (TEXT.replace("fox", "f\xf6x").encode("utf-16-be"), "iconv -f UTF-16"),
    "Latin-1": (
        TEXT.replace("fox", "f\xf6x").encode("latin-1"),
        r"line \d+, byte \d+, near .*f\\xf6x.*iconv -f LATIN1",
    ),
    "Latin-1 in an unused field": (
        TEXT.replace('"id": 10,', '"id": 10, "note": "caf\xe9",').encode("latin-1"),
        r"line \d+, byte \d+, near .*caf\\xe9.*iconv -f LATIN1",
    ),
    "Latin-1 in an unused section": (
        b'{"info": "Caf\xe9",' + TEXT[1:].encode(),
        r"line 1, byte 13, near .*Caf\\xe9",
    ),
    "half a character": (TEXT.encode()[:-1] + b'"\xe2\x82', "expected text in UTF-8"),
    "UTF-16 in ASCII alone": (TEXT.encode("utf-16-le"), "iconv -f UTF-16"),
    "compressed": (gzip.compress(TEXT.encode(), mtime=0), "and not compressed"),
    "no annotation": (
        json.dumps(edited(put(lambda d: d, "annotations", []))),
        r"expected at least one usable image, found none \(images without an annotation: 3\)",
    ),
    "no labelled keypoint": (
        json.dumps(edited(lambda d: [each.update(keypoints=[5, 6, 0] * 17) for each in d["annotations"]])),
        "expected keypoints with a visibility of 1 or 2, found 0 in all annotations of 3 images",
    ),
    "two documents": (TEXT + TEXT, f"line {TEXT.count(chr(10)) + 1}, byte {len(TEXT) + 1}"),
    "deep list": ("[" * 100_000, "expected an object"),
    "deep section": ('{"images": ' + "[" * 100_000, "brackets"),
    "deep entry": (
        TEXT.replace('"background": 2', f'"background": {"[" * 100_000}{"]" * 100_000}'),
        "brackets",
    ),
    "deep objects": ('{"images": ' + '{"a": ' * 100_000, "expected an object|brackets"),
    "a list": ("[]", "expected an object.*got `array`"),
    "a list of images": (json.dumps(small_document()["images"]), "got `array`"),
    "null": ("null", "expected an object"),
    "a number": ("3", "expected an object"),
    "NaN alone": ("NaN", "expected an object"),
    "no images": (json.dumps(edited(lambda d: d.pop("images"))), "`images`"),
    "no annotations": (json.dumps(edited(lambda d: d.pop("annotations"))), "`annotations`"),
    "no categories": (json.dumps(edited(lambda d: d.pop("categories"))), "`categories`"),
    "images: object": (json.dumps(edited(put(lambda d: d, "images", {}))), r"\$\.images"),
    "annotations: null": (json.dumps(edited(put(lambda d: d, "annotations", None))), r"\$\.annotations"),
    "categories: text": (json.dumps(edited(put(lambda d: d, "categories", "fox"))), r"\$\.categories"),
    "category: number": (json.dumps(edited(put(lambda d: d, "categories", [1]))), r"categories\[0\]"),
    "category: id": (
        json.dumps(edited(lambda d: d["categories"][0].update(id="one"))),
        r"categories\[0\].*\$\.id",
    ),
    "no image at all": (
        json.dumps(edited(put(lambda d: d, "images", []))),
        r"found none \(unknown_image: 3\)",
    ),
    "nothing at all": ('{"images": [], "annotations": [], "categories": []}', r"\(an empty list of images\)"),
    "no usable image": (
        json.dumps(edited(lambda d: [each.update(width=0) for each in d["images"]])),
        "bad_size: 3",
    ),
    "wrong section beside NaN": (json.dumps({**small_document(), "images": float("nan")}), r"\$\.images"),
    "fault beside NaN": (TEXT.replace("1200", "NaN", 1).replace("fox", 'f"ox'), r"line \d+, byte"),
}


@pytest.mark.parametrize(("content", "place"), NOT_USABLE.values(), ids=NOT_USABLE.keys())
def test_an_unusable_file_is_an_error_that_names_file_and_place(
    tmp_path: Path, content: str | bytes, place: str
) -> None:
    with pytest.raises(AnnotationFileError, match=place) as caught:
        indexed(tmp_path, content)
    assert str(tmp_path / "annotations.json") in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("number", ["1200", "NaN"])
def test_a_truncated_file_is_an_error_that_names_its_end(tmp_path: Path, share: float, number: str) -> None:
    text = json.dumps(small_document()).replace("1200", number)
    cut = text[: int(len(text) * share)]
    with pytest.raises(
        AnnotationFileError, match=r"after its last byte.*copied or downloaded whole"
    ) as caught:
        indexed(tmp_path, cut)
    assert str(tmp_path / "annotations.json") in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "annotations.json"
    if kind == "folder":
        path.mkdir()
    with pytest.raises(AnnotationFileError, match="cannot be read") as caught:
        read_document(path)
    assert str(path) in str(caught.value)


def test_the_place_of_a_fault_is_the_line_and_byte_where_it_is(tmp_path: Path) -> None:
    text = TEXT.replace('"height": 48', '"height" 48', 1)
    position = text.index('"height" 48') + len('"height" ')
    line = text.count("\n", 0, position) + 1
    with pytest.raises(AnnotationFileError, match=f"line {line}, byte {position}, near"):
        indexed(tmp_path, text)


# File names

UNSAFE_NAMES = {
    "climbs": "../2.jpg",
    "climbs in the middle": "a/../../../2.jpg",
    "climbs and returns": "a/../2.jpg",
    "climbs at the end": "a/..",
    "absolute": "/etc/passwd",
    "drive": "C:/2.jpg",
    "backslash": "..\\2.jpg",
    "newline": "2\n.jpg",
    "carriage return": "2\r.jpg",
    "tab": "2\t.jpg",
    "NUL": "2\x00.jpg",
    "escape": "\x1b[31m2.jpg",
    "delete": "2\x7f.jpg",
    "long part": "x" * 296 + ".jpg",
    "long part in another script": "鹿" * 100 + ".jpg",
    "long path": "a/" * 2100 + "2.jpg",
    "no room for a suffix": "x" * 255,
    "empty": "",
    "dot": ".",
    "dot folder": "./2.jpg",
    "folder": "a/",
    "empty part": "a//2.jpg",
}


@pytest.mark.parametrize("name", UNSAFE_NAMES.values(), ids=UNSAFE_NAMES.keys())
def test_an_unsafe_file_name_costs_its_image_only(tmp_path: Path, name: str) -> None:
    found = indexed(tmp_path, edited(put(image, "file_name", name)))
    assert found.kept == {1, 3}
    (reject,) = found.rejects
    assert (reject["image_id"], reject["code"], reject["file_name"]) == (2, "unsafe_path", name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/etc/passwd", "is absolute"),
        ("../2.jpg", "climbs out of the dataset"),
        ("a\\b", "backslash or a control character"),
        ("\ud800.jpg", "not valid Unicode"),
        ("", "names no file"),
        ("x" * 300, "longer than"),
        ("鹿" * 80 + ".jpg", "has a part longer than 230 bytes"),
        ("a/" + "x" * 231 + "/2.jpg", "has a part longer than 230 bytes"),
        ("C:/2.jpg", "is an absolute path of Windows"),
        ("c:\\2.jpg", "is an absolute path of Windows"),
        ("http://a/2.jpg", "is a URL"),
        ("S3://bucket/2.jpg", "is a URL"),
        ("a+b.c://2.jpg", "is a URL"),
    ],
)
def test_the_reason_says_what_is_unsafe(name: str, why: str) -> None:
    assert why in (unsafe_path(name) or "")


@pytest.mark.parametrize(
    "name",
    [
        "2.jpg",
        "deep/er/2.jpg",
        "鹿/2.jpg",
        "a b (1).jpeg",
        "..2.jpg",
        "2..jpg",
        "-2",
        "…",
        "a:b.jpg",
        "c:x/2.jpg",
        "2021-01-01T10:00:00.jpg",
        "::",
        "s3:a/2.jpg",
    ],
)
def test_an_unusual_but_harmless_file_name_is_kept(tmp_path: Path, name: str) -> None:
    found = indexed(tmp_path, edited(put(image, "file_name", name)))
    assert found.rejects == []
    assert found.rows[2]["file_name"] == name


@pytest.mark.parametrize(
    "name", ["HumanArt/../2.jpg", "HumanArt//etc/passwd", "HumanArt/", "HumanArt/images/../../2"]
)
def test_the_name_of_the_dataset_hides_no_unsafe_path(tmp_path: Path, name: str) -> None:
    document = small_document()
    for each in document["images"]:
        each["file_name"] = f"HumanArt/images/{each['file_name']}"
    image(document)["file_name"] = name
    found = indexed(tmp_path, document, HUMANART)
    assert found.kept == {1, 3}
    assert found.codes == {"unsafe_path"}


@pytest.mark.parametrize("escape", [r"\ud800", r"\udfff", r"\udc00\ud800"])
@pytest.mark.parametrize("place", ["2.jpg", "fox"])
def test_half_a_surrogate_pair_never_gets_through(tmp_path: Path, escape: str, place: str) -> None:
    try:
        found = indexed(tmp_path, json.dumps(small_document()).replace(place, escape))
    except AnnotationFileError as error:
        assert str(tmp_path / "annotations.json") in str(error)
    else:
        assert found.kept == {1, 3}


@pytest.mark.parametrize("place", ["2.jpg", "fox"])
def test_bytes_that_are_not_utf8_never_get_through(tmp_path: Path, place: str) -> None:
    data = json.dumps(small_document()).encode().replace(place.encode(), b"\xff\xfe")
    try:
        found = indexed(tmp_path, data)
    except AnnotationFileError as error:
        assert str(tmp_path / "annotations.json") in str(error)
        assert "line 1, byte" in str(error)
    else:
        assert found.kept == {1, 3}
        assert found.codes == {"bad_image_entry", "unknown_image"}


# Records: (what is done to the second image or its annotation, the code that it gives)

REJECTED: dict[str, tuple[Edit, str]] = {
    "no file_name": (lambda d: image(d).pop("file_name"), "bad_image_entry"),
    "file_name null": (put(image, "file_name", None), "bad_image_entry"),
    "file_name number": (put(image, "file_name", 2), "bad_image_entry"),
    "file_name list": (put(image, "file_name", ["2.jpg"]), "bad_image_entry"),
    "image id text": (put(image, "id", "two"), "bad_image_entry"),
    "image id null": (put(image, "id", None), "bad_image_entry"),
    "image id boolean": (put(image, "id", True), "bad_image_entry"),
    "image id fraction": (put(image, "id", 2.5), "bad_image_entry"),
    "image id huge": (put(image, "id", HUGE), "bad_image_entry"),
    "image id of 65 bits": (put(image, "id", 2**64), "bad_image_entry"),
    "image id just too large": (put(image, "id", 2**63), "bad_image_entry"),
    "image id very small": (put(image, "id", -HUGE), "bad_image_entry"),
    "image: list": (lambda d: d["images"].__setitem__(1, [2, "2.jpg"]), "bad_image_entry"),
    "image: null": (lambda d: d["images"].__setitem__(1, None), "bad_image_entry"),
    "image: number": (lambda d: d["images"].__setitem__(1, 2), "bad_image_entry"),
    "width text": (put(image, "width", "64 px"), "bad_image_entry"),
    "width fraction": (put(image, "width", 64.5), "bad_image_entry"),
    "width null": (put(image, "width", None), "bad_image_entry"),
    "width boolean": (put(image, "width", True), "bad_image_entry"),
    "width NaN": (put(image, "width", float("nan")), "bad_image_entry"),
    "width huge": (put(image, "width", HUGE), "bad_image_entry"),
    "width beyond float": (put(image, "width", 10**400), "bad_image_entry"),
    "width beyond int32": (put(image, "width", 2**31), "bad_size"),
    "width missing": (lambda d: image(d).pop("width"), "bad_image_entry"),
    "width zero": (put(image, "width", 0), "bad_size"),
    "height zero": (put(image, "height", 0), "bad_size"),
    "height negative": (put(image, "height", -48), "bad_size"),
    "both negative": (lambda d: image(d).update(width=-64, height=-48), "bad_size"),
    "too many pixels": (put(image, "height", MAX_PIXELS // 64 + 1), "bad_size"),
    "background unknown": (put(image, "background", 42), "unknown_background"),
    "background zero": (put(image, "background", 0), "unknown_background"),
    "background huge": (put(image, "background", HUGE), "unknown_background"),
    "background text": (put(image, "background", "grass"), "bad_image_entry"),
    "keypoints short": (put(annotation, "keypoints", [1, 2, 2] * 16), "keypoint_count"),
    "keypoints long": (put(annotation, "keypoints", [1, 2, 2] * 18), "keypoint_count"),
    "keypoints one short": (put(annotation, "keypoints", [1, 2, 2] * 16 + [1, 2]), "keypoint_count"),
    "keypoints empty": (put(annotation, "keypoints", []), "keypoint_count"),
    "keypoints null": (put(annotation, "keypoints", None), "bad_annotation_entry"),
    "keypoints object": (put(annotation, "keypoints", {}), "bad_annotation_entry"),
    "keypoints nested": (put(annotation, "keypoints", [[1, 2, 2]] * 17), "bad_annotation_entry"),
    "keypoints missing": (lambda d: annotation(d).pop("keypoints"), "bad_annotation_entry"),
    "keypoints_21 short": (put(annotation, "keypoints_21", [1, 2, 2] * 17), "keypoint_count"),
    "keypoints_21 text": (put(annotation, "keypoints_21", "none"), "bad_annotation_entry"),
    "coordinate text": (keypoint(0, "5"), "bad_annotation_entry"),
    "coordinate null": (keypoint(0, None), "bad_annotation_entry"),
    "coordinate boolean": (keypoint(0, True), "bad_annotation_entry"),
    "coordinate NaN": (keypoint(0, float("nan")), "bad_annotation_entry"),
    "coordinate infinite": (keypoint(1, float("inf")), "bad_annotation_entry"),
    "coordinate minus infinity": (keypoint(1, float("-inf")), "bad_annotation_entry"),
    "coordinate NaN, unlabelled": (keypoint(0, float("nan"), 0, 0), "bad_annotation_entry"),
    "coordinate beyond float": (keypoint(0, 10**400), "bad_annotation_entry"),
    "coordinate of 5000 digits": (keypoint(0, 10**4000), "bad_annotation_entry"),
    "coordinate huge": (keypoint(0, HUGE), "far_away_keypoint"),
    "far right": (keypoint(0, 129, 6, 2), "far_away_keypoint"),
    "far left": (keypoint(0, -64.5, 6, 2), "far_away_keypoint"),
    "far up": (keypoint(48, 5, -49, 1), "far_away_keypoint"),
    "far down": (keypoint(48, 5, 96.1, 2), "far_away_keypoint"),
    "visibility 3": (keypoint(2, 3), "bad_visibility"),
    "visibility a half": (keypoint(2, 0.5), "bad_visibility"),
    "visibility negative": (keypoint(50, -1), "bad_visibility"),
    "visibility NaN": (keypoint(2, float("nan")), "bad_annotation_entry"),
    "bbox of three": (put(annotation, "bbox", [1, 2, 3]), "bad_bbox"),
    "bbox of five": (put(annotation, "bbox", [1, 2, 3, 4, 5]), "bad_bbox"),
    "bbox of nulls": (put(annotation, "bbox", [None] * 4), "bad_annotation_entry"),
    "bbox negative width": (put(annotation, "bbox", [1, 2, -3, 4]), "bad_bbox"),
    "bbox negative height": (put(annotation, "bbox", [1, 2, 3, -0.1]), "bad_bbox"),
    "bbox NaN": (put(annotation, "bbox", [1, 2, 3, float("nan")]), "bad_annotation_entry"),
    "bbox object": (put(annotation, "bbox", {"x": 1}), "bad_annotation_entry"),
    "bbox text": (put(annotation, "bbox", "1 2 3 4"), "bad_annotation_entry"),
    "area text": (put(annotation, "area", "1200"), "bad_annotation_entry"),
    "category unknown": (put(annotation, "category_id", 7), "unknown_category"),
    "category text": (put(annotation, "category_id", "fox"), "bad_annotation_entry"),
    "category huge": (put(annotation, "category_id", HUGE), "unknown_category"),
    "annotation id text": (put(annotation, "id", "0x14"), "bad_annotation_entry"),
    "annotation id huge": (put(annotation, "id", HUGE), "bad_annotation_entry"),
    "annotation id just too large": (put(annotation, "id", 2**63), "bad_annotation_entry"),
    "iscrowd huge": (put(annotation, "iscrowd", HUGE), "bad_annotation_entry"),
    "iscrowd text": (put(annotation, "iscrowd", "no"), "bad_annotation_entry"),
    "num_keypoints huge": (put(annotation, "num_keypoints", HUGE), "bad_annotation_entry"),
    "num_keypoints beyond int32": (put(annotation, "num_keypoints", 2**31), "bad_annotation_entry"),
    "num_keypoints negative": (put(annotation, "num_keypoints", -1), "bad_annotation_entry"),
}


@pytest.mark.parametrize(("edit", "code"), REJECTED.values(), ids=REJECTED.keys())
def test_a_record_with_a_fault_is_rejected_and_all_others_stay(tmp_path: Path, edit: Edit, code: str) -> None:
    found = indexed(tmp_path, edited(edit))
    assert found.kept == {1, 3}
    assert code in found.codes
    assert found.codes <= {code, "unknown_image", *(("far_away_keypoint",) if code == "bad_size" else ())}
    assert all(row["image_id"] in (2, None) and row["message"] for row in found.rejects)
    assert found.index.images_in_file == 3


def test_the_reject_of_an_unreadable_entry_says_whose_it_is(tmp_path: Path) -> None:
    def damage(document: Json) -> None:
        image(document)["file_name"] = None
        document["annotations"][2]["bbox"] = "none"

    found = indexed(tmp_path, edited(damage))
    rejects = {(row["code"], row["image_id"], row["annotation_id"]) for row in found.rejects}
    assert rejects == {
        ("bad_image_entry", 2, None),
        ("unknown_image", 2, 20),
        ("bad_annotation_entry", 3, 30),
    }


@pytest.mark.parametrize("token", ["1e999", "-1e999"])
@pytest.mark.parametrize("key", ["keypoints", "bbox", "area"])
def test_a_number_beyond_float_costs_its_record(tmp_path: Path, token: str, key: str) -> None:
    document = edited(
        put(annotation, key, "HERE" if key == "area" else ["HERE", *annotation(small_document())[key][1:]])
    )
    found = indexed(tmp_path, json.dumps(document).replace('"HERE"', token))
    assert found.kept == {1, 3}
    assert [(row["image_id"], row["annotation_id"], row["code"]) for row in found.rejects] == [
        (2, 20, "bad_annotation_entry")
    ]


KEPT: dict[str, Edit] = {
    "background 9": put(image, "background", 9),
    "background 88": put(image, "background", 88),
    "no background": lambda d: image(d).pop("background"),
    "unknown fields": lambda d: image(d).update(flickr_url=None, tags=[{"a": [1, 2]}]),
    "far away but unlabelled": keypoint(0, 10_000, -10_000, 0),
    "visible, hidden": keypoint(2, 1),
    "just inside the limit": keypoint(0, -64, -48, 2, 128, 96, 2),
    "fractions": keypoint(0, 5.25, 6.125),
    "fields that may lack": lambda d: [
        annotation(d).pop(key) for key in ("area", "iscrowd", "num_keypoints")
    ],
    "empty bbox": put(annotation, "bbox", [0, 0, 0, 0]),
    "bbox outside": put(annotation, "bbox", [-500, -500, 5000, 5000]),
    "largest ids": lambda d: (image(d).update(id=2**63 - 1), annotation(d).update(image_id=2**63 - 1)),
    "negative ids": lambda d: (image(d).update(id=-(2**63)), annotation(d).update(image_id=-(2**63), id=-5)),
    "largest size": lambda d: image(d).update(width=MAX_PIXELS // 10, height=10),
    "ids text": lambda d: (image(d).update(id="2"), annotation(d).update(id="0020", image_id=" 2 ")),
    "ids float": lambda d: (image(d).update(id=2.0), annotation(d).update(id=2e1, category_id=1.0)),
    "sizes text": lambda d: image(d).update(width="64", height="48.0", background="2"),
    "counts text": lambda d: annotation(d).update(num_keypoints="17", iscrowd="0"),
    "iscrowd boolean": put(annotation, "iscrowd", True),
    "nulls": lambda d: annotation(d).update(area=None, iscrowd=None, num_keypoints=None),
    "area NaN": put(annotation, "area", float("nan")),
    "category of nulls": lambda d: d["categories"][0].update(
        supercategory=None, keypoints=None, skeleton=None
    ),
    "category of another image broken": lambda d: d["categories"].append({"id": HUGE, "name": "giant"}),
}


@pytest.mark.parametrize("edit", KEPT.values(), ids=KEPT.keys())
def test_what_is_unusual_but_right_is_kept(tmp_path: Path, edit: Edit) -> None:
    document = edited(edit)
    found = indexed(tmp_path, document)
    assert found.rejects == []
    assert found.kept == {int(each["id"]) for each in document["images"]}
    assert all(len(row["instances"]) == 1 for row in found.rows.values())


def test_a_category_beyond_64_bits_costs_the_images_that_use_it(tmp_path: Path) -> None:
    document = edited(
        lambda d: (
            d["categories"].append({"id": HUGE, "name": "giant"}),
            annotation(d).update(category_id=HUGE),
        )
    )
    found = indexed(tmp_path, document)
    assert found.kept == {1, 3}
    assert found.codes == {"bad_annotation_entry"}


@pytest.mark.parametrize("background", [2**31, -(2**31) - 1, HUGE])
def test_a_background_beyond_32_bits_is_rejected_where_none_is_known(tmp_path: Path, background: int) -> None:
    document = small_document()
    for each in document["images"]:
        each["file_name"] = f"HumanArt/images/{each['file_name']}"
    image(document)["background"] = background
    found = indexed(tmp_path, document, HUMANART)
    assert found.kept == {1, 3}
    assert found.codes == {"unknown_background"}


def test_images_that_share_an_id_are_all_rejected(tmp_path: Path) -> None:
    found = indexed(tmp_path, edited(lambda d: d["images"].append({**image(d), "file_name": "4.jpg"})))
    assert found.kept == {1, 3}
    assert [(row["code"], row["file_name"]) for row in found.rejects] == [
        ("duplicate_image_id", "2.jpg"),
        ("duplicate_image_id", "4.jpg"),
    ]
    assert found.index.images_in_file == 4


@pytest.mark.parametrize("name", ["2.jpg", "2.png", "2"])
def test_images_whose_conditions_would_share_a_file_are_all_rejected(tmp_path: Path, name: str) -> None:
    found = indexed(tmp_path, edited(lambda d: d["images"].append({**image(d), "id": 4, "file_name": name})))
    assert found.kept == {1, 3}
    assert {(row["code"], row["image_id"]) for row in found.rejects} == {
        ("duplicate_image_file_name", 2),
        ("duplicate_image_file_name", 4),
    }


def test_images_of_one_name_in_two_folders_are_kept(tmp_path: Path) -> None:
    document = edited(lambda d: d["images"].append({**image(d), "id": 4, "file_name": "other/2.jpg"}))
    document["annotations"].append({**annotation(document), "id": 40, "image_id": 4})
    assert indexed(tmp_path, document).kept == {1, 2, 3, 4}


def test_images_whose_annotations_share_an_id_are_all_rejected(tmp_path: Path) -> None:
    found = indexed(tmp_path, edited(put(annotation, "id", 30)))
    assert found.kept == {1}
    assert {(row["code"], row["image_id"], row["annotation_id"]) for row in found.rejects} == {
        ("duplicate_annotation_id", 2, 30),
        ("duplicate_annotation_id", 3, 30),
    }


@pytest.mark.parametrize("owner", [7, 0, -1, 2**63, HUGE])
def test_an_annotation_of_an_unknown_image_is_rejected_alone(tmp_path: Path, owner: int) -> None:
    found = indexed(
        tmp_path, edited(lambda d: d["annotations"].append({**annotation(d), "id": 40, "image_id": owner}))
    )
    assert found.kept == {1, 2, 3}
    (reject,) = found.rejects
    assert (reject["code"], reject["annotation_id"]) == ("unknown_image", 40)
    assert unassigned(found) == 1


@pytest.mark.parametrize("entry", [None, 7, "x", [], {}, {"image_id": None}, {"image_id": [2]}])
def test_an_annotation_that_names_no_image_is_rejected_alone(tmp_path: Path, entry: object) -> None:
    found = indexed(tmp_path, edited(lambda d: d["annotations"].append(entry)))
    assert found.kept == {1, 2, 3}
    assert [row["code"] for row in found.rejects] == ["unassigned_annotation"]
    assert "annotations[3]" in found.rejects[0]["message"]
    assert (unassigned(found), found.index.annotations_in_file) == (1, 4)


def test_one_bad_instance_takes_its_whole_image_along(tmp_path: Path) -> None:
    def add_a_second_instance_that_is_bad(document: Json) -> None:
        document["annotations"].append({**annotation(document), "id": 40, "bbox": [1]})

    found = indexed(tmp_path, edited(add_a_second_instance_that_is_bad))
    assert found.kept == {1, 3}
    assert [(row["code"], row["annotation_id"]) for row in found.rejects] == [("bad_bbox", 40)]


def test_nan_inside_a_text_stays_as_it_is(tmp_path: Path) -> None:
    document = small_document()
    for each in document["images"]:
        each["file_name"] = f"HumanArt/images/{each['file_name']}"
    caption = 'a "NaN", -Infinity and \\NaN'
    document["images"][0]["description"] = caption
    annotation(document)["bbox"][0] = float("nan")
    found = indexed(tmp_path, document, HUMANART)
    assert found.kept == {1, 3}
    assert found.rows[1]["captions"] == [caption]


def test_faults_of_many_kinds_in_one_file_are_told_apart(tmp_path: Path) -> None:
    document = small_document()
    for i in range(4, 8):
        document["images"].append({"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48})
    document["images"][3]["width"] = 0
    document["images"][4]["file_name"] = "../5.jpg"
    document["images"][5]["background"] = 5000
    document["images"][6] = "7.jpg"
    annotation(document)["keypoints"][0] = float("nan")
    found = indexed(tmp_path, document)
    assert found.kept == {1, 3}
    assert {(row["image_id"], row["code"]) for row in found.rejects} == {
        (4, "bad_size"),
        (5, "unsafe_path"),
        (6, "unknown_background"),
        (None, "bad_image_entry"),
        (2, "bad_annotation_entry"),
    }


def test_brackets_without_end_fail_quickly(tmp_path: Path) -> None:
    started = time.perf_counter()
    with pytest.raises(AnnotationFileError):
        indexed(tmp_path, '{"images": [' + "[" * 5_000_000)
    assert time.perf_counter() - started < 5


# Decoded in one pass or entry by entry: the same

NUMBERS = [
    "0", "-0", "-0.0", "1.0", "1e2", "1E-2", "2.0e0", "01", "+1", ".5", "5.", "1_0", "0x1", "1e", "--1", "1 2", "",
    "true", "null", '"1"', "[1]", "{}", "NaN", "-Infinity", "Infinity", "1e308", "1e309", "-1e999", "5e-324", "1e-400",
    "0.1000000000000000055511151231257827021181583404541015625", "9007199254740993", "18446744073709551615",
    "18446744073709551616", "9223372036854775807", "9223372036854775808", "-9223372036854775809", "9" * 30, "9" * 400,
]  # fmt: skip
"""What may stand where a number should."""


def both_ways(folder: Path, content: Json | str | bytes, dataset: Dataset = AP10K) -> Outcome | str:
    """What the index makes of a file, or its error: with the one pass, and the same without it."""
    found = [_outcome_or_error(folder, content, dataset)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spctrl.data.annotations.decode._decode_whole", lambda data, dataset: None)
        found.append(_outcome_or_error(folder, content, dataset))
    whole, by_entry = found
    if isinstance(whole, Outcome) and isinstance(by_entry, Outcome):
        # As text: of two equal numbers one may be a negative zero.
        assert repr(whole.rows) == repr(by_entry.rows)
        assert whole.rejects == by_entry.rejects
        assert whole.index.image_paths == by_entry.index.image_paths
        for count in ("images_in_file", "annotations_in_file", "adjustments"):
            assert getattr(whole.index, count) == getattr(by_entry.index, count)
    else:
        assert whole == by_entry
    return whole


def _outcome_or_error(folder: Path, content: Json | str | bytes, dataset: Dataset) -> Outcome | str:
    try:
        return indexed(folder, content, dataset)
    except AnnotationFileError as error:
        return str(error)


def decodes_at_once(content: Json | str, dataset: Dataset = AP10K) -> bool:
    text = json.dumps(content) if isinstance(content, dict) else content
    return _decode_whole(text.encode(), dataset) is not None


def test_a_file_without_any_fault_is_decoded_in_one_pass() -> None:
    assert decodes_at_once(small_document())
    assert decodes_at_once(edited(put(annotation, "keypoints_21", [1, 2, 2] * 21)))
    assert not decodes_at_once(edited(put(annotation, "keypoints", [1, 2, 2] * 16)))


@pytest.mark.parametrize("edit", [*KEPT.values(), *(edit for edit, _ in REJECTED.values())])
def test_one_pass_and_entry_by_entry_agree(tmp_path: Path, edit: Edit) -> None:
    both_ways(tmp_path, edited(edit))


@pytest.mark.parametrize("content", [content for content, _ in NOT_USABLE.values()], ids=NOT_USABLE.keys())
def test_one_pass_and_entry_by_entry_give_the_same_errors(tmp_path: Path, content: str | bytes) -> None:
    assert isinstance(both_ways(tmp_path, content), str)


@pytest.mark.parametrize("number", NUMBERS)
def test_one_pass_and_entry_by_entry_read_numbers_alike(tmp_path: Path, number: str) -> None:
    for part, key in [
        (image, "id"),
        (image, "width"),
        *((annotation, each) for each in annotation(small_document())),
    ]:
        document = small_document()
        annotation(document)["keypoints_21"] = [1, 2, 2] * 21
        value = part(document)[key]
        part(document)[key] = ["HERE", *value[1:]] if isinstance(value, list) else "HERE"
        both_ways(tmp_path, json.dumps(document).replace('"HERE"', number))


@pytest.mark.parametrize("first", ["[]", "itself", "[{}]"])
@pytest.mark.parametrize("section", ["images", "annotations"])
def test_of_a_section_that_comes_twice_the_last_one_counts(tmp_path: Path, section: str, first: str) -> None:
    document = small_document()
    content = json.dumps(document[section]) if first == "itself" else first
    found = both_ways(tmp_path, json.dumps(document).replace("{", f'{{"{section}": {content}, ', 1))
    assert isinstance(found, Outcome)
    assert found.kept == {1, 2, 3}
    assert found.rejects == []
    assert [len(row["instances"]) for row in found.rows.values()] == [1, 1, 1]


def test_the_sections_may_come_in_any_order(tmp_path: Path) -> None:
    document = dict(reversed(small_document().items()))
    assert list(document)[-1] == "images"
    assert decodes_at_once(document)
    found = both_ways(tmp_path, document)
    assert isinstance(found, Outcome)
    assert found.kept == {1, 2, 3}


def test_files_that_are_read_at_the_same_time_stay_apart(tmp_path: Path) -> None:
    def shifted(number: int) -> Json:
        document = small_document()
        document["images"] = document["images"][: 1 + number % 3]
        document["annotations"] = [
            {**each, "id": number * 1000 + turn, "keypoints": [number, turn % 40, 1] * 17}
            for turn in range(200)
            for each in document["annotations"][: 1 + number % 3]
        ]
        for position, each in enumerate(document["annotations"]):
            each["id"] = number * 1000 + position
        return document

    def found(number: int) -> dict[int, Json]:
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        return indexed(folder, shifted(number)).rows

    alone = [found(number) for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(found, range(8))) == alone


# Any file at all

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 90),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, HUGE, 10**400]),
    st.floats(),
    st.sampled_from([0.5, 1.0, 1e300, float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(
        ["", "1", "2.jpg", "3.png", "../x", "/x", "a/b", "\x00", "\ud800", "x" * 300, "NaN", "é"]
    ),
    st.text(max_size=4),
    st.sampled_from([[], {}, [1, 2, 2] * 17, [[]], {"id": 1}, [1, 2, 3, 4]]),
)


def places(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths of everything inside a JSON value; of long lists only the first members."""
    found = [path] if path else []
    if isinstance(value, dict):
        found += [place for key, each in value.items() for place in places(each, (*path, key))]
    elif isinstance(value, list):
        found += [place for key, each in enumerate(value[:5]) for place in places(each, (*path, key))]
    return found


@st.composite
def mutated_documents(draw: st.DrawFn) -> Json:
    document = small_document()
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(places(document)))
        parent: Any = document
        for key in path[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "remove", "repeat", "move"])):
            case "replace":
                parent[path[-1]] = copy.deepcopy(draw(VALUES))
            case "remove":
                del parent[path[-1]]
            case "repeat" if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[path[-1]]))
            case "move" if isinstance(parent, dict):
                parent[draw(st.sampled_from(["id", "image_id", "file_name", "keypoints_21", "z"]))] = (
                    parent.pop(path[-1])
                )
        if not places(document):
            return document
    return document


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated")


def whole_number(value: object) -> int | None:
    """What an id stands for: whole numbers may be written as text or float."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,19}(\.0*)?", value):
        value = float(value) if "." in value else int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        value = int(value)
    is_whole = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return int(value) if is_whole else None  # type: ignore[call-overload]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(document=mutated_documents(), dataset=st.sampled_from([AP10K, HUMANART]))
def test_every_image_of_a_mutated_file_is_indexed_or_rejected(
    folder: Path, document: Json, dataset: Dataset
) -> None:
    if dataset is HUMANART:
        images = document.get("images")
        for each in images if isinstance(images, list) else ():
            if isinstance(each, dict) and isinstance(each.get("file_name"), str):
                each["file_name"] = f"HumanArt/images/{each['file_name']}"
    text = json.dumps(document)
    found = both_ways(folder, text, dataset)
    if isinstance(found, str):
        assert str(folder / "annotations.json") in found
        return
    written = json.loads(text)
    rejected = {row["image_id"] for row in found.rejects}
    messages = " ".join(row["message"] for row in found.rejects)
    unannotated = 0
    assert found.index.images_in_file == len(written["images"])
    assert found.kept.isdisjoint(rejected)
    for position, entry in enumerate(written["images"]):
        image_id = whole_number(entry.get("id")) if isinstance(entry, dict) else None
        known = image_id in found.kept | rejected - {None} or f"images[{position}]" in messages
        unannotated += not known
    assert found.index.adjustments.get("unannotated_images", 0) == unannotated
    assert all(row["instances"] for row in found.rows.values())
    # No image is kept that lost one of its instances.
    entries = [each if isinstance(each, dict) else {} for each in written["annotations"]]
    owners = [whole_number(each.get("image_id")) for each in entries]
    listed = {whole_number(each.get("id")) for each in written["images"] if isinstance(each, dict)}
    assert unassigned(found) <= sum(owner is None or owner not in listed for owner in owners)
    assert {i: len(row["instances"]) for i, row in found.rows.items()} == {
        i: owners.count(i) for i in found.kept
    }


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_else(folder: Path, data: st.DataObject) -> None:
    text = bytearray(json.dumps(small_document()).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(
            st.integers(start, min(len(text), start + data.draw(st.sampled_from([0, 1, 3, 400]))))
        )
        inserted = data.draw(
            st.one_of(
                st.binary(max_size=4),
                st.sampled_from(
                    [
                        b"NaN",
                        b"Infinity",
                        b"1e999",
                        b"[" * 3000,
                        b'"',
                        b"\\",
                        b"\\ud800",
                        b"\xff",
                        b"9" * 5000,
                    ]
                ),
            )
        )
        text[start:stop] = inserted
    found = both_ways(folder, bytes(text))
    if isinstance(found, str):
        assert str(folder / "annotations.json") in found


# What a file does not state, or states in another way


def adjustments(folder: Path, edit: Edit, dataset: Dataset = AP10K) -> tuple[Outcome, dict[str, int]]:
    """What the index makes of an edited file, and what it read otherwise than the file states it."""
    document = edited(
        lambda d: (d["categories"][0].update(keypoints=list(AP10K.skeleton.keypoint_names)), edit(d))
    )
    found = both_ways(folder, document, dataset)
    assert isinstance(found, Outcome), found
    return found, found.index.adjustments


def second_instance(found: Outcome) -> Json:
    (instance,) = found.rows[2]["instances"]
    return dict(instance)


@pytest.mark.parametrize("area", ["absent", None, 0, 0.0, -4, float("nan")])
def test_an_area_is_never_zero(tmp_path: Path, area: object) -> None:
    def edit(document: Json) -> None:
        annotation(document)["area"] = area
        if area == "absent":
            del annotation(document)["area"]

    found, adjusted = adjustments(tmp_path, edit)
    assert second_instance(found)["area"] == pytest.approx(0.53 * 30 * 40)
    assert adjusted == {"areas_of_boxes": 1}
    assert found.rows[1]["instances"][0]["area"] == 1200


@pytest.mark.parametrize(
    ("segmentation", "area", "count"),
    [
        ([[0, 0, 10, 0, 10, 7, 0, 7]], 70, {"areas_of_segmentations": 1}),
        ({"size": [48, 64], "counts": [5, 9, 3000]}, 9, {"areas_of_segmentations": 1}),
        ([], 636, {"areas_of_boxes": 1}),
        ("polygon", 636, {"areas_of_boxes": 1}),
    ],
)
def test_an_area_is_taken_from_the_segmentation(
    tmp_path: Path, segmentation: object, area: float, count: dict[str, int]
) -> None:
    def edit(document: Json) -> None:
        del annotation(document)["area"]
        annotation(document)["segmentation"] = segmentation

    found, adjusted = adjustments(tmp_path, edit)
    assert second_instance(found)["area"] == pytest.approx(area)
    assert adjusted == count


@pytest.mark.parametrize("hidden", [0, 5, 17])
def test_labelled_keypoints_are_counted_where_no_number_is(tmp_path: Path, hidden: int) -> None:
    def edit(document: Json) -> None:
        del annotation(document)["num_keypoints"]
        annotation(document)["keypoints"] = [5, 6, 0] * hidden + [5, 6, 1] * (17 - hidden)

    found, adjusted = adjustments(tmp_path, edit)
    assert second_instance(found)["num_keypoints"] == 17 - hidden
    assert adjusted == {"counted_keypoints": 1} | ({"blank_maps": 1} if hidden == 17 else {})


@pytest.mark.parametrize("stated", [0, 1, 16, 99])
def test_a_number_of_keypoints_that_differs_is_reported(tmp_path: Path, stated: int) -> None:
    found, adjusted = adjustments(tmp_path, put(annotation, "num_keypoints", stated))
    assert second_instance(found)["num_keypoints"] == stated
    assert adjusted == {"differing_counts": 1}


@pytest.mark.parametrize("written", [2.0, "2", "02", " 2", "2.0", 0.2e1])
def test_numbers_written_otherwise_are_counted(tmp_path: Path, written: object) -> None:
    found, adjusted = adjustments(tmp_path, put(annotation, "image_id", written))
    assert found.kept == {1, 2, 3} and len(found.rows[2]["instances"]) == 1
    assert adjusted == {"whole_numbers": 1}


@pytest.mark.parametrize("written", [2.5, "two", "2,0", "0x2", True, [2], "", "2e0"])
def test_an_id_that_is_no_number_is_none(tmp_path: Path, written: object) -> None:
    found, _ = adjustments(tmp_path, put(annotation, "image_id", written))
    assert found.codes == {"unassigned_annotation"}
    (reject,) = found.rejects
    assert (reject["image_id"], reject["annotation_id"]) == (None, 20)
    assert "annotations[1] (id 20)" in reject["message"]
    assert unassigned(found) == 1


def test_a_bad_annotation_takes_its_image_along_however_written(tmp_path: Path) -> None:
    def edit(document: Json) -> None:
        document["annotations"].append({**annotation(document), "id": 40, "image_id": "2", "bbox": [1]})

    found, _ = adjustments(tmp_path, edit)
    assert found.kept == {1, 3}
    assert unassigned(found) == 0
    found, _ = adjustments(tmp_path, put(image, "file_name", None))
    assert found.codes == {"bad_image_entry", "unknown_image"}
    assert unassigned(found) == 0, "its image is known, and rejected"


def test_keypoints_are_brought_into_the_skeletons_order(tmp_path: Path) -> None:
    names = list(AP10K.skeleton.keypoint_names)
    points = [[3 * i, 2 * i, i % 3] for i in range(17)]

    def edit(document: Json) -> None:
        """The second annotation gets a category of its own, whose list begins with the tail."""
        shift = names.index("root_of_tail")
        document["categories"].append({"id": 2, "name": "dog", "keypoints": [*names[shift:], *names[:shift]]})
        annotation(document)["category_id"] = 2
        annotation(document)["keypoints"] = np.roll(points, -shift, axis=0).ravel().tolist()
        del annotation(document)["num_keypoints"]

    found, adjusted = adjustments(tmp_path, edit)
    assert second_instance(found)["keypoints"] == points
    assert found.rows[1]["instances"][0]["keypoints"] == [[6, 6, 2]] * 17
    assert adjusted == {"sorted_keypoints": 1, "counted_keypoints": 1}


def test_keypoints_21_of_an_unknown_order_are_refused(tmp_path: Path) -> None:
    document = small_document()
    for each in document["images"]:
        each["file_name"] = f"HumanArt/images/{each['file_name']}"
    names = list(HUMANART.skeleton.keypoint_names)
    document["categories"][0]["keypoints"] = names[::-1]
    assert isinstance(both_ways(tmp_path, document, HUMANART), Outcome)
    annotation(document)["keypoints_21"] = [1, 2, 2] * 21
    error = both_ways(tmp_path, document, HUMANART)
    assert isinstance(error, str)
    assert "order of keypoints_21" in error
    document["categories"][0]["keypoints"] = [*names, "left_finger", "right_finger", "left_toe", "right_toe"]
    assert isinstance(both_ways(tmp_path, document, HUMANART), Outcome)


def test_categories_that_share_a_name_are_kept_apart(tmp_path: Path) -> None:
    def edit(document: Json) -> None:
        document["categories"].append({**document["categories"][0], "id": 2})
        annotation(document)["category_id"] = 2

    found, adjusted = adjustments(tmp_path, edit)
    assert (second_instance(found)["category_id"], second_instance(found)["category"]) == (2, "fox")
    assert adjusted == {"shared_names": 2}


@pytest.mark.parametrize("keypoints", [None, [], "absent"])
def test_categories_without_names_are_counted(tmp_path: Path, keypoints: object) -> None:
    def edit(document: Json) -> None:
        document["categories"][0]["keypoints"] = keypoints
        if keypoints == "absent":
            del document["categories"][0]["keypoints"]

    found, adjusted = adjustments(tmp_path, edit)
    assert found.kept == {1, 2, 3}
    assert adjusted == {"unnamed_keypoints": 1}


def test_other_keypoints_stop_only_where_they_are_used(tmp_path: Path) -> None:
    people = {"id": 2, "name": "person", "keypoints": list(HUMANART.skeleton.keypoint_names)}
    found, adjusted = adjustments(tmp_path, lambda d: d["categories"].append(people))
    assert found.kept == {1, 2, 3} and adjusted == {}
    document = edited(lambda d: (d["categories"].append(people), annotation(d).update(category_id=2)))
    error = both_ways(tmp_path, document)
    assert isinstance(error, str)
    for text in ("category 2 ('person')", "AP-10K", "left_eye, right_eye, nose", "nose, left_eye, right_eye"):
        assert text in error


@pytest.mark.parametrize(
    ("another", "text"),
    [
        ({"id": 1, "name": "wolf"}, "found 1 for 'fox' and 'wolf'"),
        ({"id": 1.0, "name": "wolf"}, "found 1 for 'fox' and 'wolf'"),
        ({"id": 1, "name": "fox"}, "found 1 for 'fox' and 'fox'"),
    ],
)
def test_categories_that_share_an_id_are_refused(tmp_path: Path, another: Json, text: str) -> None:
    error = both_ways(tmp_path, edited(lambda d: d["categories"].append(another)))
    assert isinstance(error, str)
    assert text in error
