"""Best and worst cases: one pose, its real image, and what each method made of it, with the pose found there.

Legend: H, W size of a picture in pixels; G annotated instances of the image, K keypoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import cv2
import numpy as np

from eval.pose_ap import KEYPOINT_SCORE_THRESHOLD
from spctrl.conditions.spatext import draw_index_map
from spctrl.data.datasets import DATASETS
from spctrl.data.images import read_image_file
from spctrl.data.records import RecordError
from spctrl.paths import listed_files
from spctrl.report.pictures import THUMBNAIL_SIDE, colourise_index_map, decode, overlay_index_map

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eval.instances import Poses
    from spctrl.data.skeletons import Skeleton

LINE_HALF_WIDTH, DISC_RADIUS = 3, 4
"""Pixels of the small picture."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MethodView:
    """What is shown of one method.

    Attributes:
        method: its name.
        files: the first image of each pose, by image id.
        prompts: by image id.
        poses: found in these images, in pixels of the annotated images.
        oks: mean over the annotated instances, by image id.
    """

    method: str
    files: Mapping[int, Path]
    prompts: Mapping[int, str]
    poses: Poses
    oks: Mapping[int, float]


class Chosen(NamedTuple):
    """A pose to show; ``oks`` is the mean over the methods."""

    image_id: int
    kind: Literal["best", "worst"]
    oks: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """A picture, (H, W, 3) uint8 BGR, or the reason why there is none.

    Attributes:
        column: heading of its column in the grid.
        caption: below it.
        picture: the small picture, or None.
    """

    column: str
    caption: str
    picture: NDArray[np.uint8] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One row of the grid."""

    image_id: int
    kind: Literal["best", "worst"]
    oks: float
    name: str
    prompt: str
    panels: tuple[Panel, ...]


def choose_cases(oks: Sequence[Mapping[int, float]], count: int) -> list[Chosen]:
    """The poses with the highest and with the lowest OKS, mean over the methods; none is both.

    Args:
        oks: of each method by image id; poses that not all methods have are left out.
        count: so many of each, where there are as many.
    """
    common = set(oks[0]).intersection(*oks[1:])
    means = {image_id: sum(each[image_id] for each in oks) / len(oks) for image_id in common}
    order = sorted(means, key=lambda image_id: (-means[image_id], image_id))
    count = min(count, (len(order) + 1) // 2)
    best, worst = order[:count], order[max(count, len(order) - count) :]
    return [
        *(Chosen(each, "best", means[each]) for each in best),
        *(Chosen(each, "worst", means[each]) for each in worst),
    ]


def draw_case(
    row: Mapping[str, Any], chosen: Chosen, views: Sequence[MethodView], *, dataset: str, root: Path
) -> Case:
    """The pictures of a pose.

    Args:
        row: its record (``RECORD_SCHEMA``).
        chosen: which it is.
        views: of the methods.
        dataset: ``ap10k`` or ``humanart``.
        root: folder of the dataset.
    """
    spec = DATASETS[dataset]
    size_wh = row["width"], row["height"]
    annotated = np.array([each["keypoints"] for each in row["instances"]], np.float64)
    (real_image,) = listed_files(root, [spec.image_path(row["file_name"])])
    panels = [
        Panel(column="condition", caption="", picture=_condition(annotated, size_wh, spec.skeleton)),
        Panel(column="real image", caption="", picture=_small(_read(real_image))),
    ]
    for view in views:
        oks = view.oks.get(chosen.image_id)
        panels.append(
            Panel(
                column=view.method,
                caption="" if oks is None else f"OKS {oks:.2f}",
                picture=_with_pose(view, chosen.image_id, size_wh, spec.skeleton),
            )
        )
    return Case(
        image_id=chosen.image_id,
        kind=chosen.kind,
        oks=chosen.oks,
        name=row["file_name"],
        prompt=next((view.prompts[chosen.image_id] for view in views if chosen.image_id in view.prompts), ""),
        panels=tuple(panels),
    )


def _condition(
    keypoints: NDArray[np.float64], size_wh: tuple[int, int], skeleton: Skeleton
) -> NDArray[np.uint8]:
    scale = min(1.0, THUMBNAIL_SIDE / max(size_wh))
    width, height = (max(1, round(scale * side)) for side in size_wh)
    return colourise_index_map(_index_map(keypoints, (scale, scale), (height, width), skeleton))


def _with_pose(
    view: MethodView, image_id: int, size_wh: tuple[int, int], skeleton: Skeleton
) -> NDArray[np.uint8] | None:
    image = _small(_read(view.files[image_id])) if image_id in view.files else None
    if image is None:
        return None
    rows = view.poses.image_ids == image_id
    seen = view.poses.keypoint_scores[rows] > KEYPOINT_SCORE_THRESHOLD
    keypoints = np.concatenate([view.poses.keypoints[rows], 2.0 * seen[..., None]], axis=-1)
    height, width = image.shape[:2]
    scales = width / size_wh[0], height / size_wh[1]
    return overlay_index_map(image, _index_map(keypoints, scales, (height, width), skeleton))


def _index_map(
    keypoints: NDArray[np.float64], scales: tuple[float, float], hw: tuple[int, int], skeleton: Skeleton
) -> NDArray[np.uint8]:
    pixels = np.zeros(hw, np.uint8)
    draw_index_map(
        pixels,
        keypoints * (*scales, 1.0),
        links=skeleton.links,
        keypoint_radius_px=DISC_RADIUS,
        link_half_width_px=LINE_HALF_WIDTH,
    )
    return pixels


def _read(path: Path) -> NDArray[np.uint8] | None:
    try:
        return decode(read_image_file(path))
    except (FileNotFoundError, RecordError):
        return None


def _small(picture: NDArray[np.uint8] | None) -> NDArray[np.uint8] | None:
    """The picture with its longer side as long as a thumbnail's; small ones become larger, for the lines on them."""
    if picture is None:
        return None
    height, width = picture.shape[:2]
    scale = THUMBNAIL_SIDE / max(height, width)
    size = max(1, round(scale * width)), max(1, round(scale * height))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(picture, size, interpolation=how), np.uint8)
