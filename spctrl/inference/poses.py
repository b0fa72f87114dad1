"""One pose at a time: read from JSON, moved, mirrored, given to another species, drawn, described.

Legend: N instances, K keypoints, H and W the picture's size in pixels.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np

from spctrl.conditions.spatext import draw_index_map
from spctrl.configuration import ConfigurationError
from spctrl.data.annotations.decode import FAR_AWAY_IN_SIZES
from spctrl.data.records import records_from_table
from spctrl.duplicate_keys import DuplicateKeyError, refuse_duplicate_json_keys
from spctrl.errors import ExpectedError
from spctrl.io.utf8 import utf8_fault
from spctrl.prompts import KeypointWords, Subject, evaluation_prompt, load_templates, subjects_from_table

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from spctrl.data.datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class Pose:
    """What is drawn and said of one picture.

    Attributes:
        size_wh: width and height in pixels.
        keypoints: (N, K, 3) float64; x, y in pixels and visibility; v = 0 means not labelled.
        categories: what the instances are, each once.
        background: where they are.
        caption: a description.
    """

    size_wh: tuple[int, int]
    keypoints: NDArray[np.float64]
    categories: tuple[str, ...] = ()
    background: str | None = None
    caption: str | None = None


class _Instance(msgspec.Struct, omit_defaults=True):
    keypoints: list[float]
    category: str | None = None


MAX_SIDE_PX = 16_384
_Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE_PX)]


class _PoseFile(msgspec.Struct, omit_defaults=True):
    """A pose as JSON. A line of an exported ``<split>_split<n>.jsonl`` is one, too."""

    width: _Side
    height: _Side
    anns: list[_Instance]
    background: int | str | None = None
    caption: str | list[str] | None = None


def read_pose(path: Path, dataset: Dataset) -> Pose:
    """A pose of a JSON file: ``width``, ``height`` and ``anns``, each with ``keypoints`` and perhaps ``category``.

    ``background`` (a name, or AP-10K's id) and ``caption`` may be there, and whatever else a line of an exported
    JSON lines file holds.

    Raises:
        ConfigurationError: there is no such file, or it holds something else.
    """
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ConfigurationError(f"expected a pose at {path}, found none ({error.strerror})") from error
    if fault := utf8_fault(data):
        raise ConfigurationError(f"{path}: {fault}")
    try:
        file = msgspec.json.decode(data, type=_PoseFile)
        refuse_duplicate_json_keys(data.decode())
    except DuplicateKeyError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not a pose: {error}") from error
    numbers = dataset.skeleton.num_keypoints * 3
    for i, instance in enumerate(file.anns):
        if len(instance.keypoints) != numbers:
            raise ConfigurationError(
                f"{path}: anns[{i}].keypoints: expected {numbers} numbers, x, y, v for each of {dataset.title}'s "
                f"keypoints, found {len(instance.keypoints)}"
            )
        if fault := _keypoint_fault(np.reshape(instance.keypoints, (-1, 3)), (file.width, file.height)):
            raise ConfigurationError(f"{path}: anns[{i}].keypoints: {fault}")
    captions = [file.caption] if isinstance(file.caption, str) else file.caption or []
    return Pose(
        size_wh=(file.width, file.height),
        keypoints=np.array([each.keypoints for each in file.anns], np.float64).reshape(
            len(file.anns), numbers // 3, 3
        ),
        categories=tuple(dict.fromkeys(each.category for each in file.anns if each.category)),
        background=(
            dataset.backgrounds.get(file.background) if isinstance(file.background, int) else file.background
        ),
        caption=next(iter(captions), None),
    )


def _keypoint_fault(keypoints: NDArray[np.float64], size_wh: tuple[int, int]) -> str | None:
    """The rules of the index, for the (K, 3) keypoints of one instance."""
    xy, v = keypoints[:, :2], keypoints[:, 2]
    if not np.isin(v, (0, 1, 2)).all():
        return "expected visibility 0, 1 or 2"
    farthest = FAR_AWAY_IN_SIZES * np.array(size_wh)
    near = ((xy >= -farthest) & (xy <= size_wh + farthest)).all(axis=1)
    return (
        None if (near | (v == 0)).all() else "a labelled one lies more than one image size outside the image"
    )


def write_pose(pose: Pose, path: Path) -> None:
    """Write a pose as JSON, for ``read_pose``."""
    category = " ".join(pose.categories) or None
    file = _PoseFile(
        width=pose.size_wh[0],
        height=pose.size_wh[1],
        anns=[_Instance(each.reshape(-1).tolist(), category) for each in pose.keypoints],
        background=pose.background,
        caption=pose.caption,
    )
    path.write_bytes(msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n")


def pose_of_row(row: pa.Table) -> Pose:
    """The pose of an index or manifest with one row."""
    (record,), (subject,) = records_from_table(row), subjects_from_table(row)
    return Pose(
        size_wh=record.size_wh,
        keypoints=record.keypoints,
        categories=subject.categories,
        background=subject.background,
        caption=subject.caption,
    )


# What can be done with a pose


def move(pose: Pose, dx_px: float, dy_px: float, *, instance: int, keypoint: int | None = None) -> Pose:
    """An instance, or one of its keypoints, moved to the right and down.

    Raises:
        ExpectedError: there is no such instance.
    """
    if not 0 <= instance < len(pose.keypoints):
        raise ExpectedError(
            f"expected an instance from 0 to {len(pose.keypoints) - 1}, found {instance}: the pose has "
            f"{len(pose.keypoints)}"
        )
    keypoints = pose.keypoints.copy()
    chosen = keypoints[instance, slice(None) if keypoint is None else slice(keypoint, keypoint + 1)]
    chosen[chosen[:, 2] > 0, :2] += (dx_px, dy_px)
    return replace(pose, keypoints=keypoints)


def mirror(pose: Pose, dataset: Dataset) -> Pose:
    """The pose as in a mirror: left becomes right in the picture, and so in the keypoints' names."""
    order = np.arange(dataset.skeleton.num_keypoints)
    for left, right in dataset.skeleton.flip_pairs:
        order[[left, right]] = right, left
    keypoints = pose.keypoints[:, order].copy()
    labelled = keypoints[..., 2] > 0
    keypoints[labelled, 0] = pose.size_wh[0] - 1 - keypoints[labelled, 0]
    return replace(pose, keypoints=keypoints)


def with_species(pose: Pose, species: str) -> Pose:
    """The same pose of another animal."""
    return replace(pose, categories=(species,))


# What a generator takes


def index_map_of(
    pose: Pose, dataset: Dataset, *, keypoint_radius_px: int = 4, link_half_width_px: int = 4
) -> NDArray[np.uint8]:
    """(H, W) uint8 index map."""
    pixels: NDArray[np.uint8] = np.zeros(pose.size_wh[::-1], np.uint8)
    draw_index_map(
        pixels,
        pose.keypoints,
        links=dataset.skeleton.links,
        keypoint_radius_px=keypoint_radius_px,
        link_half_width_px=link_half_width_px,
    )
    return pixels


def prompt_of(pose: Pose, dataset: Dataset, *, keypoints: KeypointWords | None) -> str:
    """The prompt that an evaluation would give the pose.

    Raises:
        ExpectedError: no template fits, as where a species is not known.
    """
    labelled: NDArray[np.bool_] = np.any(pose.keypoints[..., 2] > 0, axis=0)
    subject = Subject(
        image_id=0,
        categories=pose.categories,
        background=pose.background,
        caption=pose.caption,
        labelled=labelled,
    )
    templates = load_templates(None, dataset.name)
    return evaluation_prompt(subject, templates, dataset.name, keypoints=keypoints).text
