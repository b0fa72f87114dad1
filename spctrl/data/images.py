"""Looking at image files: real size, whether they can be decoded, and a perceptual hash."""

from __future__ import annotations

import hashlib
import io
import json
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from spctrl.data.datasets import MAX_IMAGE_FILE_BYTES
from spctrl.data.orientation import TURNED, UPRIGHT, orientation_in, orientation_of, without_orientation
from spctrl.data.records import RecordError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from spctrl.data.records import Record

HASH_SIDE = 8
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Others are not tried: PIL would start a PostScript interpreter for one of them."""
_MODES = frozenset(("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB"))
"""PIL's, of at most 8 bits a channel. To make 8 bits of others it cuts off what is above 255."""
_GRAY_MODES = frozenset(("1", "L", "LA"))
_WIDE_MODES = frozenset(("I", "I;16", "I;16B", "I;16L", "I;16N", "F"))
"""PIL's, of one channel of 16 or 32 bits."""
_SAMPLE_FORMAT, _SIGNED, _BITS_PER_SAMPLE, _COMPRESSION, _PLANAR = 339, 2, 258, 259, 284
"""Tags of TIFF."""
MAX_SCANS = 500
"""Of a progressive JPEG. Each goes over the whole image and takes a few bytes of the file, so that a small file could
keep a decoder busy for hours; cameras and tools write about 10."""
_SCAN = b"\xff\xda"
_THUMBNAIL_SIDE = 32
_DRAFT_SIDE = 2 * _THUMBNAIL_SIDE
"""Of what the JPEG decoder scales down to; at the thumbnail's own size, resized copies would get distant hashes."""


