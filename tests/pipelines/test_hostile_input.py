"""A dataset that means harm, built whole: bad records are set aside, and nothing of it gets out of its place."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import struct
import tarfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tasks.dataset.images import READ_AT_ONCE_BYTES

if TYPE_CHECKING:
    from conftest import Workspace

SCRIPT = "</td><script>alert(1)</script><img src=x onerror=alert(2)>"
SECRET = b"what must not be copied"
LARGE_BYTES = READ_AT_ONCE_BYTES


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


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON lines file, whose lines end at line feeds only."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


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
    samples = [{**sample, "captions": json.loads(sample["captions"])} for sample in samples]
    assert captions(samples, "captions") == expected
    assert captions(parquet, "captions") == expected
    assert captions([json.loads(line) for line in lines], "caption") == expected
    assert len(lines) == len(samples) == len(parquet)
    page = (workspace.exports / "report.html").read_text()
    assert "<script>alert(1)" not in page
    assert "onerror=alert(2)>" not in page


# Things that are no files, links, and names


@pytest.fixture
def odd(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """AP-10K's training sample with a folder, a socket, a device and links where images should be."""
    raw = workspace.data / "AP-10K"
    images = {image_id: raw / f"data/{image_id:012d}.jpg" for image_id in range(1, 9)}
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copyfile(images[6], outside / "6.jpg")
    shutil.copyfile(images[8], outside / "8.jpg")
    shutil.move(images[7], raw / "data/inside.jpg")
    for image_id in (1, 2, 3, 4, 8):
        images[image_id].unlink()
    images[1].mkdir()
    monkeypatch.chdir(raw / "data")  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(images[2].name)
    images[3].symlink_to("/dev/zero")
    images[4].symlink_to("/proc/self/stat")
    with images[5].open("wb") as file:
        file.truncate(LARGE_BYTES + 1)  # nothing but holes
    monkeypatch.setattr("tasks.dataset.images.MAX_IMAGE_FILE_BYTES", LARGE_BYTES)
    (raw / "data/deep").symlink_to(outside)
    images[7].symlink_to("inside.jpg")
    os.link(outside / "8.jpg", images[8])
    with workspace.edit_annotations("ap10k", "train") as content:
        content["images"][5]["file_name"] = "deep/6.jpg"
    workspace.configure("build", max_reject_share=1)
    return workspace


def test_what_is_no_image_file_is_set_aside(odd: Workspace) -> None:
    assert odd.build().succeeded
    assert rejects(odd, "images") == {
        1: "missing_image",
        2: "missing_image",
        3: "missing_image",
        4: "outside_dataset",
        5: "bad_image",
        6: "outside_dataset",
    }
    # A link within the dataset is as good as a file; a hard link is a file, wherever its other name is.
    assert [row["image_id"] for row in odd.manifest("ap10k", "train")] == [7, 8]


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder"])
def test_an_annotation_file_that_is_none_stops_the_build_and_not_the_process(
    workspace: Workspace, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = workspace.annotation_path("ap10k", "train")
    path.unlink()
    monkeypatch.chdir(path.parent)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    assert not workspace.build().succeeded


def test_no_write_goes_through_a_hard_link(workspace: Workspace) -> None:
    workspace.configure("export", link="hard")
    assert workspace.build().succeeded
    folder, exported = workspace.export_folder("ap10k"), workspace.exported()
    sources = sorted((workspace.data / "AP-10K/data").glob("*.jpg"))
    before = {path: path.read_bytes() for path in sources}
    assert (folder / "data" / sources[0].name).samefile(sources[0])
    for path in folder.rglob("*"):  # every file of the export is another name of a source
        if path.is_file() and ".spctrl" not in path.parts:
            path.unlink()
            path.hardlink_to(sources[0])
    shutil.rmtree(folder / ".spctrl")
    workspace.configure("export", link="copy")
    assert workspace.build().succeeded
    assert {path: path.read_bytes() for path in sources} == before
    assert workspace.exported() == exported
    assert not (folder / "data" / sources[0].name).samefile(sources[0])


NAMES = {
    1: "new\nline.jpg",
    2: "back\\slash.jpg",
    3: "\x1b[2J.jpg",
    4: "x" * 251 + ".jpg",
    5: "folder.png/5.jpg",
    6: "\u202egpj.6.jpg",
    7: "\u2028 7 <script>.jpg",
}


def test_odd_names_are_refused_or_kept_as_they_are(workspace: Workspace) -> None:
    data = workspace.data / "AP-10K/data"
    (data / "folder.png").mkdir()
    for image_id, name in NAMES.items():
        (data / f"{image_id:012d}.jpg").rename(data / name)
    shutil.copyfile(data / "000000000008.jpg", os.fsencode(data) + b"/\xff\xfe.jpg")
    with workspace.edit_annotations("ap10k", "train") as content:
        for image_id, name in NAMES.items():
            content["images"][image_id - 1]["file_name"] = name
    workspace.configure("build", max_reject_share=1)
    workspace.configure("export", format="folders,webdataset,parquet")
    assert workspace.build().succeeded
    assert rejects(workspace, "index") == dict.fromkeys(range(1, 6), "unsafe_path")
    manifest = {row["image_id"]: row for row in workspace.manifest("ap10k", "train")}
    assert {i: row["file_name"] for i, row in manifest.items()} == {
        6: NAMES[6],
        7: NAMES[7],
        8: "000000000008.jpg",
    }
    folder = workspace.export_folder("ap10k")
    assert all((folder / row["image_path"]).is_file() for row in manifest.values())
    assert [line["image_id"] for line in lines_of(folder / "train_split1.jsonl")] == [6, 7, 8]
    assert "<script>" not in (workspace.exports / "report.html").read_text()


# Exports and stores that come from elsewhere


def test_a_ledger_removes_nothing_outside_its_export(workspace: Workspace, tmp_path: Path) -> None:
    assert workspace.build().succeeded
    baits = [tmp_path / "bait", workspace.exports / "bait", workspace.folder / "bait"]
    for bait in baits:
        bait.write_bytes(SECRET)
    folder = workspace.export_folder("ap10k")
    (path,) = (folder / ".spctrl").glob("*.parquet")
    listed = pq.read_table(path, partitioning=None).to_pylist()
    ways_out = [os.path.relpath(bait, folder) for bait in baits] + [str(bait) for bait in baits]
    hostile = [{"path": way, "made_from": "x", "digest": "0" * 64} for way in ways_out]
    pq.write_table(pa.Table.from_pylist(listed + hostile), path)
    with workspace.edit_annotations("ap10k", "train") as content:
        content["images"] = content["images"][:-1]
        content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 8]
    assert workspace.build().succeeded
    assert [bait.read_bytes() for bait in baits] == [SECRET] * 3
    assert not (folder / "data/000000000008.jpg").exists(), "what is stale and its own is removed"
