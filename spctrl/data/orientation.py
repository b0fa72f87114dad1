"""EXIF orientation tags: what a file's tag says, and the same file with the tag set to 1.

This project ignores orientation tags: images are their stored pixels. Other readers (OpenCV, Pillow's
``exif_transpose``) turn what they read, so exported copies must not have a tag that asks for it.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import cv2
import numpy as np
from PIL import Image

from spctrl.data.records import RecordError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

UPRIGHT: Final = 1
"""The tag's value for pixels that are shown as they are stored; the meaning of no tag, too."""
TURNED: Final = frozenset({5, 6, 7, 8})
"""Values that exchange width and height."""
_TAG, _XMP_TAG = 0x0112, 700
_BYTE, _SHORT, _LONG = 1, 3, 4
_VALUES: Final = {value: value for value in range(1, 9)}
_XMP_PATTERN = re.compile(rb"""(tiff:Orientation\s*(?:=\s*["']|>)\s*)[0-9]""")
_EXIF_PREFIX = b"Exif\x00\x00"
_XMP_PREFIX = b"http://ns.adobe.com/xap/1.0/\x00"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_METADATA: Final = {
    "JPEG": (_EXIF_PREFIX, b"Orientation"),
    "PNG": (b"eXIf", b"iTXt", b"tEXt", b"zTXt"),
    "WEBP": (b"EXIF", b"XMP "),
    "TIFF": (b"",),
}
"""What a file with an orientation tag holds somewhere, by format."""
_BY_OPENCV = ("JPEG", "PNG", "WEBP")
"""Formats whose tag OpenCV can be asked about: in TIFF files libtiff turns the pixels, whatever the flags."""


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation tag of an open image, 1 to 8; 1 where there is none, or none that Pillow can read.

    Of a TIFF file before its pixels are loaded: Pillow turns them then and forgets the tag.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of tags that are damaged
            if image.format == "PNG":
                with suppress(Exception):
                    image.load()  # a chunk behind the pixels counts more than one before them
            return _VALUES.get(image.getexif().get(_TAG, UPRIGHT), UPRIGHT)
    except MemoryError:
        raise
    except Exception:  # Pillow lets through whatever a damaged block leads its parsers to
        return UPRIGHT


def orientation_in(data: bytes) -> int:
    """The orientation tag of an image file, 1 to 8, by which Pillow or OpenCV turns it; 1 where neither does.

    Raises:
        RecordError: see ``without_orientation``.
    """
    return _upright_copy(data)[0]


def without_orientation(data: bytes) -> bytes:
    """An image file with its orientation tags set to 1, in EXIF and in XMP; its pixels are not encoded again.

    Raises:
        RecordError: ``exif_orientation``: the tag cannot be rewritten, such as one in a compressed block, or the file
            cannot be read.
    """
    return _upright_copy(data)[1]


def _upright_copy(data: bytes) -> tuple[int, bytes]:
    """The orientation tag, and the file with the tag set to 1."""
    kind = _kind_of(data)
    if not any(mark in data for mark in _METADATA.get(kind, ())):
        return UPRIGHT, data
    tag = _tag_in(data, kind)
    copy = bytearray(data)
    done = False
    try:
        if tag == UPRIGHT and _is_upright_for_opencv(data, kind):
            return UPRIGHT, data
        found = _REWRITERS[kind](copy)
        tag = next((value for value in (tag, *found) if value != UPRIGHT), UPRIGHT)
        rewritten = bytes(copy)
        done = (
            tag in _VALUES and _tag_in(rewritten, kind) == UPRIGHT and _is_upright_for_opencv(rewritten, kind)
        )
    except (struct.error, ValueError, cv2.error):
        pass
    if not done:
        raise RecordError(
            "exif_orientation",
            f"expected an orientation tag that can be set to 1, found {tag} where it cannot be rewritten. Remove the "
            "tag and leave the pixels as they are, for example with `exiftool -all=`",
        )
    return tag, rewritten


