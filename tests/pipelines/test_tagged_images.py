"""Images with orientation tags, from the raw data to what readers see of an export; and images not of 8 bits."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import sha256
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tagged_images import exif, saved, tagged

if TYPE_CHECKING:
    from conftest import Build, Workspace

    Pixels = NDArray[np.uint8]

TAGS = {1: 6, 2: 3, 3: 8, 4: 5, 5: 2, 6: 4, 7: 7}
"""By image id; image 8 has no tag."""
FORMATS = {5: "PNG", 6: "WEBP", 7: "TIFF"}
"""Of images that are no JPEG; their names end in .jpg all the same."""
MANIFEST = "manifests/train_split1.parquet"


def built(workspace: Workspace) -> Build:
    """A build that must succeed."""
    build = workspace.build()
    assert build.succeeded, build.errors
    return build


def raw_path(workspace: Workspace, image_id: int) -> Path:
    return workspace.data / f"AP-10K/data/{image_id:012d}.jpg"


def tag(path: Path, orientation: int, kind: str = "JPEG") -> None:
    """Give a JPEG file an orientation tag, or make it one of another format that has it."""
    data = path.read_bytes()
    if kind == "JPEG":
        block = b"Exif\0\0" + exif(orientation)
        path.write_bytes(data[:2] + struct.pack(">HH", 0xFFE1, len(block) + 2) + block + data[2:])
    else:
        path.write_bytes(tagged(Image.open(io.BytesIO(data)), kind, orientation))


def pixels(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def expected(workspace: Workspace) -> dict[int, Pixels]:
    """The stored pixels of each image of a workspace whose images have tags."""
    found = {}
    for image_id in range(1, 9):
        path = raw_path(workspace, image_id)
        found[image_id] = pixels(path.read_bytes())
        if image_id in TAGS:
            tag(path, TAGS[image_id], FORMATS.get(image_id, "JPEG"))
    workspace.configure("build", conditions=["spatext"])
    return found


def check(found: Pixels, expected: Pixels, index_map: Pixels | None = None) -> None:
    """An image as a reader sees it must be the stored one, of the index map's size."""
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 3  # decoders differ a little
    assert index_map is None or index_map.shape[:2] == found.shape[:2]


def seen(data: bytes) -> Iterator[Pixels]:
    """An image as readers see it: those that apply the tag, and those that ignore it."""
    array = np.frombuffer(data, np.uint8)
    yield pixels(data)
    yield np.asarray(cv2.imdecode(array, cv2.IMREAD_COLOR_RGB))
    yield np.asarray(cv2.imdecode(array, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION))
    with Image.open(io.BytesIO(data)) as image:
        yield np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("link", ["auto", "hard", "symbolic", "copy"])
def test_folders_hold_copies_that_look_the_same_to_all(
    workspace: Workspace, expected: dict[int, Pixels], link: str
) -> None:
    from spctrl.store.store import Store
    from tasks.maintenance import verify

    workspace.configure("export", link=link)
    raw = {image_id: raw_path(workspace, image_id) for image_id in expected}
    before = {image_id: path.read_bytes() for image_id, path in raw.items()}
    built(workspace)
    folder = workspace.export_folder("ap10k")
    rows = workspace.manifest("ap10k", "train")
    assert {row["image_id"]: row["image_orientation"] for row in rows} == {**TAGS, 8: 1}
    for row in rows:
        image_id = row["image_id"]
        assert row["image_digest"] == sha256(raw[image_id])
        path = folder / row["image_path"]
        index_map = cv2.imread(str(folder / row["spatext_path"]), cv2.IMREAD_UNCHANGED)
        for found in seen(path.read_bytes()):
            check(found, expected[image_id], np.asarray(index_map))
        check(np.asarray(cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)), expected[image_id])
        if image_id in TAGS:
            assert not path.is_symlink()
            assert not path.samefile(raw[image_id])
        else:
            assert path.read_bytes() == before[image_id]
            assert path.is_symlink() == (link == "symbolic")
            assert path.samefile(raw[image_id]) == (link != "copy")
    exported = workspace.exported()
    again = built(workspace)
    assert (again.started, again.committed) == ([], {})
    assert verify(Store(workspace.store), workspace.exports, repair=False) == []
    # A copy that was damaged is written again, as the same bytes.
    (folder / rows[0]["image_path"]).write_bytes(b"?")
    assert len(verify(Store(workspace.store), workspace.exports, repair=True)) == 1
    built(workspace)
    assert workspace.exported() == exported
    assert {image_id: path.read_bytes() for image_id, path in raw.items()} == before


def test_a_link_of_an_earlier_export_becomes_a_copy(workspace: Workspace) -> None:
    workspace.configure("build", conditions=["spatext"])
    built(workspace)
    raw = raw_path(workspace, 1)
    path = workspace.export_folder("ap10k") / workspace.manifest("ap10k", "train")[0]["image_path"]
    assert path.samefile(raw)
    tag(raw, 6)  # written into the file, of which the export's is another name
    data = raw.read_bytes()
    stored = pixels(data)
    built(workspace)
    assert not path.samefile(raw)
    assert raw.read_bytes() == data
    for found in seen(path.read_bytes()):
        check(found, stored)
    os.utime(raw)
    assert built(workspace).counted("export", "made") == 0


