"""Methods whose order is known: their images, and the check of the order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.controls import CONTROLS, images_of, order_faults, write_controls


def test_each_method_has_the_images_it_should(sample: Path, tmp_path: Path) -> None:
    images = images_of(sample / "AP-10K", "ap10k", "val", "1")
    assert len(images) == 8
    write_controls(images[:3], tmp_path)
    for i, (name, file) in enumerate(images[:3]):
        assert (tmp_path / "ground-truth" / name / "0.jpg").read_bytes() == file.read_bytes()
        other = images[(i + 1) % 3][1]
        assert (tmp_path / "shuffled" / name / "0.jpg").read_bytes() == other.read_bytes()
        with Image.open(file) as real, Image.open(tmp_path / "noise" / name / "0.png") as noise:
            assert real.size == noise.size
            difference = np.asarray(noise, float) - np.asarray(real.convert("RGB"), float)
        assert 40 < difference.std() < 100
    with pytest.raises(ValueError, match="at least 2 images"):
        write_controls(images[:1], tmp_path)


@pytest.mark.parametrize(
    ("intervals", "faults"),
    [
        (((50, 60), (30, 40), (0, 1)), 0),
        (((50, 60), (30, 50), (0, 1)), 1),
        (((0, 1), (30, 40), (50, 60)), 2),
        (((50, 60), (30, 40)), 1),
    ],
)
def test_the_order_needs_separate_intervals(
    intervals: tuple[tuple[float, float], ...], faults: int, tmp_path: Path
) -> None:
    rows = [
        {"method": method, "metric": "AP", "kind": "", "value": (low + high) / 2, "low": low, "high": high}
        for method, (low, high) in zip(CONTROLS, intervals, strict=False)
    ]
    (tmp_path / "table.json").write_text(json.dumps({"numbers": rows}))
    assert len(order_faults(tmp_path / "table.json")) == faults
    rows[0] |= {"value": None, "low": None, "high": None}
    (tmp_path / "table.json").write_text(json.dumps({"numbers": rows}))
    (fault,) = order_faults(tmp_path / "table.json")
    assert CONTROLS[0] in fault


@pytest.mark.parametrize(("values", "faults"), [((100.0, 60.0, 10.0), 0), ((100.0, 100.0, 10.0), 1)])
def test_the_order_of_values_without_intervals(
    values: tuple[float, ...], faults: int, tmp_path: Path
) -> None:
    """Where all poses are right, no resample differs."""
    rows = [
        {"method": method, "metric": "AP", "kind": "", "value": value, "low": None, "high": None}
        for method, value in zip(CONTROLS, values, strict=True)
    ]
    (tmp_path / "table.json").write_text(json.dumps({"numbers": rows}))
    assert len(order_faults(tmp_path / "table.json")) == faults