def _kind_of(data: bytes) -> str:
    """Pillow's name of the format; empty for those without tags."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(_PNG_START):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return "TIFF" if data[:2] in (b"II", b"MM") else ""


def _tag_in(data: bytes, kind: str) -> int:
    if not kind:
        return UPRIGHT
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            return orientation_of(image)
    except MemoryError:
        raise
    except Exception:  # as in orientation_of; the messages of some hold a memory address
        raise RecordError(
            "exif_orientation", f"expected a {kind} image, found one that cannot be read"
        ) from None


def _is_upright_for_opencv(data: bytes, kind: str) -> bool:
    """Whether OpenCV, which has its own parser of EXIF, turns nothing."""
    if kind not in _BY_OPENCV:
        return True
    array = np.frombuffer(data, np.uint8)
    shown, stored = (
        cv2.imdecode(array, cv2.IMREAD_REDUCED_GRAYSCALE_8 | flag)
        for flag in (0, cv2.IMREAD_IGNORE_ORIENTATION)
    )
    return shown is None or (stored is not None and np.array_equal(shown, stored))


# Containers


class _Block(NamedTuple):
    """Where in a file metadata lie."""

    start: int
    end: int


def _rewrite_jpeg(data: bytearray) -> list[int]:
    """All segments APP1 before the first scan; readers look no further."""
    values: list[int] = []
    position = 2
    while (position := data.find(b"\xff", position)) >= 0:
        marker = bytes(data[position + 1 : position + 2])
        if marker == b"\xda" or not marker:
            break
        if marker in (b"\x00", b"\x01", b"\xff") or 0xD0 <= marker[0] <= 0xD9:
            position += 1 if marker == b"\xff" else 2
            continue
        (size,) = struct.unpack_from(">H", data, position + 2)
        block = _Block(position + 4, min(position + 2 + size, len(data)))
        if marker == b"\xe1" and data.startswith(_EXIF_PREFIX, block.start, block.end):
            values += _rewrite_exif(data, block)
        elif marker == b"\xe1" and data.startswith(_XMP_PREFIX, block.start, block.end):
            values += _rewrite_xmp(data, block)
        position += 2 + max(size, 2)
    return values


def _rewrite_png(data: bytearray) -> list[int]:
    """The chunk eXIf and texts that are not compressed.

    Raises:
        ValueError: chunks do not fit the file; OpenCV would take any amount of memory for them.
    """
    values: list[int] = []
    for name, block in _chunks(data, len(_PNG_START), len(data), ">I4s", trailer=4):
        before = data[block.start : block.end]
        if name == b"eXIf":
            values += _rewrite_exif(data, block)
        elif name in (b"iTXt", b"tEXt"):
            values += _rewrite_xmp(data, block)
        if data[block.start : block.end] != before:
            struct.pack_into(">I", data, block.end, zlib.crc32(data[block.start - 4 : block.end]))
        if name == b"IEND":
            return values
    raise ValueError("expected a chunk IEND, found none")


def _rewrite_webp(data: bytearray) -> list[int]:
    values: list[int] = []
    (size,) = struct.unpack_from("<I", data, 4)
    for name, block in _chunks(data, 12, min(8 + size, len(data)), "<4sI", trailer=0):
        if name == b"EXIF":
            values += _rewrite_exif(data, block)
        elif name == b"XMP ":
            values += _rewrite_xmp(data, block)
    return values


def _chunks(
    data: bytearray, start: int, end: int, header: str, *, trailer: int
) -> Iterator[tuple[bytes, _Block]]:
    """Names and contents of chunks; where nothing trails them (RIFF), they start at even places.

    Raises:
        ValueError: a chunk does not fit the file.
    """
    while start + 8 <= end:
        first, second = struct.unpack_from(header, data, start)
        name, size = (first, second) if isinstance(first, bytes) else (second, first)
        block = _Block(start + 8, start + 8 + size)
        if block.end + trailer > end:
            raise ValueError("a chunk is larger than the file")
        yield name, block
        start = block.end + (trailer or size % 2)


def _rewrite_tiff(data: bytearray) -> list[int]:
    return _rewrite_exif(data, _Block(0, len(data)))


_REWRITERS: Final[dict[str, Callable[[bytearray], list[int]]]] = {
    "JPEG": _rewrite_jpeg,
    "PNG": _rewrite_png,
    "WEBP": _rewrite_webp,
    "TIFF": _rewrite_tiff,
}
"""Each sets the tags of a file to 1 in place and returns their values."""


# Blocks


def _rewrite_xmp(data: bytearray, block: _Block) -> list[int]:
    values = []
    for found in _XMP_PATTERN.finditer(bytes(data[block.start : block.end])):
        place = block.start + found.end() - 1
        values.append(data[place] - ord("0"))
        data[place] = ord("1")
    return values


def _rewrite_exif(data: bytearray, block: _Block) -> list[int]:
    """Set the orientation in the first directory of a TIFF structure, which is what EXIF is; that of a thumbnail, in
    the second, is its own.
    """
    start, end = block
    for _ in range(2):  # some writers repeat it
        start += len(_EXIF_PREFIX) * data.startswith(_EXIF_PREFIX, start, end)
    order = {b"II": "<", b"MM": ">"}.get(bytes(data[start : start + 2]))
    values: list[int] = []
    has_xmp = False
    if order is None or start + 16 > end:
        return values
    is_big = 43 in data[start + 2 : start + 4]  # BigTIFF
    offset, counted, entry = ("Q", "Q", "HHQQ") if is_big else ("I", "H", "HHII")
    entry = order + entry
    (directory,) = struct.unpack_from(order + offset, data, start + (8 if is_big else 4))
    first = start + directory + struct.calcsize(order + counted)
    if first > end:
        return values
    (count,) = struct.unpack_from(order + counted, data, start + directory)
    size = struct.calcsize(entry)
    for place in range(first, min(first + size * count, end - size + 1), size):
        tag, kind, length, value = struct.unpack_from(entry, data, place)
        if tag == _TAG:
            width = struct.calcsize(order + offset)
            values += struct.unpack_from(
                order + {_BYTE: "B", _LONG: "I"}.get(kind, "H"), data, place + size - width
            )
            kind = _LONG if kind == _LONG else _SHORT
            struct.pack_into(entry[:-1], data, place, tag, kind, 1)
            field = struct.pack(order + ("I" if kind == _LONG else "H"), UPRIGHT)
            data[place + size - width : place + size] = field.ljust(width, b"\x00")
        elif tag == _XMP_TAG and not has_xmp and length <= end - start - value:
            has_xmp = True  # readers take the first one, and many could overlap
            values += _rewrite_xmp(data, _Block(start + value, start + value + length))
    return values
