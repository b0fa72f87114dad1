"""Writing the sample in the raw layouts of AP-10K and HumanArt, with masks and depth beside the images.

Image i of a split depends on the seed, the dataset, the split and i only, so a larger sample contains the
smaller ones. The last validation image is the exception: it repeats the first training image, so that the
audit for leaks has something to find, byte for byte in AP-10K, encoded again and a little brighter in
HumanArt.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from spctrl.data.skeletons import AP10K
from spctrl.demo_data.animals import SPECIES
from spctrl.demo_data.people import KEYPOINT_NAMES_21
from spctrl.demo_data.scenes import Scene, apply_style, draw_animal_scene, draw_people_scene

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

DATASETS = ("ap10k", "humanart")
SPLITS = ("train", "val")
FIRST_NUMBER = {"train": 1, "val": 100_001}
MAX_IMAGES_PER_SPLIT = 100_000
ANNOTATIONS_PER_IMAGE = 10
# (group, scenario, the scenario's number in HumanArt's ids)
SCENARIOS = (
    ("2D_virtual_human", "digital_art", 2),
    ("real_human", "dance", 17),
    ("2D_virtual_human", "cartoon", 1),
    ("real_human", "movie", 19),
    ("2D_virtual_human", "oil_painting", 6),
)
HUMANART_SPLIT_NAMES = {"train": "training", "val": "validation"}
HUMANART_LINKS = (
    (20, 16), (16, 14), (14, 12), (21, 17), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8),
    (7, 9), (10, 18), (8, 10), (11, 19), (9, 11), (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7),
)  # fmt: skip
JPEG_QUALITY = 92

Json = dict[str, Any]


def write_sample(
    root: Path,
    *,
    images_per_split: int = 12,
    seed: int = 0,
    splits: Sequence[str] = SPLITS,
    datasets: Sequence[str] = DATASETS,
) -> None:
    """Writes `root`/AP-10K and `root`/HumanArt: annotations, JPEG images, masks and depth maps.

    Masks are 8-bit one-channel PNGs, 255 on every pixel that shows an annotated instance and 0 elsewhere.
    Depth maps are 8-bit one-channel PNGs, near is bright. The same arguments give the same bytes on the same
    library versions. The repeated image is planted only when both splits are written.

    Args:
        root: folder to write below; made if absent, files of the same name are replaced.
        images_per_split: 1 to 100000.
        seed: 0 or larger.
        splits: some of "train" and "val".
        datasets: some of "ap10k" and "humanart".

    Raises:
        ValueError: an unknown split or dataset, a number out of range.
    """
    if not 1 <= images_per_split <= MAX_IMAGES_PER_SPLIT:
        raise ValueError(f"images_per_split is {images_per_split}, not in 1..{MAX_IMAGES_PER_SPLIT}")
    if seed < 0:
        raise ValueError(f"seed is {seed}, not 0 or larger")
    for kind, given, known in (("split", splits, SPLITS), ("dataset", datasets, DATASETS)):
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"unknown {kind} {', '.join(unknown)}: known are {', '.join(known)}")
    for dataset in datasets:
        write_split = _write_ap10k_split if dataset == "ap10k" else _write_humanart_split
        for split in splits:
            repeats = split == "val" and "train" in splits
            write_split(root, split, images_per_split, seed, repeats_train=repeats)


@dataclass(frozen=True, kw_only=True)
class _Files:
    """The three files of one image."""

    image: Path
    mask: Path
    depth: Path

    def write(self, rgb: NDArray[np.uint8], scene: Scene) -> None:
        _write(self.image, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        fast = [cv2.IMWRITE_PNG_COMPRESSION, 1]
        _write(self.mask, scene.mask, fast)
        _write(self.depth, scene.depth, fast)


def _write(path: Path, pixels: NDArray[Any], options: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded, data = cv2.imencode(path.suffix, pixels, options)
    if not encoded:
        raise ValueError(f"{path}: cannot encode an array of shape {pixels.shape} and type {pixels.dtype}")
    path.write_bytes(data.tobytes())  # cv2.imwrite does not say why it cannot write


def _write_json(path: Path, content: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _rng(seed: int, dataset: str, split: str, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, DATASETS.index(dataset), SPLITS.index(split), index])


def _ap10k_files(root: Path, number: int) -> _Files:
    base, stem = root / "AP-10K", f"{number:012d}"
    return _Files(
        image=base / "data" / f"{stem}.jpg",
        mask=base / "mask" / f"{stem}.png",
        depth=base / "depth" / f"{stem}.png",
    )


def _write_ap10k_split(root: Path, split: str, count: int, seed: int, *, repeats_train: bool) -> None:
    images: list[Json] = []
    annotations: list[Json] = []
    for index in range(count):
        number = FIRST_NUMBER[split] + index
        repeats = repeats_train and index == count - 1
        source = ("train", 0) if repeats else (split, index)
        files = _ap10k_files(root, number)
        scene = _ap10k_scene(seed, *source)
        if repeats:
            first = _ap10k_files(root, FIRST_NUMBER["train"])
            for old, new in zip(astuple(first), astuple(files), strict=True):
                new.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(old, new)
        else:
            files.write(scene.rgb, scene)
        height, width = scene.depth.shape
        images.append(
            {
                "license": 1, "id": number, "file_name": files.image.name, "width": width, "height": height,
                "background": scene.background,
            }
        )  # fmt: skip
        annotations += _ap10k_annotations(scene, number)
    categories = [
        {
            "id": species.category_id, "name": species.name, "supercategory": species.family,
            "keypoints": list(AP10K.keypoint_names), "skeleton": [[a + 1, b + 1] for a, b in AP10K.links],
        }
        for species in SPECIES
    ]  # fmt: skip
    content = {
        "info": {"description": "Drawn sample in the format of AP-10K", "version": "1.0", "year": 2021},
        "licenses": [{"id": 1, "name": "The MIT License", "url": "https://www.mit.edu/~amini/LICENSE.md"}],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    _write_json(root / "AP-10K" / "annotations" / f"ap10k-{split}-split1.json", content)


def _ap10k_scene(seed: int, split: str, index: int) -> Scene:
    # Species go round from one image to the next, so that a small sample shows many.
    species = SPECIES[(5 * index + SPLITS.index(split) + seed) % len(SPECIES)]
    return draw_animal_scene(_rng(seed, "ap10k", split, index), species)


def _ap10k_annotations(scene: Scene, number: int) -> list[Json]:
    annotations = []
    for i, instance in enumerate(scene.instances):
        labelled = instance.keypoints_xyv[:, 2] > 0
        _, _, width, height = instance.bbox_xywh
        annotations.append(
            {
                "id": number * ANNOTATIONS_PER_IMAGE + i, "image_id": number,
                "category_id": instance.category_id, "bbox": list(instance.bbox_xywh),
                "area": width * height, "iscrowd": 0, "num_keypoints": int(labelled.sum()),
                "keypoints": [int(value) for value in np.round(instance.keypoints_xyv).ravel()],
            }
        )  # fmt: skip
    return annotations


def _write_humanart_split(root: Path, split: str, count: int, seed: int, *, repeats_train: bool) -> None:
    images: list[Json] = []
    annotations: list[Json] = []
    for index in range(count):
        repeats = repeats_train and index == count - 1
        source_split, source_index = ("train", 0) if repeats else (split, index)
        group, scenario, scenario_number = SCENARIOS[source_index % len(SCENARIOS)]
        number = FIRST_NUMBER[split] + index
        files = _humanart_files(root, group, scenario, number)
        rng = _rng(seed, "humanart", source_split, source_index)
        scene = draw_people_scene(rng)
        files.write(apply_style(scene.rgb, scenario, rng), scene)
        if repeats:
            pixels = np.asarray(cv2.imread(str(files.image), cv2.IMREAD_COLOR), np.uint8)
            brighter = np.minimum(pixels.astype(np.uint16) + 5, 255).astype(np.uint8)
            _write(files.image, brighter, [cv2.IMWRITE_JPEG_QUALITY, 72])
        image_id = scenario_number * 10**12 + number
        height, width = scene.depth.shape
        images.append(
            {
                "file_name": files.image.relative_to(root).as_posix(), "height": height, "width": width,
                "id": image_id, "page_url": "None", "image_url": "None",
                "picture_name": f"Drawn sample {number}", "author": "spctrl sample",
                "description": f"{scenario}, {scene.description}",
                "category": scenario.replace("_", " "),
            }
        )  # fmt: skip
        annotations += _humanart_annotations(scene, image_id, scenario_number, number)
    category = {
        "supercategory": "person", "id": 1, "name": "person", "keypoints": list(KEYPOINT_NAMES_21),
        "skeleton": [list(link) for link in HUMANART_LINKS],
    }  # fmt: skip
    content = {
        "info": {
            "description": "Drawn sample in the format of Human-Art",
            "year": 2023,
            "date_created": "2023/06/12",
        },
        "images": images,
        "annotations": annotations,
        "categories": [category],
    }
    _write_json(root / "HumanArt" / "annotations" / f"{HUMANART_SPLIT_NAMES[split]}_humanart.json", content)


def _humanart_files(root: Path, group: str, scenario: str, number: int) -> _Files:
    base, stem = root / "HumanArt", f"{number:012d}"
    return _Files(
        image=base / "images" / group / scenario / f"{stem}.jpg",
        mask=base / "mask" / group / scenario / f"{stem}.png",
        depth=base / "depth" / group / scenario / f"{stem}.png",
    )


def _humanart_annotations(scene: Scene, image_id: int, scenario_number: int, number: int) -> list[Json]:
    annotations = []
    for i, instance in enumerate(scene.instances):
        labelled = instance.keypoints_xyv[:, 2] > 0
        flat: list[float | int] = []
        for x, y, v in instance.keypoints_xyv:
            flat += [round(float(x), 4), round(float(y), 4), 2] if v > 0 else [0, 0, 0]
        annotations.append(
            {
                "keypoints": flat[: 17 * 3], "keypoints_21": flat,
                "self_contact": [[round(float(v), 4) for v in point] for point in instance.contacts_xy],
                "num_keypoints": int(labelled[:17].sum()), "num_keypoints_21": int(labelled.sum()),
                "iscrowd": 0, "image_id": image_id, "area": float(np.count_nonzero(instance.visible)),
                "bbox": [float(v) for v in instance.bbox_xywh], "category_id": 1,
                "id": scenario_number * 10**12 + number * ANNOTATIONS_PER_IMAGE + i, "annotator": 0,
            }
        )  # fmt: skip
    return annotations
