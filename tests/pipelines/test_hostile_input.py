"""A dataset that means harm, built whole: bad records are set aside, and nothing of it gets out of its place."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

if TYPE_CHECKING:
    from conftest import Workspace

SCRIPT = "</td><script>alert(1)</script><img src=x onerror=alert(2)>"
SECRET = b"what must not be copied"


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def with_text_bomb(png: bytes) -> bytes:
    """A whole PNG with a compressed text of 50 MB before its pixels."""
    header_end = 8 + 25
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000), 9))
    return png[:header_end] + text + png[header_end:]


def with_size(png: bytes, width: int, height: int) -> bytes:
    """A PNG whose header claims another size."""
    body = struct.pack(">II", width, height) + png[24:29]
    return png[:8] + chunk(b"IHDR", body) + png[33:]


def as_png(path: Path) -> bytes:
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def rejects(workspace: Workspace, stage: str) -> dict[int, str]:
    """Reason codes of a stage's rejects by image id."""
    (path,) = workspace.store.glob(f"runs/{stage}/*/*/rejects.parquet")
    return {row["image_id"]: row["code"] for row in pq.read_table(path, partitioning=None).to_pylist()}


def everything_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture
def hostile(workspace: Workspace, tmp_path: Path) -> Workspace:
    """AP-10K's training sample with eight images, most of which became something else."""
    raw = workspace.data / "AP-10K"
    secret = tmp_path / "secret.png"
    secret.write_bytes(SECRET)
    images = {image_id: raw / f"data/{image_id:012d}.jpg" for image_id in range(1, 9)}
    masks = {image_id: raw / f"mask/{image_id:012d}.png" for image_id in range(1, 9)}
    bomb = with_text_bomb(as_png(images[2]))
    huge = with_size(as_png(images[3]), 60_000, 60_000)
    masks[4].write_bytes(with_text_bomb(masks[4].read_bytes()))
    for path in (images[1], images[2], images[3], masks[5], images[6]):
        path.unlink()
    images[1].symlink_to(secret)
    images[2].write_bytes(bomb)
    images[3].write_bytes(huge)
    masks[5].symlink_to(secret)
    os.mkfifo(images[6])
    with workspace.edit_annotations("ap10k", "train") as content:
        content["images"][6]["file_name"] = "../../secret.png"
        content["categories"] = [{**each, "name": SCRIPT} for each in content["categories"]]
    workspace.configure("build", conditions=["spatext", "mask"], max_reject_share=1)
    workspace.configure("export", format="folders,webdataset,parquet")
    return workspace


def test_only_harmless_records_are_built(hostile: Workspace) -> None:
    assert hostile.build().succeeded
    assert rejects(hostile, "index") == {7: "unsafe_path"}
    assert rejects(hostile, "images") == {
        1: "outside_dataset",
        2: "bad_image",
        3: "bad_image",
        6: "missing_image",
    }
    assert {i: code for i, code in rejects(hostile, "mask").items() if i in (4, 5)} == {
        4: "bad_image",
        5: "outside_dataset",
    }
    assert [row["image_id"] for row in hostile.manifest("ap10k", "train")] == [8]


def test_no_export_holds_what_lies_elsewhere(hostile: Workspace, tmp_path: Path) -> None:
    work = hostile.folder.name
    before = {name for name in everything_below(tmp_path) if not name.startswith(f"{work}/")}
    assert hostile.build().succeeded
    assert {name for name in everything_below(tmp_path) if not name.startswith(f"{work}/")} == before
    assert {path.name for path in hostile.folder.iterdir()} <= {"store", "exports", "luigi-test.cfg"}
    for path in (*hostile.exports.rglob("*"), *hostile.store.rglob("*")):
        if path.is_file():
            assert SECRET not in path.read_bytes()
    with tarfile.open(hostile.export_folder("ap10k") / "webdataset/train_split1-000000.tar") as tar:
        assert {member.name for member in tar} == {
            f"000000000008.{kind}" for kind in ("jpg", "spatext.png", "mask.png", "json")
        }


def test_names_of_categories_cannot_leave_their_cell(hostile: Workspace) -> None:
    assert hostile.build().succeeded
    page = (hostile.exports / "report.html").read_text()
    assert "<script>alert(1)" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_captions_are_data_wherever_they_go(workspace: Workspace) -> None:
    texts = [SCRIPT, 'line\nbreak"}\n{"image_id": 1', "\u2028\x00\x1b[2J", "鹿" * 5000]
    with workspace.edit_annotations("humanart", "train") as content:
        for image, text in zip(content["images"], texts, strict=False):
            image["description"] = text
        ids = [image["id"] for image in content["images"][: len(texts)]]
    workspace.configure("build", datasets=["humanart"], conditions=["spatext"])
    workspace.configure("export", format="folders,webdataset,parquet")
    assert workspace.build().succeeded
    expected = {image_id: [text] for image_id, text in zip(ids, texts, strict=True)}
    folder = workspace.export_folder("humanart")

    def captions(rows: list[dict[str, Any]], name: str) -> dict[int, list[str]]:
        return {row["image_id"]: row[name] for row in rows if row["image_id"] in expected}

    with tarfile.open(folder / "webdataset/train_split1-000000.tar") as tar:
        members = [tar.extractfile(member) for member in tar if member.name.endswith(".json")]
        samples = [json.load(member) for member in members if member is not None]
    parquet = pq.read_table(folder / "parquet/train_split1-000000.parquet", partitioning=None).to_pylist()
    lines = (folder / "train_split1.jsonl").read_bytes().split(b"\n")[:-1]
    assert captions(samples, "captions") == expected
    assert captions(parquet, "captions") == expected
    assert captions([json.loads(line) for line in lines], "caption") == expected
    assert len(lines) == len(samples) == len(parquet)
    page = (workspace.exports / "report.html").read_text()
    assert "<script>alert(1)" not in page
    assert "onerror=alert(2)>" not in page
