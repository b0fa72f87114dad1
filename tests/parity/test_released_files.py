"""Files of the paper's authors and real annotations, where they are: ../shared/data beside the repository."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from spctrl.conditions.openpose import render_openpose
from spctrl.conditions.spatext import render_spatext
from spctrl.data.datasets import AP10K, HUMANART, Dataset
from spctrl.data.index import Index, write_index
from spctrl.data.records import Record, records_from_table

DATA = Path(__file__).parents[3] / "shared" / "data"
MAX_PIXELS = 100_000_000

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real data in {DATA}")


def pixels(data: bytes | Path) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        return np.asarray(image.convert("RGB") if image.mode == "P" else image, np.uint8)


def index_map(record: Record) -> bytes:
    return render_spatext(record, links=AP10K.skeleton.links, keypoint_radius_px=4, link_half_width_px=4)


def render(record: Record) -> bytes:
    return render_openpose(
        record,
        style="openpose",
        keypoint_names=AP10K.skeleton.keypoint_names,
        links=AP10K.skeleton.links,
        keypoint_radius_px=4,
        link_half_width_px=4,
    )


def indexed(folder: Path, path: Path, dataset: Dataset) -> tuple[Index, list[Record]]:
    index = write_index(path, dataset, "train", folder / "index.parquet", max_pixels=MAX_PIXELS)
    return index, records_from_table(pq.read_table(folder / "index.parquet"))


def test_map_and_render_of_image_1996_equal_the_released_ones(tmp_path: Path) -> None:
    found = [
        record
        for split in ("train", "val")
        for record in indexed(tmp_path, DATA / f"ap10k/annotations/ap10k-{split}-split1.json", AP10K)[1]
        if record.image_id == 1996
    ]
    (record,) = found
    expected = DATA / "ap10k/expected/000000001996"
    released_map = pixels(expected / "pose_kptindex.png")
    assert released_map.ndim == 2 or (released_map == released_map[..., :1]).all()
    assert np.array_equal(
        pixels(index_map(record)), released_map if released_map.ndim == 2 else released_map[..., 0]
    )
    assert np.array_equal(pixels(render(record)), pixels(expected / "openpose.png")[..., :3])


GOLDEN = DATA / "golden/dataset/data"


def golden_records() -> dict[int, Record]:
    """What the golden dataset's JSON lines say of each image."""
    found = {}
    for path in sorted(GOLDEN.glob("*_split1.jsonl")):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            keypoints = np.array([each["keypoints"] for each in line["anns"]], np.float64).reshape(-1, 17, 3)
            boxes = np.array([each["bbox"] for each in line["anns"]], np.float64).reshape(-1, 4)
            size_wh = line["width"], line["height"]
            found[line["image_id"]] = Record(line["image_id"], line["filename"], size_wh, keypoints, boxes)
    return found


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("pose_kptindex/*.png")), ids=lambda path: path.stem)
def test_index_maps_equal_those_of_the_golden_dataset(path: Path) -> None:
    record = golden_records()[int(path.stem)]
    expected = pixels(path)
    if expected.ndim == 3:
        assert (expected == expected[..., :1]).all()
        expected = expected[..., 0]
    assert np.array_equal(pixels(index_map(record)), expected)


def test_the_golden_dataset_is_there() -> None:
    assert len(list(GOLDEN.glob("pose_kptindex/*.png"))) == len(golden_records()) > 0


def test_whole_real_annotation_files_are_indexed_without_a_reject(tmp_path: Path) -> None:
    counts, instances = [], 0
    for split in ("train", "val"):
        path = DATA / f"ap10k/annotations/ap10k-{split}-split1.json"
        index, records = indexed(tmp_path, path, AP10K)
        assert index.rejects.num_rows == 0
        assert index.images_in_file == len(records)
        counts.append(len(records))
        instances += sum(len(record.keypoints) for record in records)
    assert counts == [7_023, 995]
    assert instances == 10_394


def test_the_real_files_of_a_few_images_are_indexed_without_a_reject(tmp_path: Path) -> None:
    for name, dataset, images, instances in (
        ("ap10k/annotations/ap10k-test-split1.json", AP10K, 2, None),
        ("humanart/annotations/validation_humanart.json", HUMANART, 3, 4),
    ):
        index, records = indexed(tmp_path, DATA / name, dataset)
        assert (index.rejects.num_rows, len(records)) == (0, images)
        assert instances in (None, sum(len(record.keypoints) for record in records))


def test_coordinates_of_real_instances_are_exact(tmp_path: Path) -> None:
    path = DATA / "humanart/annotations/validation_humanart.json"
    raw = json.loads(path.read_text())["annotations"]
    indexed(tmp_path, path, HUMANART)
    rows = pq.read_table(tmp_path / "index.parquet", columns=["instances"]).column(0).to_pylist()
    found = {each["annotation_id"]: each for row in rows for each in row}
    for annotation in raw:
        instance = found[annotation["id"]]
        assert [number for point in instance["keypoints"] for number in point] == annotation["keypoints"]
        assert [number for point in instance["keypoints_21"] for number in point] == annotation[
            "keypoints_21"
        ]
        assert instance["bbox_xywh"] == annotation["bbox"]
