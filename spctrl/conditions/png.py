"""PNG files of sparse 8-bit drawings.

Index maps and renders are nearly all background, so the cost of a file is memory traffic: one pass to clear
the canvas and one through the compressor. The canvas therefore holds PNG scanlines (each row led by its
filter byte, 0 for "none") and is drawn on in place, and zlib-ng's level 2 writes smaller files than PIL's
default several times faster.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
from zlib_ng import zlib_ng

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GRAY, _PALETTE = 0, 3
_COMPRESSION_LEVEL = 2


class Canvas:
    """A black 8-bit drawing that becomes a PNG file.

    Attributes:
        pixels: (H, W) uint8 view to draw on, 0 at first.
    """

    def __init__(self, size_wh: tuple[int, int]) -> None:
        width, height = size_wh
        self._scanlines: NDArray[np.uint8] = np.zeros((height, width + 1), np.uint8)
        self.pixels: NDArray[np.uint8] = self._scanlines[:, 1:]

    def to_png(self, palette: Sequence[tuple[int, int, int]] | None = None) -> bytes:
        """The drawing as a grayscale PNG, or as an indexed one whose value i shows the RGB colour ``palette[i]``."""
        height, width = self.pixels.shape
        chunks = [_SIGNATURE, _header(width, height, _GRAY if palette is None else _PALETTE)]
        if palette is not None:
            chunks.append(_palette_chunk(palette))
        chunks.append(_chunk(b"IDAT", zlib_ng.compress(self._scanlines, _COMPRESSION_LEVEL)))
        chunks.append(_chunk(b"IEND", b""))
        return b"".join(chunks)


def with_palette(png: bytes, palette: Sequence[tuple[int, int, int]]) -> bytes:
    """A grayscale PNG of ``Canvas.to_png`` as the indexed one that the same drawing gives with a palette."""
    width, height = struct.unpack_from(">II", png, len(_SIGNATURE) + 8)
    head = [_SIGNATURE, _header(width, height, _PALETTE), _palette_chunk(palette)]
    return b"".join(head) + png[len(_SIGNATURE) + len(_header(width, height, _GRAY)) :]


def _header(width: int, height: int, colour_type: int) -> bytes:
    return _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0))


def _palette_chunk(palette: Sequence[tuple[int, int, int]]) -> bytes:
    return _chunk(b"PLTE", bytes(channel for colour in palette for channel in colour))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
