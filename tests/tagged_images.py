"""Image files with orientation tags, and TIFF files of kinds that no library here writes."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SHORT, LONG = 3, 4
ORIENTATION = 0x0112
Entry = tuple[int, int, Sequence[int] | bytes]
"""Tag, type (SHORT, LONG, or 1 for bytes), values."""


def directory(entries: Sequence[Entry], order: str = "<", start: int = 8) -> bytes:
    """A TIFF header and its first directory, which lies at ``start``."""
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, start).ljust(start, b"\0")
    body, tail = struct.pack(f"{order}H", len(entries)), b""
    tail_at = start + 2 + 12 * len(entries) + 4
    for tag, kind, values in entries:
        code = {1: "B", SHORT: "H", LONG: "I"}[kind]
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        body += struct.pack(f"{order}HHI", tag, kind, len(values))
        if len(packed) <= 4:
            body += packed.ljust(4, b"\0")
        else:
            body += struct.pack(f"{order}I", tail_at + len(tail))
            tail += packed + b"\0" * (len(packed) % 2)
    return head + body + bytes(4) + tail


def exif(orientation: int, order: str = "<", kind: int = SHORT) -> bytes:
    """An EXIF block as it is in a PNG file, with a thumbnail's directory that has an orientation of its own."""
    entries = [(0x010F, 1, b"camera maker"), (ORIENTATION, kind, [orientation])]
    first = bytearray(directory(entries, order))
    struct.pack_into(f"{order}I", first, 8 + 2 + 12 * len(entries), len(first))
    return bytes(first) + directory([(ORIENTATION, SHORT, [8])], order)[8:]


def xmp(orientation: int) -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>'
        "</rdf:RDF></x:xmpmeta>"
    ).encode()


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tagged(
    image: Image.Image, kind: str, orientation: int, order: str = "<", value: int = SHORT, way: str = "EXIF"
) -> bytes:
    """An RGB image as a file with an orientation tag, in EXIF, in XMP or in both."""
    block = b"" if way == "XMP" else exif(orientation, order, value)
    packet = b"" if way == "EXIF" else xmp(orientation)
    if kind == "TIFF":
        entries: list[Entry] = [(ORIENTATION, value, [orientation])] if block else []
        return tiff(np.asarray(image), order, [*entries, *([(700, 1, packet)] if packet else [])])
    if kind == "PNG":
        data = saved(image, kind)
        chunks = png_chunk(b"eXIf", block) if block else b""
        if packet:
            chunks += png_chunk(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + packet)
        return data[:33] + chunks + data[33:]
    options: dict[str, Any] = {"quality": 95} if kind == "JPEG" else {"lossless": True}
    if block:
        options["exif"] = b"Exif\0\0" + block
    if packet:
        options["xmp"] = packet
    return saved(image, kind, **options)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(
    pixels: NDArray[Any],
    order: str = "<",
    entries: Sequence[Entry] = (),
    *,
    planar: bool = False,
    packed: bool = False,
) -> bytes:
    """An (H, W) or (H, W, C) array of unsigned or signed integers as a TIFF file."""
    array = pixels[..., None] if pixels.ndim == 2 else pixels
    height, width, channels = array.shape
    bits = array.dtype.itemsize * 8
    stored = array.astype(array.dtype.newbyteorder(order))
    planes = [stored[..., i] for i in range(channels)] if planar else [stored]
    strips = [zlib.compress(each.tobytes()) if packed else each.tobytes() for each in planes]
    starts = list(itertools.accumulate(map(len, strips), initial=4096))
    extra: list[Entry] = [(338, SHORT, [2])] if channels in (2, 4) else []
    listed: list[Entry] = [
        (256, LONG, [width]), (257, LONG, [height]), (258, SHORT, [bits] * channels),
        (259, SHORT, [8 if packed else 1]), (262, SHORT, [2 if channels > 2 else 1]),
        (273, LONG, starts[:-1]), (277, SHORT, [channels]), (278, LONG, [height]),
        (279, LONG, [len(strip) for strip in strips]), (284, SHORT, [2 if planar else 1]), *extra,
        (339, SHORT, [2 if array.dtype.kind == "i" else 1] * channels), *entries,
    ]  # fmt: skip
    head = directory(sorted(listed, key=lambda entry: entry[0]), order)
    assert len(head) <= 4096
    return head.ljust(4096, b"\0") + b"".join(strips)
