"""A small ViTPose trained in minutes on sample images: python -m eval.vitpose.small FOLDER

With random weights every image gets a meaningless pose, so a benchmark with them only shows that it runs. This network
finds poses in sample images that it has not seen, well enough to tell images that show the poses asked for from images
that do not. It is good for nothing else.

The result is a folder in transformers' format, used with ``codec = "udp"``.

Legend: B instances of a batch, K keypoints, H, W the network's input, h, w a heatmap.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from eval.bootstrap import bootstrap, interval
from eval.images import read_rgb
from eval.instances import GroundTruth, Poses, read_ground_truth
from eval.pose_ap import PoseAp, evaluate
from eval.pose_estimator import (
    HEATMAP_WH,
    PROTOCOLS,
    PoseEstimator,
    Protocol,
    flip_indices,
    normalised,
)
from eval.vitpose.checkpoints import LAYER_NORM_EPS
from eval.vitpose.crops import boxes_to_regions, crop
from spctrl.data.datasets import DATASETS
from spctrl.demo_data import write_sample
from spctrl.output.terminal import say

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

SIGMA = 2.0
"""Of the target heatmaps, in cells."""

SHARPNESS = 10.0
"""Heatmaps times this are the logarithms of where the keypoint may be: values of 0 and 1 then lie far enough apart."""

VALUE_WEIGHT = 100.0
"""Of the heatmaps' squared error beside the cross-entropy, which alone would leave their height open."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the small network is made.

    Attributes:
        images: sample images drawn to train on.
        steps, batch_size, learning_rate: of AdamW, with a linear rise and a cosine fall of the rate.
        width, layers, heads: of the network.
        max_shift, max_zoom: by how much a region is moved and resized at random, as shares of its size.
        seed: of the sample, the weights and all draws.
    """

    images: int = 600
    steps: int = 600
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    width: int = 128
    layers: int = 4
    heads: int = 4
    max_shift: float = 0.08
    max_zoom: float = 0.2
    seed: int = 0


def make_small(folder: Path, dataset: str = "ap10k", recipe: Recipe | None = None) -> Path:
    """Draw sample images, train on them and write the network; gives the weights' folder.

    Args:
        folder: for ``sample`` and ``weights``.
        dataset: ``ap10k`` or ``humanart``.
        recipe: instead of the usual one.
    """
    recipe = recipe or Recipe()
    truth, files = _sample(folder / "sample", dataset, "train", recipe.images, recipe.seed)
    model = train(truth, files, PROTOCOLS[dataset], recipe)
    model.save_pretrained(folder / "weights")
    (folder / "weights" / "spctrl.json").write_text(
        json.dumps({"weights": "trained on sample images"}) + "\n"
    )
    return folder / "weights"


def check_small(folder: Path, dataset: str = "ap10k", images: int = 200, seed: int = 0) -> dict[str, PoseAp]:
    """Pose AP of the network on unseen sample images, and on the same ones given to each other's poses.

    Args:
        folder: as ``make_small`` left it; the images are drawn into ``unseen``.
        dataset, images, seed: of the images.
    """
    truth, files = _sample(folder / "unseen", dataset, "val", images, seed)
    estimator = PoseEstimator.from_weights(folder / "weights", dataset, codec="udp", shift_heatmap=False)
    paths = [files[image_id] for image_id in truth.image_ids.tolist()]
    order = np.argsort(truth.image_of, kind="stable")
    boxes = np.split(
        truth.bboxes_xywh[order], np.bincount(truth.image_of, minlength=len(paths)).cumsum()[:-1]
    )
    sizes_wh = []
    for path in paths:
        with Image.open(path) as image:
            sizes_wh.append(image.size)
    found = {}
    for name, shown in (("own", paths), ("shuffled", paths[1:] + paths[:1])):
        poses = estimator.predict(shown, boxes, annotated_wh=sizes_wh, keep_heatmaps=False)
        predictions = Poses(
            image_ids=truth.image_ids[truth.image_of[order]],
            category_ids=truth.category_ids[truth.category_of[order]],
            annotation_ids=truth.annotation_ids[order],
            bboxes_xywh=truth.bboxes_xywh[order],
            bbox_scores=np.ones(len(order)),
            keypoints=poses.keypoints,
            keypoint_scores=poses.scores.astype(np.float64),
        )
        found[name] = evaluate(predictions, truth, dataset)
    return found


def _sample(
    folder: Path, dataset: str, split: str, images: int, seed: int
) -> tuple[GroundTruth, dict[int, Path]]:
    """Sample images, drawn: their annotations, and their files by image id."""
    write_sample(folder, images_per_split=images, seed=seed, splits=[split], datasets=[dataset])
    root = folder / {"ap10k": "AP-10K", "humanart": "HumanArt"}[dataset]
    variant = {"ap10k": "1", "humanart": "humanart"}[dataset]
    layout = DATASETS[dataset]
    content = json.loads((root / layout.annotation_path(split, variant)).read_bytes())
    files = {each["id"]: root / layout.image_path(each["file_name"]) for each in content["images"]}
    return read_ground_truth(content), files


def train(truth: GroundTruth, files: dict[int, Path], protocol: Protocol, recipe: Recipe) -> Any:
    """A ``VitPoseForPoseEstimation`` trained on annotated instances; ``files`` are images by id."""
    import torch
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

    torch.manual_seed(recipe.seed)
    backbone = VitPoseBackboneConfig(
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        layer_norm_eps=LAYER_NORM_EPS,
        out_indices=[recipe.layers],
    )
    config = VitPoseConfig(
        backbone_config=backbone, use_simple_decoder=True, num_labels=protocol.skeleton.num_keypoints
    )
    model = VitPoseForPoseEstimation(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
    )
    batches = _batches(truth, files, protocol, recipe)
    for step in range(recipe.steps):
        pixels, cells, labelled = next(batches)
        # Half precision is nearly twice as fast on processors that have it, and as good for this.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            heatmaps = model(pixels).heatmaps
        loss = heatmap_loss(heatmaps.float(), cells, labelled)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            say(f"step {step + 1} of {recipe.steps}: loss {loss.item():.3f}")
    return model.eval()


def heatmap_loss(heatmaps: torch.Tensor, cells: torch.Tensor, labelled: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of where each labelled keypoint is, plus the heatmaps' squared error.

    The squared error alone, with which ViTPose is trained, stays for long at heatmaps that are zero everywhere.

    Args:
        heatmaps: (B, K, h, w) float32.
        cells: (B, K, 2) float32, the keypoints in cells.
        labelled: (B, K) bool; false also for keypoints outside.
    """
    import torch

    w, h = HEATMAP_WH
    x, y = (torch.arange(count, dtype=torch.float32) for count in (w, h))
    along_x, along_y = (
        torch.exp(-((axis - cells[..., i, None]) ** 2) / (2 * SIGMA**2)) for i, axis in enumerate((x, y))
    )
    target = along_y[..., :, None] * along_x[..., None, :] * labelled[..., None, None]
    shares = target.flatten(2) / target.flatten(2).sum(-1, keepdim=True).clamp(min=1e-6)
    entropy = -(shares * (SHARPNESS * heatmaps).flatten(2).log_softmax(-1)).sum(-1)
    return entropy.sum() / labelled.sum().clamp(min=1) + VALUE_WEIGHT * ((heatmaps - target) ** 2).mean()


