"""Folders of generated images, ``<image name>/<i>.jpg``, and the table that lists one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

GENERATED_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("image_name", pa.string()),
        ("index", pa.int32()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("path", pa.string()),
        ("digest", pa.string()),
        ("weights", pa.string()),
    ]
)
"""One row per generated image.

``image_name`` is the path of the pose's own image in its dataset, without suffix; ``index`` counts the images of one
pose; ``path`` is relative to the method's folder; ``digest`` is SHA-256 in hex; ``seed`` is null where someone else's
code drew the image; ``weights`` is ``random`` or the digest of the model's.
"""


def generated_path(image_name: str, index: int) -> str:
    """Path of an image below its method's folder."""
    return f"{image_name}/{index}.jpg"


def generated_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of ``GENERATED_SCHEMA`` as a table; what a row does not name is null."""
    return pa.Table.from_pylist(list(rows), schema=GENERATED_SCHEMA)


def list_images(folder: Path) -> list[str]:
    """Paths of all image files below a folder, relative to it, sorted."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    )


def find_images(paths: Iterable[str], image_name: str, count: int) -> list[str | None]:
    """The image files of one pose.

    Args:
        paths: of all image files below the folder.
        image_name: of the pose's image. ``<image name>/<i>.<suffix>`` is looked for first, then, as image 0,
            ``<image name>.<suffix>``; then both by the last part of the name alone.
        count: images for each pose.

    Returns:
        A path for each of 0 to ``count - 1``; None where there is none.
    """
    known = set(paths)
    names = dict.fromkeys((image_name, PurePosixPath(image_name).name))

    def find(index: int) -> str | None:
        stems = [stem for name in names for stem in (f"{name}/{index}", *([name] if index == 0 else []))]
        candidates = (f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES)
        return next((each for each in candidates if each in known), None)

    return [find(index) for index in range(count)]
