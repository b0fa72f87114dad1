"""Keypoint heatmaps against the formula, one cell at a time."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from spctrl.conditions.heatmaps import keypoint_heatmaps
from spctrl.data.records import Record
from spctrl.export.text_files import heatmaps_npy

Heatmaps = NDArray[np.float64]
Points = NDArray[np.float64]


def plain_heatmaps(keypoints: Points, size_wh: tuple[int, int]) -> Heatmaps:
    """REFERENCE.md section 6, cell by cell."""
    width, height = size_wh
    total = np.zeros((keypoints.shape[1], 64, 64))
    for instance in keypoints:
        for k, (x, y, v) in enumerate(instance):
            if v == 0:
                continue
            column, row = int(x / (width / 64) + 0.5), int(y / (height / 64) + 0.5)
            for i in range(64):
                for j in range(64):
                    if abs(i - row) <= 6 and abs(j - column) <= 6:
                        total[k, i, j] += math.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * 2**2))
    return total


def labelled(*points: tuple[float, float, float], keypoints: int = 17) -> Points:
    """One instance whose first keypoints are given; the others are not labelled."""
    instance = np.zeros((1, keypoints, 3))
    instance[0, : len(points)] = points
    return instance


@pytest.mark.parametrize("size_wh", [(64, 64), (640, 480), (33, 1000), (1, 1), (501, 77)])
def test_heatmaps_equal_the_formula(size_wh: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    keypoints = np.empty((2, 5, 3))
    keypoints[..., :2] = rng.uniform(-0.3, 1.3, (2, 5, 2)) * size_wh
    keypoints[..., 2] = rng.choice([0, 1, 2, 2], (2, 5))
    found = keypoint_heatmaps(keypoints, size_wh)
    assert found.shape == (5, 64, 64)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, plain_heatmaps(keypoints, size_wh), rtol=0, atol=1e-15)


@pytest.mark.parametrize("column", [*range(-8, 8), *range(57, 72)])
def test_a_stamp_is_cut_at_each_border(column: int) -> None:
    for points in (labelled((column, 30, 2)), labelled((30, column, 2)), labelled((column, column, 2))):
        expected = plain_heatmaps(points, (64, 64))
        np.testing.assert_allclose(keypoint_heatmaps(points, (64, 64)), expected, rtol=0, atol=1e-15)


def test_the_peak_is_one_at_the_rounded_cell_and_the_stamp_is_13_cells_wide() -> None:
    heatmap = keypoint_heatmaps(labelled((105, 200, 2)), (640, 640))[0]
    assert np.unravel_index(heatmap.argmax(), heatmap.shape) == (20, 11)  # 10.5 cells + 0.5
    assert heatmap.max() == 1
    assert np.flatnonzero(heatmap.any(axis=0)).tolist() == list(range(5, 18))
    assert np.flatnonzero(heatmap.any(axis=1)).tolist() == list(range(14, 27))
    assert heatmap[20, 13] == pytest.approx(math.exp(-0.5))


def test_width_and_height_are_told_apart() -> None:
    heatmap = keypoint_heatmaps(labelled((100, 100, 2)), (200, 400))[0]
    assert np.unravel_index(heatmap.argmax(), heatmap.shape) == (16, 32)


def test_several_instances_are_summed() -> None:
    one, other = labelled((30, 30, 2)), labelled((33, 30, 1))
    both = keypoint_heatmaps(np.concatenate([one, other]), (64, 64))
    expected = keypoint_heatmaps(one, (64, 64)) + keypoint_heatmaps(other, (64, 64))
    np.testing.assert_allclose(both, expected, rtol=0, atol=1e-15)
    assert keypoint_heatmaps(np.concatenate([one] * 3), (64, 64)).max() == 3


def test_what_is_not_labelled_is_absent() -> None:
    found = keypoint_heatmaps(labelled((30, 30, 0), (30, 30, 2)), (64, 64))
    assert [bool(heatmap.any()) for heatmap in found[:3]] == [False, True, False]


@pytest.mark.parametrize("place", [(-1000, 30), (30, 1e9), (-7.6, -7.6), (128, 128)])
def test_points_far_outside_leave_nothing(place: tuple[float, float]) -> None:
    assert not keypoint_heatmaps(labelled((*place, 2)), (64, 64)).any()


def test_no_instances_give_empty_heatmaps() -> None:
    found = keypoint_heatmaps(np.empty((0, 17, 3)), (64, 64))
    assert found.shape == (17, 64, 64)
    assert not found.any()


def test_one_call_does_not_change_the_next() -> None:
    points = labelled((30, 30, 2))
    keypoint_heatmaps(points, (64, 64))[:] = 7
    assert keypoint_heatmaps(points, (64, 64)).max() == 1


def test_the_file_holds_them_exactly() -> None:
    points = labelled((30.3, 11.9, 2), (500, 3, 1))
    data = heatmaps_npy(Record(1, "1.jpg", (640, 480), points, np.zeros((1, 4))))
    assert np.array_equal(np.load(io.BytesIO(data)), keypoint_heatmaps(points, (640, 480)))