def _batches(
    truth: GroundTruth, files: dict[int, Path], protocol: Protocol, recipe: Recipe
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless batches of normalised pixels (B, 3, H, W), keypoints in cells (B, K, 2) and which count (B, K)."""
    import torch

    rng = np.random.default_rng(recipe.seed)
    usable = np.flatnonzero(~truth.ignored)
    images = {image_id: read_rgb(files[image_id]) for image_id in truth.image_ids.tolist()}
    centres, sizes = boxes_to_regions(truth.bboxes_xywh)
    last = np.array(HEATMAP_WH) - 1
    while True:
        order = rng.permutation(usable)
        for start in range(0, len(order) - recipe.batch_size + 1, recipe.batch_size):
            crops, cells, labelled = [], [], []
            for i in order[start : start + recipe.batch_size].tolist():
                shift = rng.uniform(-recipe.max_shift, recipe.max_shift, 2).astype(np.float32)
                zoom = np.float32(rng.uniform(1 - recipe.max_zoom, 1 + recipe.max_zoom))
                centre, size = centres[i] + sizes[i] * shift, sizes[i] * zoom
                pixels = crop(images[int(truth.image_ids[truth.image_of[i]])], centre, size, codec="udp")
                own = (truth.keypoints[i, :, :2] - centre + size / 2) / size * last
                seen = (truth.keypoints[i, :, 2] > 0) & (own >= 0).all(axis=1) & (own <= last).all(axis=1)
                if rng.random() < 0.5:
                    pixels, own, seen = _mirrored(pixels, own, seen, protocol)
                crops.append(pixels)
                cells.append(own)
                labelled.append(seen)
            yield (
                normalised(crops, torch.device("cpu")),
                torch.from_numpy(np.stack(cells)).float(),
                torch.from_numpy(np.stack(labelled)),
            )


def _mirrored(
    pixels: NDArray[np.uint8], cells: NDArray[np.float64], seen: NDArray[np.bool_], protocol: Protocol
) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.bool_]]:
    other = flip_indices(protocol.skeleton)
    mirrored = cells[other] * (-1, 1) + (HEATMAP_WH[0] - 1, 0)
    return np.ascontiguousarray(pixels[:, ::-1]), mirrored, seen[other]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for the sample and the weights")
    parser.add_argument("--dataset", choices=sorted(PROTOCOLS), default="ap10k")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--images", type=int, default=Recipe.images)
    arguments = parser.parse_args()
    recipe = Recipe(steps=arguments.steps, images=arguments.images)
    say(f"weights: {make_small(arguments.folder, arguments.dataset, recipe)}")
    for name, found in check_small(arguments.folder, arguments.dataset).items():
        samples = bootstrap(found.at, len(found.image_ids))
        low, high = interval(found.scores["AP"], samples[:, 0])[1:]
        ap50, ar = found.scores["AP50"], found.scores["AR"]
        say(f"{name}: AP {found.scores['AP']:.3f} ({low:.3f} to {high:.3f}), AP50 {ap50:.3f}, AR {ar:.3f}")


if __name__ == "__main__":
    main()