def test_datasets_reads_stored_pixels_from_parquet(
    workspace: Workspace, expected: dict[int, Pixels], tmp_path: Path
) -> None:
    import datasets

    workspace.configure("export", format="parquet", shard_images=3)
    built(workspace)
    folder = workspace.export_folder("ap10k") / "parquet"
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(loaded) == 8
    for row in loaded:
        image_id = row["image_id"]
        assert row["image_orientation"] == TAGS.get(image_id, 1)
        check(np.asarray(row["image"].convert("RGB")), expected[image_id], np.asarray(row["spatext"]))
    again = built(workspace)
    assert (again.started, again.committed) == ([], {})
    last = pq.read_table(folder / "train_split1-000002.parquet", partitioning=None).to_pylist()[-1]
    assert last["image"]["bytes"] == raw_path(workspace, 8).read_bytes()


def test_loaders_read_stored_pixels_from_tars(
    workspace: Workspace, expected: dict[int, Pixels], tmp_path: Path
) -> None:
    import tarfile

    import datasets

    workspace.configure("export", format="webdataset")
    built(workspace)
    tar = workspace.export_folder("ap10k") / "webdataset/train_split1-000000.tar"
    images = {}
    with tarfile.open(tar) as opened:
        for member in opened:
            key, _, kind = member.name.partition(".")
            if kind == "jpg":
                content = opened.extractfile(member)
                assert content is not None
                images[int(key)] = content.read()
    assert images.keys() == expected.keys()
    for image_id, data in images.items():
        for found in seen(data):
            check(found, expected[image_id])
    assert images[8] == raw_path(workspace, 8).read_bytes()
    loaded = datasets.load_dataset(
        "webdataset", data_files=[str(tar)], split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(loaded) == len(expected)
    for row in loaded:
        image = np.asarray(row["jpg"].convert("RGB"))
        check(image, expected[int(row["__key__"])], np.asarray(row["spatext.png"]))


def test_training_sees_the_same_in_raw_data_and_in_an_export(
    workspace: Workspace, expected: dict[int, Pixels]
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers import CLIPTokenizer

    from spctrl.models.tiny import write_tokenizer
    from spctrl.training.dataset import SpCtrlDataset

    built(workspace)
    write_tokenizer(workspace.folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(workspace.folder / "tokenizer")
    folder = workspace.export_folder("ap10k")
    raw, exported = (
        SpCtrlDataset(folder / MANIFEST, data_root=root, tokenizer=tokenizer, resolution=64)
        for root in (workspace.data / "AP-10K", folder)
    )
    assert len(raw) == len(expected)
    for i in range(len(raw)):
        assert torch.equal(raw[i]["pixel_values"], exported[i]["pixel_values"])


def test_the_report_counts_images_with_a_tag(workspace: Workspace) -> None:
    workspace.configure("build", conditions=["spatext"], splits=["train", "val"])
    for image_id in (1, 2, 3):
        tag(raw_path(workspace, image_id), 6)
    built(workspace)
    page = (workspace.exports / "report.html").read_text()
    note = (
        "AP-10K train: 3 images have an EXIF orientation tag; spctrl uses the stored pixels, as annotated, and "
        "exported copies have the tag set to 1"
    )
    assert note in page
    assert page.count("EXIF orientation tag") == 1


def test_images_without_a_tag_are_not_in_the_report(workspace: Workspace) -> None:
    workspace.configure("build", conditions=["spatext"], images="optional")
    raw_path(workspace, 2).unlink()
    built(workspace)
    orientations = {row["image_id"]: row["image_orientation"] for row in workspace.manifest("ap10k", "train")}
    assert orientations == {**dict.fromkeys(range(1, 9), 1), 2: None}
    assert "EXIF" not in (workspace.exports / "report.html").read_text()


def rejects(workspace: Workspace) -> dict[int, tuple[str, str]]:
    """Code and message of rejected images, by id."""
    (path,) = workspace.store.glob("runs/images/ap10k-train/*/rejects.parquet")
    rows: list[dict[str, Any]] = pq.read_table(path, partitioning=None).to_pylist()
    return {row["image_id"]: (row["code"], row["message"]) for row in rows}


def test_records_that_cannot_be_right_are_rejected_with_a_reason(workspace: Workspace) -> None:
    workspace.configure("build", conditions=["spatext"], max_reject_share=1)
    turned, deep, real = (raw_path(workspace, image_id) for image_id in (1, 2, 3))
    with Image.open(turned) as image:
        turned.write_bytes(saved(image.transpose(Image.Transpose.ROTATE_90), "JPEG"))
        width, height = image.size
    tag(turned, 6)
    for path, kind in ((deep, np.uint16), (real, np.float32)):
        with Image.open(path) as image:
            grey = Image.fromarray(np.asarray(image.convert("L")).astype(kind) * 257)
        path.write_bytes(saved(grey, "PNG" if kind is np.uint16 else "TIFF"))
    built(workspace)
    advice = "Convert the image to 8 bits"
    assert rejects(workspace) == {
        1: (
            "image_size",
            f"expected the annotated {width} x {height} pixels, found {height} x {width}, which the file's EXIF "
            "orientation tag (6) turns to the annotated size. Rotate the pixels and remove the tag, for example with "
            "`mogrify -auto-orient`",
        ),
        2: ("bad_image", f"expected 8 bits a channel, found pixels of the kind I;16. {advice}"),
        3: ("bad_image", f"expected 8 bits a channel, found pixels of the kind F. {advice}"),
    }
    assert [row["image_id"] for row in workspace.manifest("ap10k", "train")] == [4, 5, 6, 7, 8]
