"""Folders of generated images, ``<image name>/<i>.jpg``, and the table that lists one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from spctrl.errors import ExpectedError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Of image files, in lower case; upper case counts as well."""
FIRST_FEW = 3

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
    """Paths of all image files below a folder, relative to it, sorted; without hidden files and folders."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(
        path.as_posix()
        for path in paths
        if not any(part.startswith(".") for part in path.parts) and (folder / path).is_file()
    )


def find_images(
    folder: Path, image_names: Iterable[str], count: int, *, split_names: Iterable[str]
) -> dict[str, list[str | None]]:
    """The image files of poses in a folder of someone else's.

    Image ``i`` of a pose is ``<image name>/<i>.<suffix>``, image 0 also ``<image name>.<suffix>``. A pose without such
    a file gets the one that fits the last part of its name alone, where no other pose of the split has that last part.

    Args:
        folder: of the images.
        image_names: of the poses.
        count: images for each pose.
        split_names: image names of all records of the split.

    Returns:
        By image name a path below the folder for each of 0 to ``count - 1``; None where there is none.

    Raises:
        ExpectedError: a file fits several poses, or several files fit one image of a pose; names them.
    """
    files: dict[str, list[str]] = {}
    for path in list_images(folder):
        files.setdefault(path.rpartition(".")[0], []).append(path)

    split_names = list(dict.fromkeys(split_names))
    numbered = {f"{name}/{index}" for name in split_names for index in range(count)}

    def files_of(name: str, index: int) -> list[str]:
        stems = [f"{name}/{index}"]
        if index == 0 and name not in numbered:
            stems.append(name)
        return [path for stem in stems for path in files.get(stem, ())]

    exact = {path for name in split_names for index in range(count) for path in files_of(name, index)}
    names_by_last_part: dict[str, list[str]] = {}
    for name in split_names:
        names_by_last_part.setdefault(PurePosixPath(name).name, []).append(name)

    ambiguous: dict[str, str] = {}

    def find(name: str, index: int) -> str | None:
        found, names = files_of(name, index), [name]
        if not found:
            last_part = PurePosixPath(name).name
            found = [path for path in files_of(last_part, index) if path not in exact]
            names = names_by_last_part[last_part]
        if found and len(names) > 1:
            ambiguous.setdefault(f"{found[0]} fits {_listed(names)}", name)
        elif len(found) > 1:
            ambiguous.setdefault(f"{_listed(found)} fit image {index} of {name}", name)
        return found[0] if found else None

    images = {name: [find(name, index) for index in range(count)] for name in image_names}
    if ambiguous:
        raise ExpectedError(
            f"expected one file in {folder} for each image of a pose, found {len(ambiguous):,} ambiguous: "
            f"{_listed(list(ambiguous), '; ')}. Put each image at <image name>/<i>.jpg, such as "
            f"{generated_path(next(iter(ambiguous.values())), 0)}, and remove other files for it"
        )
    return images


def _listed(items: Sequence[str], separator: str = " and ") -> str:
    """The first few, and how many more there are."""
    more = [f"{len(items) - FIRST_FEW:,} more"] if len(items) > FIRST_FEW else []
    return separator.join([*items[:FIRST_FEW], *more])
