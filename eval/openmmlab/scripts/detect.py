"""Objects found by mmdet, as a script in OpenMMLab's environment: detect.py REQUEST.json

The request names ``config``, an mmdet configuration file or the name of one that mmdet ships; ``weights``, its
checkpoint; ``labels``, the class names that count (empty: all); ``score_threshold``; ``device``; ``images`` and
``result``, Parquet files.

``images`` has a column ``image_path``, of files without an orientation tag, which mmcv would apply. ``result`` has one
row an object: ``image_path``, ``bbox_xywh`` in pixels, ``score`` and ``label``; images without objects have none.
"""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from mmdet.apis import DetInferencer


def main(request_path: str) -> None:
    request = json.loads(Path(request_path).read_text())
    detector = DetInferencer(
        request["config"], request["weights"], device=request["device"], show_progress=False
    )
    names = detector.model.dataset_meta["classes"]
    unknown = set(request["labels"]) - set(names)
    if unknown:
        sys.exit(f"the detector does not know {', '.join(sorted(unknown))}; it knows {', '.join(names)}")
    found = []
    for path in pq.read_table(request["images"]).column("image_path").to_pylist():
        objects = detector(path)["predictions"][0]
        for label, score, (x1, y1, x2, y2) in zip(
            objects["labels"], objects["scores"], objects["bboxes"], strict=True
        ):
            if score >= request["score_threshold"] and (
                not request["labels"] or names[label] in request["labels"]
            ):
                box = [x1, y1, x2 - x1, y2 - y1]
                found.append({"image_path": path, "bbox_xywh": box, "score": score, "label": names[label]})
    schema = pa.schema(
        [
            ("image_path", pa.string()),
            ("bbox_xywh", pa.list_(pa.float64(), 4)),
            ("score", pa.float64()),
            ("label", pa.string()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(found, schema=schema), request["result"])


if __name__ == "__main__":
    main(sys.argv[1])
