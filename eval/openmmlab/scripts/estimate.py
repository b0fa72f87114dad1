"""Poses by mmpose itself, as a script in OpenMMLab's environment: estimate.py REQUEST.json

This file and its neighbours run where neither this project nor transformers is installed; ``eval.openmmlab`` calls
them.

The request names
- ``weights``, a checkpoint of mmpose 1.x, whose ViTPose is built from the shapes in it, or ``config``, an mmpose
  configuration file, for other networks; ``heads`` (by width) and ``default_head_width``, for attention;
- ``dataset``, an mmpose dataset file below configs/_base_/datasets, for flip pairs;
- ``codec``, ``flip_test``, ``shift_heatmap``, ``device``, and whether to give ``heatmaps``;
- ``boxes`` and ``result``, Parquet files.

``boxes`` has one row a box: ``image_path``, of a file without an orientation tag, which mmcv would apply, and
``bbox_xywh``. ``result`` has the same rows: ``keypoints`` (2K numbers, pixels), ``scores`` (K) and, where asked for,
``heatmaps`` (float32 bytes of (K, 64, 48)).
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from mmengine.config import Config
from mmpose.apis import inference_topdown, init_model
from mmpose.datasets.datasets.utils import parse_pose_metainfo

INPUT_WH, HEATMAP_WH = (192, 256), (48, 64)


def main(request_path: str) -> None:
    request = json.loads(Path(request_path).read_text())
    config = Config.fromfile(request["config"]) if request.get("config") else vitpose_config(request)
    config.model.test_cfg.output_heatmaps = request["heatmaps"]
    model = init_model(config, request["weights"], device=request["device"])
    model.dataset_meta = parse_pose_metainfo(
        {"from_file": f"configs/_base_/datasets/{request['dataset']}.py"}
    )
    boxes = pq.read_table(request["boxes"]).to_pylist()
    found: list[dict[str, Any]] = []
    for path, rows in itertools.groupby(boxes, key=lambda row: row["image_path"]):
        corners = np.array([row["bbox_xywh"] for row in rows], np.float32)
        corners[:, 2:] += corners[:, :2]
        found.extend(
            row_of(sample, request["heatmaps"]) for sample in inference_topdown(model, path, corners)
        )
    schema = pa.schema(
        [("keypoints", pa.list_(pa.float64())), ("scores", pa.list_(pa.float32())), ("heatmaps", pa.binary())]
    )
    pq.write_table(pa.Table.from_pylist(found, schema=schema), request["result"])


def row_of(sample: Any, with_heatmaps: bool) -> dict[str, Any]:
    poses = sample.pred_instances
    heatmaps = sample.pred_fields.heatmaps.cpu().numpy().astype("<f4").tobytes() if with_heatmaps else None
    return {
        "keypoints": poses.keypoints[0].reshape(-1).tolist(),
        "scores": poses.keypoint_scores[0].tolist(),
        "heatmaps": heatmaps,
    }


def vitpose_config(request: dict[str, Any]) -> Any:
    """The configuration of a ViTPose with the checkpoint's width, depth and head, tested as requested."""
    state = torch.load(request["weights"], map_location="cpu", weights_only=True)["state_dict"]
    width = state["backbone.pos_embed"].shape[-1]
    udp = request["codec"] == "udp"
    decoder = {
        "type": "UDPHeatmap" if udp else "MSRAHeatmap",
        "input_size": INPUT_WH,
        "heatmap_size": HEATMAP_WH,
        "sigma": 2,
    }
    classic = "head.deconv_layers.0.weight" in state
    head: dict[str, Any] = {
        "type": "HeatmapHead",
        "in_channels": width,
        "out_channels": len(state["head.final_layer.weight"]),
        "loss": {"type": "KeypointMSELoss", "use_target_weight": True},
        "decoder": decoder,
    }
    if classic:
        head |= {"deconv_out_channels": (256, 256), "deconv_kernel_sizes": (4, 4)}
    else:
        head |= {
            "deconv_out_channels": [],
            "deconv_kernel_sizes": [],
            "final_layer": {"kernel_size": 3, "padding": 1},
        }
    model: dict[str, Any] = {
        "type": "TopdownPoseEstimator",
        "data_preprocessor": {
            "type": "PoseDataPreprocessor",
            "mean": [123.675, 116.28, 103.53],
            "std": [58.395, 57.12, 57.375],
            "bgr_to_rgb": True,
        },
        "backbone": {
            "type": "mmpretrain.VisionTransformer",
            "arch": {
                "embed_dims": width,
                "num_layers": 1
                + max(int(key.split(".")[2]) for key in state if key.startswith("backbone.layers.")),
                "num_heads": request["heads"].get(str(width), max(1, width // request["default_head_width"])),
                "feedforward_channels": len(state["backbone.layers.0.ffn.layers.0.0.weight"]),
            },
            "img_size": INPUT_WH[::-1],
            "patch_size": 16,
            "qkv_bias": True,
            "with_cls_token": False,
            "out_type": "featmap",
            "patch_cfg": {"padding": 2},
        },
        "head": head,
        "test_cfg": {
            "flip_test": request["flip_test"],
            "flip_mode": "heatmap",
            "shift_heatmap": request["shift_heatmap"],
        },
    }
    if not classic:
        model["neck"] = {"type": "FeatureMapProcessor", "scale_factor": 4.0, "apply_relu": True}
    pipeline = [
        {"type": "LoadImage"},
        {"type": "GetBBoxCenterScale"},
        {"type": "TopdownAffine", "input_size": INPUT_WH, "use_udp": udp},
        {"type": "PackPoseInputs"},
    ]
    return Config({"model": model, "test_dataloader": {"dataset": {"pipeline": pipeline}}})


if __name__ == "__main__":
    main(sys.argv[1])
