"""What is compared with mmpose: images, boxes and predictions of test_mmpose.py and make_mmpose_constants.py."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from conftest import REAL_DATA
from numpy.typing import NDArray

from eval.instances import PREDICTION_SCHEMA

CONSTANTS = Path(__file__).with_name("mmpose.npz")
CODECS = ("msra", "udp")
FLIPS = {"straight": (False, False), "flip": (True, False), "shift": (True, True)}
"""Name -> whether there is a flip test, and whether its heatmap is shifted."""

CELL_STEP = 97
"""Every so many cells of a heatmap are kept."""


@dataclass(frozen=True)
class Case:
    """Images of one dataset with boxes."""

    dataset: str
    images: list[Path]
    bboxes_xywh: list[list[list[float]]]


def real_case() -> Case | None:
    """The real AP-10K images beside the checkout, where there are any."""
    files = {path.name: path for path in sorted((REAL_DATA / "ap10k" / "data").glob("*.jpg"))}
    if not files:
        return None
    boxes: dict[str, list[list[float]]] = defaultdict(list)
    for path in sorted((REAL_DATA / "ap10k" / "annotations").glob("*.json")):
        content = json.loads(path.read_bytes())
        names = {each["id"]: each["file_name"] for each in content["images"] if each["file_name"] in files}
        for each in content["annotations"]:
            if (name := names.get(each["image_id"])) and each["bbox"] not in boxes[name]:
                boxes[name].append(each["bbox"])
    return Case("ap10k", list(files.values()), [boxes[name] for name in files])


def sample_case(folder: Path, dataset: str, files: dict[str, bytes], boxes: list[list[list[float]]]) -> Case:
    """Sample images, which are kept with the constants: another version of OpenCV may draw other ones."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return Case(dataset, [folder / name for name in files], boxes)


def settings() -> list[tuple[str, str, bool, bool]]:
    """Name, codec, flip test and shift of everything that is compared."""
    return [(f"{codec}_{name}", codec, *FLIPS[name]) for codec, name in itertools.product(CODECS, FLIPS)]


def perturbed_predictions(annotations: Path, seed: int = 0) -> pa.Table:
    """Annotated poses, moved at random, with random scores; every fifth twice, so that suppression has work."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for each in json.loads(annotations.read_bytes())["annotations"]:
        truth = np.array(each["keypoints"], np.float64).reshape(-1, 3)
        spread = np.sqrt(each["area"]) * rng.choice([0.005, 0.03, 0.1, 0.3])
        copies = 2 if each["id"] % 5 == 0 else 1
        for _ in range(copies):
            rows.append(
                _row(each, truth, rng.normal(size=truth[:, :2].shape) * spread, rng.random(len(truth)))
            )
            spread *= 0.2
    return pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA)


def _row(
    annotation: dict[str, Any],
    truth: NDArray[np.float64],
    moves: NDArray[np.float64],
    scores: NDArray[np.float64],
) -> dict[str, Any]:
    keypoints = np.concatenate([truth[:, :2] + moves, scores[:, None]], axis=1)
    return {
        "image_id": annotation["image_id"],
        "annotation_id": annotation["id"],
        "category_id": annotation["category_id"],
        "bbox_xywh": annotation["bbox"],
        "bbox_score": 1.0,
        "keypoints": keypoints.tolist(),
    }
