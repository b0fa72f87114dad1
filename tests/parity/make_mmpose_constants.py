"""Write tests/parity/mmpose.npz: what mmpose 1.3.2 gives for the cases of mmpose_cases.py.

    make openmmlab
    PYTHONPATH=.:tests .venv/bin/python tests/parity/make_mmpose_constants.py .venv-openmmlab

The weights are the tiny random ViTPose, in mmpose's format. Needs the real data beside the checkout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from conftest import REAL_DATA
from mmpose_cases import CELL_STEP, CONSTANTS, Case, perturbed_predictions, real_case, settings

from eval.openmmlab import MmposeEstimator, OpenMMLab
from eval.vitpose import tiny
from spctrl.demo_data import write_sample

SAMPLE_IMAGES = 2


def main(environment: Path) -> None:
    real = real_case()
    if real is None:
        sys.exit(f"expected real images in {REAL_DATA / 'ap10k'}, found none")
    kept: dict[str, Any] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        tiny.build_mmpose(folder / "tiny.pth")
        write_sample(folder / "sample", images_per_split=SAMPLE_IMAGES, splits=["val"])
        cases = {"real": real}
        for dataset in ("ap10k", "humanart"):
            case = cases[dataset] = sample(folder / "sample", dataset)
            kept |= {f"{dataset}_files": [np.frombuffer(path.read_bytes(), np.uint8) for path in case.images]}
            kept[f"{dataset}_files"] = np.concatenate(kept[f"{dataset}_files"])
            kept[f"{dataset}_sizes"] = [path.stat().st_size for path in case.images]
            kept[f"{dataset}_boxes"] = np.concatenate(case.bboxes_xywh)
            kept[f"{dataset}_counts"] = [len(each) for each in case.bboxes_xywh]
        for case_name, case in cases.items():
            for setting, codec, flip_test, shift in settings():
                estimator = MmposeEstimator(
                    environment,
                    folder / "tiny.pth",
                    case.dataset,
                    codec=codec,
                    flip_test=flip_test,
                    shift_heatmap=shift,
                )
                found = estimator.predict(case.images, case.bboxes_xywh)
                assert found.heatmaps is not None
                key = f"{case_name}_{setting}"
                kept[f"{key}_keypoints"] = found.keypoints.astype(np.float32)
                kept[f"{key}_scores"] = found.scores
                kept[f"{key}_cells"] = found.heatmaps.reshape(*found.scores.shape, -1)[..., ::CELL_STEP]
                print(key)
        numbers = coco_metric(environment, folder, REAL_DATA / "ap10k/annotations/ap10k-val-split1.json")
        kept["ap_names"], kept["ap_values"] = list(numbers), list(numbers.values())
    np.savez_compressed(CONSTANTS, **kept)
    print(f"{CONSTANTS}: {CONSTANTS.stat().st_size / 1024:.0f} KB; {numbers}")


def sample(root: Path, dataset: str) -> Case:
    """The sample's validation images and boxes."""
    if dataset == "ap10k":
        path, images = root / "AP-10K/annotations/ap10k-val-split1.json", root / "AP-10K/data"
    else:
        path, images = root / "HumanArt/annotations/validation_humanart.json", root
    content = json.loads(path.read_bytes())
    boxes = [
        [each["bbox"] for each in content["annotations"] if each["image_id"] == image["id"]]
        for image in content["images"]
    ]
    return Case(dataset, [images / image["file_name"] for image in content["images"]], boxes)


def coco_metric(environment: Path, folder: Path, annotations: Path) -> dict[str, float]:
    """The numbers of mmpose's CocoMetric on perturbed annotations."""
    pq.write_table(perturbed_predictions(annotations), folder / "predictions.parquet")
    request = {
        "annotations": str(annotations),
        "dataset": "ap10k",
        "predictions": str(folder / "predictions.parquet"),
        "result": str(folder / "metric.json"),
    }
    OpenMMLab(folder=environment).run("coco_metric.py", request, folder)
    numbers: dict[str, float] = json.loads((folder / "metric.json").read_bytes())
    return numbers


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
