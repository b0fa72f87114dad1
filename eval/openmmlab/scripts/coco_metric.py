"""mmpose's CocoMetric on given predictions, as a script in OpenMMLab's environment: coco_metric.py REQUEST.json

The request names ``annotations``, a COCO keypoint file; ``dataset`` as for estimate.py; ``predictions``, a Parquet file
with one row an instance (``image_id``, ``category_id``, ``bbox_xywh``, ``bbox_score`` and ``keypoints``, K triplets of
x, y and score: ``eval.instances.PREDICTION_SCHEMA``); and ``result``, a JSON file for the metric's numbers.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from mmpose.datasets.datasets.utils import parse_pose_metainfo
from mmpose.evaluation.metrics import CocoMetric

PADDING, ASPECT = 1.25, 192 / 256


def main(request_path: str) -> None:
    request = json.loads(Path(request_path).read_text())
    metric = CocoMetric(ann_file=request["annotations"])
    metric.dataset_meta = parse_pose_metainfo(
        {"from_file": f"configs/_base_/datasets/{request['dataset']}.py"}
    )
    rows = pq.read_table(request["predictions"]).to_pylist()
    metric.process([], [sample_of(number, row) for number, row in enumerate(rows)])
    Path(request["result"]).write_text(json.dumps(metric.evaluate(len(rows))))


def sample_of(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """A data sample as the top-down pipeline leaves it: its scale is the padded box in the input's aspect ratio."""
    keypoints = np.array(row["keypoints"], np.float64)
    x, y, width, height = row["bbox_xywh"]
    size = np.array([width, height]) * PADDING
    size = np.maximum(size, size[::-1] * (ASPECT, 1 / ASPECT))
    score = np.array([row["bbox_score"]])
    return {
        "id": number,
        "img_id": row["image_id"],
        "category_id": row["category_id"],
        "gt_instances": {"bbox_scales": size[None], "bbox_scores": score},
        "pred_instances": {
            "keypoints": keypoints[None, :, :2],
            "keypoint_scores": keypoints[None, :, 2],
            "bboxes": np.array([[x, y, x + width, y + height]]),
        },
    }


if __name__ == "__main__":
    main(sys.argv[1])
