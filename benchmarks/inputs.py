"""What the benchmarks read: real annotations where there are any, and seeded ones, kept in build/benchmarks/."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from benchmarks.common import AP10K, BUILD, CONSOLE
from benchmarks.plain import Json

SPLITS = ("train", "val")
REAL_IMAGES = {"train": 7023, "val": 995}
JPEG_QUALITY = 90


def ap10k_file(split: str) -> str:
    return f"ap10k-{split}-split1.json"


def ap10k_root() -> tuple[Path, bool]:
    """A folder with AP-10K's annotations for train and val, and whether they are the real ones."""
    if all((AP10K / "annotations" / ap10k_file(split)).is_file() for split in SPLITS):
        return AP10K, True
    root = BUILD / "ap10k-stand-in"
    if not root.exists():
        CONSOLE.print(
            "No real AP-10K annotations beside the checkout: the sample's, repeated, stand in for them."
        )
        _write_stand_in(root)
    return root, False


def ap10k_documents() -> tuple[dict[str, Json], bool]:
    """The annotation files of train and val, and whether they are real."""
    root, real = ap10k_root()
    return {
        split: json.loads((root / "annotations" / ap10k_file(split)).read_bytes()) for split in SPLITS
    }, real


def by_image(document: Json) -> dict[int, list[Json]]:
    """Annotations of each image id, in file order."""
    found: dict[int, list[Json]] = defaultdict(list)
    for annotation in document["annotations"]:
        found[annotation["image_id"]].append(annotation)
    return found


def write_document(root: Path, document: Json) -> None:
    """Make a raw AP-10K dataset of one split, ``train``, without images."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "data").mkdir(exist_ok=True)
    path = root / "annotations" / ap10k_file("train")
    path.write_text(json.dumps(document))


def merged(documents: dict[str, Json]) -> Json:
    """Train and val as one document."""
    first, *others = documents.values()
    result = {**first}
    for section in ("images", "annotations"):
        result[section] = sum((other[section] for other in others), first[section])
    return result


def half(document: Json, count: int) -> Json:
    """``count`` images drawn at random (seeded), in file order, with their annotations."""
    chosen = set(random.Random(0).sample([image["id"] for image in document["images"]], count))
    return {
        **document,
        "images": [image for image in document["images"] if image["id"] in chosen],
        "annotations": [each for each in document["annotations"] if each["image_id"] in chosen],
    }


def _write_stand_in(root: Path) -> None:
    """The drawn sample's animals, enlarged to AP-10K's usual 1024 pixels and repeated to its number of images."""
    from spctrl.demo_data import write_sample

    drawn = BUILD / "sample"
    write_sample(drawn, images_per_split=24, datasets=("ap10k",))
    for split in SPLITS:
        source = json.loads((drawn / "AP-10K" / "annotations" / ap10k_file(split)).read_bytes())
        annotations = by_image(source)
        result: Json = {**source, "images": [], "annotations": []}
        for number in range(1, REAL_IMAGES[split] + 1):
            image = source["images"][number % len(source["images"])]
            scale = 1024 / max(image["width"], image["height"])
            image_id = number + 100_000 * SPLITS.index(split)
            size = {side: round(image[side] * scale) for side in ("width", "height")}
            result["images"].append({**image, **size, "id": image_id, "file_name": f"{image_id:012}.jpg"})
            for each in annotations[image["id"]]:
                scaled = [
                    value if i % 3 == 2 else int(value * scale) for i, value in enumerate(each["keypoints"])
                ]
                new = {
                    "id": len(result["annotations"]) + 10_000_000 * SPLITS.index(split),
                    "image_id": image_id,
                }
                result["annotations"].append({**each, **new, "keypoints": scaled})
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / ap10k_file(split)).write_text(json.dumps(result))


def jpeg_of_size(size_wh: tuple[int, int]) -> Path:
    """A photo-like JPEG (smooth noise) of a size, drawn when first asked for."""
    path = BUILD / "jpeg" / f"{size_wh[0]}x{size_wh[1]}.jpg"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        width, height = size_wh
        coarse = rng.integers(0, 256, (max(height // 16, 1), max(width // 16, 1), 3), np.uint8)
        noise = rng.normal(0, 6, (height, width, 1)).astype(np.float32)
        pixels = np.clip(cv2.resize(coarse, size_wh, interpolation=cv2.INTER_CUBIC) + noise, 0, 255).astype(
            np.uint8
        )
        Image.fromarray(pixels).save(path, quality=JPEG_QUALITY)
    return path


def humanart_file(images: int, instances: int) -> Path:
    """A synthetic annotation file in HumanArt's format: 17 and 21 keypoints with four decimals, inside the image."""
    path = BUILD / f"humanart-{images}-{instances}.json"
    if path.exists():
        return path
    CONSOLE.print(f"Writing {path.name} (once) ...")
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    widths, heights = rng.integers(400, 1600, (2, images))
    # Every image has an instance; the others fall at random.
    owners = np.concatenate([np.arange(images), rng.integers(0, images, max(instances - images, 0))])
    owners = np.sort(owners[:instances])
    document = {
        "info": {"description": "synthetic, in HumanArt's format"},
        "images": [_humanart_image(i, int(widths[i]), int(heights[i])) for i in range(images)],
        "annotations": [
            _humanart_annotation(number, int(owner), int(widths[owner]), int(heights[owner]), rng)
            for number, owner in enumerate(owners)
        ],
        "categories": [
            {"supercategory": "person", "id": 1, "name": "person", "keypoints": [], "skeleton": []}
        ],
    }
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(document, file)
    temporary.replace(path)
    return path


