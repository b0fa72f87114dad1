"""Small files that expand to much, and archives with harmful members, wherever they are read."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memory import MIB, memory_of

from eval.images import read_rgb
from spctrl.conditions.masks import check_depth, check_mask
from spctrl.data.images import open_rgb, probe_image
from spctrl.data.records import Record, RecordError
from spctrl.errors import ExpectedError
from spctrl.store.packs import suffix_in

SIDE = 64
BOMB_BYTES = 4 * 10**8


def png(extra: bytes, rows: int = SIDE) -> bytes:
    """A white image of 64 x 64 with a chunk before its pixels, of which there may be more rows than it says."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0))
    pixels = zlib.compress((b"\0" + b"\xff" * SIDE) * rows, 9)
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def deflated() -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(10**6)) for _ in range(BOMB_BYTES // 10**6)) + packer.flush()


BOMBS = {
    "zTXt": lambda: png(chunk(b"zTXt", b"Comment\0\0" + deflated())),
    "iTXt": lambda: png(chunk(b"iTXt", b"Comment\0\x01\0\0\0" + deflated())),
    "iCCP": lambda: png(chunk(b"iCCP", b"profile\0\0" + deflated())),
    "eXIf": lambda: png(chunk(b"eXIf", b"II*\0" + bytes(10**6))),
    "IDAT": lambda: png(b"", rows=BOMB_BYTES // (SIDE + 1)),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_no_chunk_of_a_png_expands_to_much(bomb: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert (
        memory_of(lambda: path.write_bytes(BOMBS[bomb]())) >= 0
    )  # in a process of its own: it takes memory to make
    record = Record(1, "a.png", (SIDE, SIDE), np.zeros((0, 17, 3)), np.zeros((0, 4)))

    def read_all() -> None:
        data = path.read_bytes()
        for read in (probe_image, open_rgb, check_mask, check_depth):
            with suppress(RecordError):
                read(record, data)
        with suppress(ExpectedError):
            read_rgb(path)

    assert memory_of(read_all) < 48 * MIB


@pytest.mark.parametrize("compression", ["gzip", "zstd", "brotli"])
def test_a_manifest_whose_pages_truly_expand_to_much_is_refused(compression: str, tmp_path: Path) -> None:
    from spctrl.training.dataset import _read_manifest

    path = tmp_path / "manifest.parquet"

    def write() -> None:
        table = pa.table({"image_id": [1], "file_name": pa.array([bytes(BOMB_BYTES)])})
        pq.write_table(table, path, compression=compression, use_dictionary=False, write_statistics=False)

    assert memory_of(write) >= 0

    def refuse() -> None:
        with pytest.raises(ExpectedError, match=r"manifest\.parquet"):
            _read_manifest(path, None, ())

    assert path.stat().st_size < 4 * MIB
    assert memory_of(refuse) < 64 * MIB


MEMBERS = {
    "up": "../out.png",
    "absolute": "/tmp/out.png",
    "link": "link.png",
    "hard link": "hard.png",
    "device": "null.png",
}
KINDS = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}


@pytest.mark.parametrize("member", MEMBERS)
def test_members_of_a_pack_are_never_extracted(member: str, tmp_path: Path) -> None:
    """Packs are read by their index: of a member's header only the name's suffix counts."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo(MEMBERS[member])
        info.type, info.linkname = KINDS.get(member, tarfile.REGTYPE), "/etc/passwd"
        tar.addfile(info)
    folder = tmp_path / "packs"
    folder.mkdir()
    (folder / "a.tar").write_bytes(buffer.getvalue())
    assert suffix_in(folder / "a.tar") == ".png"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.tar"]