def read_image_file(path: Path) -> bytes:
    """The bytes of an untrusted image file.

    Raises:
        FileNotFoundError: there is none.
        RecordError: ``bad_image``: not a regular file (a pipe would be waited for without end), larger than an image
            may be, or not readable.
    """
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise RecordError("bad_image", "expected a regular file, found a folder, pipe or device")
        if facts.st_size > MAX_IMAGE_FILE_BYTES:
            raise RecordError(
                "bad_image", f"expected at most {MAX_IMAGE_FILE_BYTES:,} bytes, found {facts.st_size:,}"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RecordError("bad_image", f"the file cannot be read: {error.strerror}") from error


@contextmanager
def opened_image(
    data: bytes, size_wh: tuple[int, int] | None = None, *, wide: bool = False
) -> Iterator[Image.Image]:
    """An untrusted image file as a PIL image of its stored pixels, of which only the header has been read.

    An orientation tag turns nothing, also not in TIFF files, where Pillow turns the pixels itself. The file's faults,
    those that show when the caller decodes it inside the block too, are the record's.

    Args:
        data: the file's bytes.
        size_wh: width and height in pixels that the header must state; nothing is decoded where it does not.
        wide: whether one channel of 16 or 32 bits is accepted too, for readers that check its values
            (``equal_channels``).

    Raises:
        RecordError: ``bad_image``, ``image_size`` or, of a TIFF file, ``exif_orientation``.
    """
    if len(data) > MAX_IMAGE_FILE_BYTES:
        raise RecordError(
            "bad_image", f"expected at most {MAX_IMAGE_FILE_BYTES:,} bytes, found {len(data):,}"
        )
    try:
        with _opened(data) as image:
            if size_wh is not None and image.size != size_wh:
                raise RecordError("image_size", _size_fault(image, data, size_wh))
            kind = _kind_of_pixels(image)
            if kind is not None and not (wide and image.mode in _WIDE_MODES):
                raise RecordError(
                    "bad_image",
                    f"expected 8 bits a channel, found pixels of the kind {kind}. Convert the image to 8 bits",
                )
            if image.format in ("JPEG", "MPO") and (scans := data.count(_SCAN)) > MAX_SCANS:
                raise RecordError(
                    "bad_image", f"expected at most {MAX_SCANS} scans in a JPEG, found {scans:,}"
                )
            yield image
    except (RecordError, MemoryError):
        raise
    except UnidentifiedImageError:  # whose own message holds a memory address
        raise RecordError("bad_image", f"expected an image ({', '.join(FORMATS)}), found none") from None
    except Exception as error:  # PIL lets through whatever a damaged header leads its parsers to
        raise RecordError("bad_image", f"the image cannot be decoded: {error}") from None


def _opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.format != "TIFF" or orientation_of(image) == UPRIGHT:
        return image
    image.close()
    return Image.open(io.BytesIO(without_orientation(data)), formats=("TIFF",))


def _size_fault(image: Image.Image, data: bytes, size_wh: tuple[int, int]) -> str:
    (width, height), found = size_wh, image.size
    message = f"expected the annotated {width} x {height} pixels, found {found[0]} x {found[1]}"
    if found == (height, width) and (tag := orientation_in(data)) in TURNED:
        message += (
            f", which the file's EXIF orientation tag ({tag}) turns to the annotated size. Rotate the pixels and "
            "remove the tag, for example with `mogrify -auto-orient`"
        )
    return message


def _kind_of_pixels(image: Image.Image) -> str | None:
    """The kind of pixels that PIL does not scale to 8 bits; None where they are right."""
    if image.mode not in _MODES:
        return image.mode
    if image.format != "TIFF":
        return None
    tags = image.tag_v2  # type: ignore[attr-defined]  # of TIFF files
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        return f"{image.mode}, signed"
    if (
        max(tags.get(_BITS_PER_SAMPLE, (1,))) > 8
        and tags.get(_PLANAR) == 2
        and tags.get(_COMPRESSION, 1) == 1
    ):
        return f"{image.mode}, 16 bits in planes"  # which PIL reads as bytes
    return None


def open_rgb(record: Record, data: bytes) -> Image.Image:
    """An image file as an RGB image of the annotated size; an orientation tag turns nothing, as in the index.

    Raises:
        RecordError: not an image, broken, or of more pixels than PIL decodes (``bad_image``); or of another size
            than annotated (``image_size``), which is found before anything is decoded.
    """
    with opened_image(data, record.size_wh) as image:
        return image.convert("RGB")


def equal_channels(image: Image.Image, what: str) -> NDArray[np.uint8]:
    """(H, W) uint8: the value of each pixel of an image of one channel, or of equal ones, whatever its mode.

    Alpha is ignored, as in ``open_rgb``. The colours of a palette count, not the indices, and white of mode ``1`` is
    255: what every viewer shows. Channels of 16 or 32 bits must hold whole numbers from 0 to 255, which are not scaled.

    Args:
        image: as read; not modified.
        what: the image is, with an article; in messages.

    Raises:
        RecordError: ``bad_image``: colours, or values that 8 bits do not hold; names the first such pixel.
    """
    if image.mode in _WIDE_MODES:
        return _as_8_bits(np.asarray(image), what)
    if image.mode in _GRAY_MODES:
        return np.array(image.convert("L"))
    pixels = np.asarray(image.convert("RGB"))
    differs = (pixels != pixels[..., :1]).any(axis=-1)
    if differs.any():
        x, y = first_pixel(differs)
        hint = ". Save the palette's indices as mode L if they are the values" if image.mode == "P" else ""
        raise RecordError(
            "bad_image",
            f"expected {what} of one channel or equal ones, found colours in an image of mode {image.mode}: "
            f"{tuple(pixels[y, x].tolist())} at x = {x}, y = {y}{hint}",
        )
    return np.ascontiguousarray(pixels[..., 0])


def _as_8_bits(values: NDArray[Any], what: str) -> NDArray[np.uint8]:
    wrong = ~((values >= 0) & (values <= 255) & (values == np.floor(values)))  # NaN is wrong, too
    if wrong.any():
        x, y = first_pixel(wrong)
        raise RecordError(
            "bad_image",
            f"expected 8 bits a channel in {what}, or whole numbers from 0 to 255, found {values[y, x]:g} at x = {x}, "
            f"y = {y}",
        )
    return values.astype(np.uint8)


def first_pixel(where: NDArray[np.bool_]) -> tuple[int, int]:
    """x and y of the first pixel, in reading order, that (H, W) bool marks; at least one is marked."""
    y, x = np.unravel_index(int(where.argmax()), where.shape)
    return int(x), int(y)


def probe_image(record: Record, data: bytes) -> bytes:
    """Check an image file against its annotation.

    The file is decoded, at an eighth of its size where the format allows, so that a truncated one is found.

    Args:
        record: whose ``size_wh`` the file must have.
        data: the file's bytes.

    Returns:
        JSON object with ``sha256`` of the file, ``width``, ``height``, ``phash`` (16 hex digits) and ``orientation``
        (the EXIF tag, 1 to 8).

    Raises:
        RecordError: ``bad_image``, ``image_size``, or ``exif_orientation``: an orientation tag that cannot be set to
            1 in exported copies.
    """
    with opened_image(data, record.size_wh) as image:
        image.draft("L", (_DRAFT_SIDE, _DRAFT_SIDE))
        small = image.convert("L").resize(
            (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0
        )
    facts = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "width": record.size_wh[0],
        "height": record.size_wh[1],
        "phash": perceptual_hash(np.asarray(small)),
        "orientation": orientation_in(data),
    }
    return json.dumps(facts).encode()


def perceptual_hash(gray: NDArray[np.uint8]) -> str:
    """64-bit hash of a (32, 32) uint8 grayscale image that small changes of size, quality and brightness
    leave nearly as is.

    Signs of the lowest frequencies of the cosine transform against their median (Zauner, "Implementation and
    benchmarking of perceptual image hash functions", 2010). 16 hex digits.
    """
    frequencies = cv2.dct(gray.astype(np.float32))[:HASH_SIDE, :HASH_SIDE]
    bits = frequencies > np.median(frequencies)
    return np.packbits(bits.reshape(-1)).tobytes().hex()