def _humanart_image(number: int, width: int, height: int) -> Json:
    return {
        "file_name": f"HumanArt/images/real_human/acrobatics/{number:012}.jpg",
        "height": height,
        "width": width,
        "id": 15_000_000_000_000 + number,
        "page_url": f"https://example.org/hk/search/2/image?phrase=acrobatics&page={number}",
        "image_url": f"https://example.org/photos/a-longer-name-of-a-picture-{number}?k=20&m={number}&s=612x612&w=0&h="
        + 64 * "x",
        "picture_name": f"Picture {number}",
        "author": "None",
        "description": "acrobatics, two women in green and white performing acrobatics",
        "category": "acrobatics",
    }


def _humanart_annotation(number: int, owner: int, width: int, height: int, rng: np.random.Generator) -> Json:
    points = np.empty((21, 3))
    points[:, :2] = rng.random((21, 2)) * (width, height)
    visible = rng.random(21) < 0.85
    points[~visible] = 0
    x, y = points[:, :2].min(axis=0)
    box_width, box_height = np.ptp(points[:, :2], axis=0)
    flat: list[Any] = [
        value for (px, py, _), v in zip(points.tolist(), visible, strict=True)
        for value in ((round(px, 4), round(py, 4), 2) if v else (0, 0, 0))
    ]  # fmt: skip
    return {
        "keypoints": flat[:51],
        "keypoints_21": flat,
        "self_contact": [],
        "num_keypoints": int(visible[:17].sum()),
        "num_keypoints_21": int(visible.sum()),
        "iscrowd": 0,
        "image_id": 15_000_000_000_000 + owner,
        "area": float(box_width * box_height),
        "bbox": [float(x), float(y), float(box_width), float(box_height)],
        "category_id": 1,
        "id": 15_000_000_000_000 + number,
        "annotator": 67037,
    }


def tiny_ap10k(images: int) -> Path:
    """A raw AP-10K dataset of many tiny JPEG files, all different: one animal of 17 keypoints in each."""
    root = BUILD / f"tiny-{images}"
    if (root / "annotations").exists():
        return root
    CONSOLE.print(f"Writing {images:,} tiny images to {root.name} (once) ...")
    shutil.rmtree(root, ignore_errors=True)
    (root / "data").mkdir(parents=True)
    rng = np.random.default_rng(0)
    width, height = 64, 48
    document: Json = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat", "supercategory": "Felidae", "keypoints": [], "skeleton": []}],
    }
    for number in range(1, images + 1):
        name = f"{number:012}.jpg"
        coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((width, height)).save(buffer, "JPEG", quality=75)
        (root / "data" / name).write_bytes(buffer.getvalue())
        points = np.column_stack([rng.integers(0, width, 17), rng.integers(0, height, 17), np.full(17, 2)])
        document["images"].append(
            {"license": 1, "id": number, "file_name": name, "width": width, "height": height, "background": 1}
        )
        document["annotations"].append(
            {
                "id": number, "image_id": number, "category_id": 1, "bbox": [0, 0, width, height],
                "area": width * height, "iscrowd": 0, "num_keypoints": 17, "keypoints": points.reshape(-1).tolist(),
            }
        )  # fmt: skip
    write_document(root, document)
    return root
