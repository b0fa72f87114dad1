"""Generated images before they are measured: which are there, whole and of the right size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from eval.images import ImageError, in_batches, read_rgb

CHECKED_AT_ONCE = 64

IMAGES_SCHEMA = pa.schema(
    [("image_id", pa.int64()), ("index", pa.int32()), ("path", pa.string()), ("prompt", pa.string())]
)
"""Images that can be measured: the pose's id, which of its images, the path below the method's folder, the prompt."""


class Checked(NamedTuple):
    """Rows of ``IMAGES_SCHEMA`` of the images that can be measured, and a reject for each one that cannot."""

    rows: list[dict[str, Any]]
    rejects: list[dict[str, object]]


def check_images(
    generated: Iterable[Mapping[str, Any]],
    image_ids: Sequence[int],
    folder: Path,
    *,
    count: int,
    size_wh: tuple[int, int] | None,
) -> Checked:
    """Look at each generated image.

    Args:
        generated: rows with ``image_id``, ``index``, ``path`` (below the folder) and ``prompt``.
        image_ids: of all poses that images were to be made of.
        folder: of the images.
        count: images that each annotated one must have.
        size_wh: width and height that each must have; None where any will do.
    """
    known = {(row["image_id"], row["index"]): row for row in generated}
    wanted = [(image_id, index) for image_id in image_ids for index in range(count)]
    rejects: list[dict[str, object]] = [
        {
            "image_id": image_id,
            "code": "missing_image",
            "message": f"expected image {index} of pose {image_id}, found none",
        }
        for image_id, index in wanted
        if (image_id, index) not in known
    ]
    rows = []
    there = (known[each] for each in wanted if each in known)
    for batch in in_batches(there, lambda row: (row, _fault(folder / row["path"], size_wh)), CHECKED_AT_ONCE):
        for row, fault in batch:
            if fault is None:
                rows.append({name: row[name] for name in IMAGES_SCHEMA.names})
            else:
                code, message = fault
                rejects.append({"image_id": row["image_id"], "code": code, "message": message})
    return Checked(rows, rejects)


def _fault(path: Path, size_wh: tuple[int, int] | None) -> tuple[str, str] | None:
    """Reason code and message."""
    try:
        height, width = read_rgb(path).shape[:2]
    except ImageError as error:
        return "broken_image", str(error)
    if size_wh is not None and size_wh != (width, height):
        expected = " x ".join(map(str, size_wh))
        return "wrong_size", f"{path}: expected {expected} pixels, found {width} x {height}"
    return None
