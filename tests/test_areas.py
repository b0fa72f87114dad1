"""Areas of instances without one: those that COCO states, and nothing that a file could break."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
from conftest import REAL_DATA

from spctrl.data.annotations.areas import box_areas, segmentation_area

UNKNOWN_WH = (math.nan, math.nan)


def test_polygons_have_their_geometric_area() -> None:
    triangle, square = [0, 0, 10, 0, 0, 10], [20, 20, 24, 20, 24, 24, 20, 24]
    assert segmentation_area([triangle], UNKNOWN_WH) == pytest.approx(50)
    assert segmentation_area(triangle, UNKNOWN_WH) == pytest.approx(50)
    assert segmentation_area([triangle, square], UNKNOWN_WH) == pytest.approx(66)
    assert segmentation_area([list(np.array(square) + 1e9)], UNKNOWN_WH) == pytest.approx(16)


def test_areas_of_polygons_are_those_that_coco_states() -> None:
    path = REAL_DATA / "keypoint_datasets/coco/test_coco.json"
    if not path.is_file():
        pytest.skip(f"COCO's annotations are not at {path}")
    people = [each for each in json.loads(path.read_bytes())["annotations"] if not each["iscrowd"]]
    assert len(people) > 10
    for each in people:
        assert segmentation_area(each["segmentation"], UNKNOWN_WH) == pytest.approx(each["area"], abs=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_areas_of_run_lengths_are_those_of_pycocotools(seed: int) -> None:
    rle = pytest.importorskip("pycocotools.mask", reason="the models extra is not installed")
    generator = np.random.default_rng(seed)
    mask = np.asfortranarray(generator.random((301, 223)) < generator.uniform(0.001, 0.999), np.uint8)
    mask[:, : 50 * seed] = seed % 2
    compressed = rle.encode(mask)
    text = {"size": [301, 223], "counts": compressed["counts"].decode()}
    assert segmentation_area(text, (223, 301)) == rle.area(compressed) == mask.sum()
    assert segmentation_area(text, (301, 223)) is None, "of an image of another size"
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=2))
    runs = np.diff(edges, prepend=0).tolist()
    assert segmentation_area({"size": [301, 223], "counts": runs}, UNKNOWN_WH) == mask.sum()


@pytest.mark.parametrize(
    "segmentation",
    [
        None, 7, "x", [], {}, [[]], [[1]], [[1, 2, 3]], [[0, 0, 5, 5]], [["a", "b"]], [[None] * 6], [[1e999] * 6],
        [[1e300, 0, 0, 1e300, -1e300, 0]], {"size": [5, 5]}, {"counts": [1, 2]}, {"size": [5, 5], "counts": [1, -2]},
        {"size": [5, 5], "counts": [0, 26]}, {"size": [5], "counts": [1, 2]}, {"size": [5, 5], "counts": [True, True]},
        {"size": [5, 5], "counts": "p" * 10**6}, {"size": [5, 5], "counts": "é"}, {"size": [5, 5], "counts": "oo"},
        [[0, 0, 0.5, 0, 0.5, 0.5]], {"size": ["5", 5], "counts": "52203"}, {"size": [5, 5], "counts": [25]},
        {"size": [5, 5, 5], "counts": [1, 2]},
        {"size": ["a", 10**10], "counts": [1, 1]}, {"size": [[0], 10**10], "counts": [1, 1]},
        {"size": [10**4000, 10**4000], "counts": [1, 1]}, {"size": [5.0, 5.0], "counts": [1, 2]},
    ],
)  # fmt: skip
def test_what_is_no_segmentation_has_no_area(segmentation: Any) -> None:
    assert segmentation_area(segmentation, UNKNOWN_WH) is None


def test_random_texts_never_raise() -> None:
    letters = random.Random(0)
    for _ in range(2000):
        text = "".join(chr(letters.randrange(40, 120)) for _ in range(letters.randrange(30)))
        area = segmentation_area({"size": [100, 100], "counts": text}, (100, 100))
        assert area is None or 0 < area <= 10_000


def test_an_area_of_a_box_is_mmposes_and_never_zero() -> None:
    boxes = np.array([[0, 0, 10, 20], [5, 5, 0, 8], [1, 1, 0.1, 0.1], [150, 150, 400, 400]], np.float64)
    sizes_wh = np.full((4, 2), 200.0)
    assert box_areas(boxes, sizes_wh).tolist() == pytest.approx([106, 1, 1, 0.53 * 49 * 49])
    assert box_areas(boxes, sizes_wh * np.nan)[3] == pytest.approx(0.53 * 400 * 400)
