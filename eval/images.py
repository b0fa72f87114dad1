"""Images to measure: folders, files or arrays, and what is wrong with them.

Legend: H and W of an image, pixels.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spctrl.data.images import opened_image, read_image_file
from spctrl.data.orientation import without_orientation
from spctrl.data.records import RecordError
from spctrl.errors import ExpectedError

Pixels = NDArray[np.uint8]
Images = Path | str | Sequence[Path | str | Pixels | Image.Image] | Pixels
"""A folder; files, arrays (H, W, 3) uint8 RGB or PIL images; or one array (N, H, W, 3) uint8 RGB."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
THREADS = 4
"""That decode and resize while the device works."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class ImageError(ExpectedError, ValueError):
    """An image that cannot be measured."""


def image_files(folder: Path) -> list[Path]:
    """All images below a folder, by path; their folders' and own names that start with a dot are left out.

    Raises:
        ImageError: there is no such folder, or no image in it.
    """
    if folder.is_file():
        raise ImageError(
            f"expected a folder of images, found a file: {folder}. Put a single image into a list"
        )
    if not folder.is_dir():
        raise ImageError(f"expected a folder of images, found none at {folder}")
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()  # opening a pipe would wait for its writer
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise ImageError(f"expected images ({', '.join(SUFFIXES)}) below {folder}, found none")
    return found


def listed(images: Images) -> Sequence[Path | str | Pixels | Image.Image]:
    """The images one by one, a folder's by path.

    Raises:
        ImageError: there is none.
    """
    if isinstance(images, Image.Image):
        raise ImageError("expected images, found a single one: put it into a list")
    found = image_files(Path(images)) if isinstance(images, Path | str) else list(images)
    if not found:
        raise ImageError("expected images, found none")
    return found


def read_rgb(image: Path | str | Pixels | Image.Image, size_wh: tuple[int, int] | None = None) -> Pixels:
    """(H, W, 3) uint8 RGB.

    Args:
        image: file, array or PIL image.
        size_wh: width and height that it must have, where they are known.

    Raises:
        ImageError: missing, broken, of another size, or not 8-bit RGB; names the file.
    """
    where = str(image) if isinstance(image, Path | str) else "an image"
    pixels = _decoded(Path(image)) if isinstance(image, Path | str) else np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ImageError(f"{where}: expected (H, W, 3) uint8, found {pixels.shape} {pixels.dtype}")
    height, width = pixels.shape[:2]
    if size_wh not in (None, (width, height)):
        raise ImageError(f"{where}: expected {size_wh[0]} x {size_wh[1]} pixels, found {width} x {height}")
    return pixels


def _decoded(path: Path) -> Pixels:
    with _opened(path) as image:
        return np.asarray(image.convert("RGB"))


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of an image file's stored pixels, from its header.

    Raises:
        ImageError: see ``read_rgb``.
    """
    with _opened(path) as image:
        return image.size


def file_without_orientation(path: Path, copy: Path) -> tuple[Path, tuple[int, int]]:
    """A file for readers that apply orientation tags, and the width and height of its stored pixels.

    The file is the given one, or where it has a tag that turns pixels, a copy whose tag is 1.

    Args:
        path: of an image.
        copy: where a copy goes.

    Raises:
        ImageError: see ``read_rgb``; also a tag that cannot be rewritten.
    """
    with _of_file(path):
        data = read_image_file(path)
        with opened_image(data) as image:
            size_wh = image.size
        rewritten = without_orientation(data)
    if rewritten is data:
        return path, size_wh
    copy.write_bytes(rewritten)
    return copy, size_wh


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    with _of_file(path), opened_image(read_image_file(path)) as image:
        yield image


@contextmanager
def _of_file(path: Path) -> Iterator[None]:
    """Errors as ``ImageError`` with the file's name."""
    try:
        yield
    except FileNotFoundError:
        raise ImageError(f"{path}: expected an image, found no file") from None
    except OSError as error:
        raise ImageError(f"{path}: the image cannot be read: {error.strerror}") from error
    except RecordError as error:
        raise ImageError(f"{path}: {error.message}") from error


def in_batches(
    items: Iterable[Item], prepare: Callable[[Item], Result], batch_size: int
) -> Iterator[list[Result]]:
    """Prepared items in batches, in order; threads prepare the next batch while the caller works on one.

    Raises:
        ValueError: the batch size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, found {batch_size}")
    iterator = iter(items)
    with ThreadPoolExecutor(THREADS) as threads:
        ahead: deque[list[Future[Result]]] = deque()
        while True:
            while len(ahead) < 2 and (batch := list(itertools.islice(iterator, batch_size))):
                ahead.append([threads.submit(prepare, item) for item in batch])
            if not ahead:
                return
            yield [future.result() for future in ahead.popleft()]
