"""Files that mean harm: what they claim is refused before it costs memory, and no name leads out of its place."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import sqlite3
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memory import MIB, memory_of
from PIL import Image

from eval.images import ImageError, read_rgb, size_of
from spctrl.conditions.masks import check_depth, check_mask
from spctrl.data.annotations.decode import MAX_REJECT_CHARACTERS, AnnotationFileError, unsafe_path
from spctrl.data.datasets import AP10K
from spctrl.data.images import MAX_SCANS, open_rgb, probe_image
from spctrl.data.index import write_index
from spctrl.data.records import Record, RecordError
from spctrl.errors import ExpectedError
from spctrl.io.parquet import parquet_bytes
from spctrl.storage import StoreError, files_at
from spctrl.store.digests import DigestCache
from spctrl.store.store import Store
from tasks.dataset.export_state import Ledger

BYTES_PER_PIXEL = 32
"""Most memory that decoding may take; WebP, the hungriest, was measured at 22."""
SIDE_WH = (1500, 1000)


def record(size_wh: tuple[int, int] = SIDE_WH) -> Record:
    return Record(1, "1.jpg", size_wh, np.empty((0, 17, 3)), np.empty((0, 4)))


# Images


def saved(kind: str, mode: str, **options: Any) -> bytes:
    pixels = np.zeros((*SIDE_WH[::-1], 4), np.uint8)
    pixels[::7, ::5] = 200
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


IMAGES = {
    "progressive JPEG": ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
    "CMYK": ("JPEG", "CMYK", {"progressive": True}),
    "PNG": ("PNG", "RGBA", {}),
    "animated WebP": ("WEBP", "RGBA", {"lossless": True, "method": 0, "save_all": True}),
    "GIF": ("GIF", "P", {}),
    "BMP": ("BMP", "RGBA", {}),
    "TIFF": ("TIFF", "F", {}),
    "TIFF, packed": ("TIFF", "CMYK", {"compression": "tiff_lzw"}),
}


@pytest.mark.parametrize(("kind", "mode", "options"), IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("read", [probe_image, open_rgb, check_depth])
def test_decoding_takes_a_stated_amount_of_memory(
    kind: str, mode: str, options: dict[str, Any], read: Callable[[Record, bytes], object]
) -> None:
    data = saved(kind, mode, **options)

    def work() -> None:
        with suppress(RecordError):  # no depth map has fractions
            read(record(), data)

    assert memory_of(work) < BYTES_PER_PIXEL * SIDE_WH[0] * SIDE_WH[1] + 8 * MIB


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded() -> None:
    data = saved("JPEG", "L", progressive=True)
    start = data.index(b"\xff\xda")
    scan = data[start : data.index(b"\xff", start + 20)]
    bomb = data[:-2] + scan * MAX_SCANS + data[-2:]
    for read in (probe_image, open_rgb, check_mask):
        with pytest.raises(RecordError, match=f"at most {MAX_SCANS} scans in a JPEG, found") as caught:
            read(record(), bomb)
        assert caught.value.code == "bad_image"


def test_a_file_of_any_size_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spctrl.data.images.MAX_IMAGE_FILE_BYTES", 1000)
    with pytest.raises(RecordError, match="expected at most 1,000 bytes, found 1,001"):
        probe_image(record(), bytes(1001))


def test_a_sparse_image_to_measure_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.jpg"
    with path.open("wb") as file:
        file.truncate(2**40)
    for read in (read_rgb, size_of):
        with pytest.raises(
            ImageError, match=r"big\.jpg: expected at most 1,073,741,824 bytes, found 1,099,511"
        ):
            read(path)


def test_the_size_that_is_checked_is_the_size_that_is_decoded() -> None:
    """Two headers in one PNG: what reads the last one must not decode by the first."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    small, large = (
        chunk(b"IHDR", struct.pack(">IIBBBBB", *size_wh, 8, 0, 0, 0, 0))
        for size_wh in ((64, 48), (9000, 9000))
    )
    pixels = chunk(b"IDAT", zlib.compress(bytes(9001 * 9000), 9)) + chunk(b"IEND", b"")

    def work() -> None:
        for headers in (small + large, large + small):
            for read in (probe_image, open_rgb, check_mask, check_depth):
                with suppress(RecordError):
                    read(record((64, 48)), b"\x89PNG\r\n\x1a\n" + headers + pixels)

    assert memory_of(work) < 16 * MIB


def test_the_report_opens_no_image_that_another_library_sees_otherwise() -> None:
    """Found by fuzzing: PIL sees 16 x 12 pixels in these 86 bytes, OpenCV takes 1.2 GB for them."""
    from spctrl.report.pictures import decode

    data = (Path(__file__).parent / "fuzz/regressions/images/png-of-86-bytes-and-a-gigabyte").read_bytes()
    assert memory_of(lambda: decode(data)) < 16 * MIB


# Annotation files


def annotation(number: int, keypoints: str = "5,6,2," * 16 + "5,6,2") -> str:
    return f'{{"id":{number},"image_id":1,"category_id":1,"bbox":[1,2,3,4],"keypoints":[{keypoints}]}}'


def document(
    annotations: str = annotation(1), image: str = '"file_name":"1.jpg","width":64,"height":48'
) -> str:
    return f'{{"images":[{{"id":1,{image}}}],"annotations":[{annotations}],"categories":[{{"id":1,"name":"fox"}}]}}'


LARGE = {
    "many annotations on one image": lambda: document(",".join(map(annotation, range(20_000)))),
    "a list of a million numbers": lambda: document(f"{annotation(1)},{annotation(2, '1,' * 10**6 + '1')}"),
    "a text of 10 MB": lambda: document(image=f'"file_name":"{"x" * 10**7}","width":64,"height":48'),
    "a number of a million digits": lambda: document(annotation(1, "9" * 10**6)),
    "a million brackets": lambda: document(f"{annotation(1)},{'[' * 10**6}"),
    "entries of one byte": lambda: document(f"{annotation(1)}{',1' * 200_000}"),
    "empty entries": lambda: document(f"{annotation(1)}{',{}' * 200_000}"),
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_an_annotation_file_takes_a_stated_amount_of_memory(make: Callable[[], str], tmp_path: Path) -> None:
    source = tmp_path / "annotations.json"
    source.write_text(make())
    faults_bytes = 1000 * 200_000  # a kilobyte for each fault that is listed

    def work() -> None:
        with suppress(AnnotationFileError):
            write_index(source, AP10K, "train", tmp_path / "index.parquet", max_pixels=10**8)

    assert memory_of(work) < 40 * source.stat().st_size + faults_bytes


def test_faults_without_number_are_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spctrl.data.annotations.decode.MAX_REJECTS", 10)
    source = tmp_path / "annotations.json"
    source.write_text(document(f"{annotation(1)}{',1' * 10}"))
    assert write_index(source, AP10K, "train", tmp_path / "i", max_pixels=10**8).rejects.num_rows == 10
    source.write_text(document(f"{annotation(1)}{',1' * 11}"))
    with pytest.raises(
        AnnotationFileError, match=r"at most 10 faults, found more .unassigned_annotation: 10"
    ):
        write_index(source, AP10K, "train", tmp_path / "i", max_pixels=10**8)


def test_reasons_are_short_whatever_the_file_holds(tmp_path: Path) -> None:
    source = tmp_path / "annotations.json"
    good = '"file_name":"1.jpg","width":64,"height":48}'
    source.write_text(
        document(image=good + ',{"id":2,"file_name":"' + "x" * 10**6 + '","width":1,"height":1')
    )
    index = write_index(source, AP10K, "train", tmp_path / "index.parquet", max_pixels=10**8)
    (row,) = index.rejects.to_pylist()
    assert row["code"] == "unsafe_path"
    assert max(len(row["message"]), len(row["file_name"])) <= MAX_REJECT_CHARACTERS + 1


@pytest.mark.parametrize("name", ["a.png/2.jpg", "a/b.json/2.jpg", "x.npy/2", "1.jpg/2.jpg"])
def test_a_folder_may_not_take_the_name_of_an_exported_file(name: str) -> None:
    assert unsafe_path(name) == "has a folder that is named like a file"
    assert unsafe_path("v1.0/a.b/2.png") is None


# Weights


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def readers() -> dict[str, Callable[[Path], object]]:
    pytest.importorskip("torch", reason="the models extra is not installed")
    from eval.vitpose.checkpoints import load_vitpose
    from spctrl.models.embedding import load_keypoint_init
    from spctrl.models.tokens import load_learned_embeds
    from spctrl.training.checkpoints import STATE, read_state
    from spctrl.weights import read_torch_file

    def state_of(path: Path) -> object:
        path.rename(path.with_name(STATE))
        return read_state(path.parent)

    return {
        "any": read_torch_file,
        "tokens": load_learned_embeds,
        "embedding": load_keypoint_init,
        "training": state_of,
        "ViTPose": load_vitpose,
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["any", "tokens", "embedding", "training", "ViTPose"])
@pytest.mark.parametrize("form", ["archive", "legacy", "pickle"])
def test_pickles_with_code_are_refused_and_not_run(name: str, form: str, tmp_path: Path) -> None:
    read = readers()[name]
    import torch

    path, content = tmp_path / "weights.pth", {"weight": Harmful(tmp_path / "made")}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "archive")
    with pytest.raises(ExpectedError, match=r"code, which is not run"):
        read(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_in_a_model_folder_is_refused_and_not_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the models extra is not installed")
    from spctrl.models.stable_diffusion import load_text_encoder, load_unet
    from spctrl.models.tiny import build_stable_diffusion

    build_stable_diffusion(tmp_path / "sd")
    for part, load, name in (
        ("text_encoder", load_text_encoder, "pytorch_model.bin"),
        ("unet", load_unet, "diffusion_pytorch_model.bin"),
    ):
        folder = tmp_path / "sd" / part
        for path in folder.glob("*.safetensors"):
            path.unlink()
        torch.save({"weight": Harmful(tmp_path / "made")}, folder / name)
        with pytest.raises(ExpectedError, match="cannot be read"):
            load(tmp_path / "sd")
        assert not (tmp_path / "made").exists()


def test_a_tensor_far_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the models extra is not installed")
    from spctrl.weights import read_torch_file

    torch.save({"a": [torch.zeros(1).expand(10**9)]}, tmp_path / "bomb.pth")
    with pytest.raises(ExpectedError, match="found 4,000,000,000"):
        read_torch_file(tmp_path / "bomb.pth")


# Poses, and folders of images by someone else's code


@pytest.mark.parametrize(
    "change",
    [
        {"width": 10**9},
        {"height": 0},
        {"width": -5},
        {"anns": [{"keypoints": [2**31, 5, 2] * 17}]},
        {"anns": [{"keypoints": [5, 1e300, 1] * 17}]},
        {"anns": [{"keypoints": [5, 5, 3] * 17}]},
        {"anns": [{"keypoints": [5, 5]}]},
        None,
    ],
    ids=str,
)
def test_a_pose_that_cannot_be_drawn_is_refused(change: dict[str, Any] | None, tmp_path: Path) -> None:
    from spctrl.inference.poses import read_pose

    good = {"width": 64, "height": 48, "anns": [{"keypoints": [1e300, 5, 0] + [5, 5, 2] * 16}]}
    path = tmp_path / "pose.json"
    path.write_text(json.dumps(good))
    assert read_pose(path, AP10K).size_wh == (64, 48)
    path.write_text("[" * 10**5 if change is None else json.dumps(good | change))
    with pytest.raises(ExpectedError, match=re.escape(str(path))):
        read_pose(path, AP10K)


def test_only_files_of_a_folder_are_images(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the models extra is not installed")
    from eval.images import image_files
    from spctrl.inference.folders import list_images

    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    os.mkfifo(tmp_path / "2.png")
    (tmp_path / "3.png").mkdir()
    (tmp_path / "4.png").symlink_to("/dev/zero")
    (tmp_path / "5.png").symlink_to("nowhere")
    assert image_files(tmp_path) == [tmp_path / "1.png"]
    assert list_images(tmp_path) == ["1.png"]


# Stores, exports and manifests from elsewhere


@pytest.mark.parametrize("name", ["../bait", "a/../../bait", "/etc/bait", "a\0b"])
def test_a_name_that_leads_out_is_refused_by_every_way_to_use_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "bait").write_text("bait")
    files = files_at(tmp_path / "store")
    uses: list[Callable[[], object]] = [
        lambda: files.read(name),
        lambda: files.write(name, b""),
        lambda: files.remove([name]),
        lambda: files.sizes([name]),
        lambda: files.digest(name),
        lambda: files.fetch(name, tmp_path),
    ]
    for use in uses:
        with pytest.raises(StoreError, match="expected a name below"):
            use()
    assert (tmp_path / "bait").read_text() == "bait"


def test_a_copy_of_an_object_stays_in_the_cache(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    (tmp_path / "bait").write_text("bait")
    elsewhere = files_at("memory://hostile")
    with pytest.raises(StoreError, match="expected a name below"):
        elsewhere.fetch("../bait", tmp_path / "cache")
    assert (tmp_path / "bait").read_text() == "bait"
    assert not (tmp_path / "cache").exists()


def test_a_ledger_lists_only_files_of_its_export(tmp_path: Path) -> None:
    place = files_at(tmp_path / "export", temporaries=".spctrl")
    good = "data/1.jpg"
    paths = ["../bait", "/etc/passwd", "", ".", "data/", ".spctrl/lock", "a\0b", "a/../../bait", good]
    rows = {"path": paths, "made_from": ["x"] * len(paths), "digest": ["0"] * len(paths)}
    place.write(".spctrl/train.parquet", parquet_bytes(pa.table(rows)))
    assert list(Ledger.read(place, ".spctrl/train.json").files) == [good]


@pytest.mark.parametrize("data", [b"", b"PAR1", b"x" * 1000, "other columns", "other types", "nulls"])
def test_a_damaged_ledger_counts_as_none(data: bytes | str, tmp_path: Path) -> None:
    tables = {
        "other columns": {"paths": ["a"]},
        "other types": {"path": [[1]], "made_from": [1.5], "digest": [None]},
        "nulls": {"path": [None], "made_from": [None], "digest": [None]},
    }
    place = files_at(tmp_path)
    place.write("train.parquet", data if isinstance(data, bytes) else parquet_bytes(pa.table(tables[data])))
    place.write("train.json", b'{"fingerprint": "f"}')
    assert Ledger.read(place, "train.json").files == {}


SHA = hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize("text", ["", "[]", "7", '{"a": 1}', '{"a": ["b"]}', "[" * 100_000, "\x00"])
def test_damaged_code_versions_are_an_error_that_names_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "accepted.json").write_text(text)
    with pytest.raises(StoreError, match=r"accepted\.json: expected a JSON object"):
        Store(tmp_path).accepted()


@pytest.mark.parametrize("damage", ["text", "fact", "table"])
def test_a_damaged_cache_of_digests_is_done_without(damage: str, tmp_path: Path) -> None:
    path, data = tmp_path / "cache.sqlite", tmp_path / "data"
    data.write_text("x")
    os.utime(data, (0, 0))
    expected = DigestCache(path).list_digest(str(tmp_path), ["data"])
    if damage == "text":
        path.write_bytes(b"no database" * 1000)
    else:
        with sqlite3.connect(path) as database:
            database.execute(
                "UPDATE facts SET value = '{'"
                if damage == "fact"
                else "UPDATE files SET size = 'x', digest = NULL"
            )
    cache = DigestCache(path)
    assert cache.list_digest(str(tmp_path), ["data"]) == expected
    assert cache.file_digest(data) == hashlib.sha256(b"x").hexdigest()


INDICES: dict[str, dict[str, list[Any]]] = {
    "negative offset": {"offset": [-1]},
    "negative size": {"size": [-5]},
    "no offset": {"offset": [None]},
    "texts": {"offset": ["x"]},
    "lists": {"key": [["x"]]},
    "no keys": {"key": [None]},
}


@pytest.mark.parametrize("change", INDICES.values(), ids=INDICES)
def test_a_pack_s_index_with_impossible_places_counts_as_none(
    change: dict[str, list[Any]], tmp_path: Path
) -> None:
    row = {"key": ["k"], "offset": [512], "size": [3], "digest": [SHA], "code": [None], "message": [None]}
    store = Store(tmp_path)
    store.files.write("packs/mask/x.tar", bytes(10_240))
    store.files.write("packs/mask/x.parquet", parquet_bytes(pa.table(row)))
    assert list(store.pack_locations("mask", "x.tar")) == ["k"]
    store.files.write("packs/mask/x.parquet", parquet_bytes(pa.table(row | change)))
    assert store.pack_locations("mask", "x.tar") == {}


def test_latents_are_not_read_from_impossible_places(tmp_path: Path) -> None:
    from spctrl.store.artifacts import StoredArtifacts

    folder = tmp_path / "packs/latents"
    folder.mkdir(parents=True)
    (folder / "x.safetensors").write_bytes(bytes(100))
    for offset, size in ((-5, 10), (0, 2**60), (2**63 - 1, 5), (96, 5), (0, -1)):
        place = {"offset": [offset], "size": [size], "digest": [SHA]}
        table = pa.table({"key": ["k"], **place, "code": [None], "message": [None]})
        pq.write_table(table, folder / "x.parquet")
        with pytest.raises(ExpectedError, match="found none of 1"):
            StoredArtifacts(tmp_path, "latents", pa.array(["k"]))
    row = {"key": ["k"], "offset": [96], "size": [4], "digest": [SHA], "code": [None], "message": [None]}
    pq.write_table(pa.table(row), folder / "x.parquet")
    found = StoredArtifacts(tmp_path, "latents", pa.array(["k"]))
    with pytest.raises(StoreError, match="expected 4 bytes at 96 with another digest"):
        found.read(0)


@pytest.mark.parametrize("key", ["k\u00e9", "\N{SNOWMAN}", "", "x" * 99])
def test_a_key_that_no_store_has_is_missing(tmp_path: Path, key: str) -> None:
    from spctrl.store.artifacts import StoredArtifacts

    Store(tmp_path).write_pack("mask", ".png", [("k", b"a mask")])
    with pytest.raises(ExpectedError, match="found none of 1"):
        StoredArtifacts(tmp_path, "mask", pa.array(["k", key]))


@pytest.mark.parametrize("name", ["cache.sqlite", "cache.sqlite-journal", "cache.sqlite-wal"])
def test_no_cache_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim.db"
    with sqlite3.connect(victim) as database:
        database.execute("CREATE TABLE own (x INT)")
    before = victim.read_bytes()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / name).symlink_to(victim)
    with pytest.raises(StoreError, match=f"expected a database at .*/{name}, found a symbolic link"):
        DigestCache(tmp_path / "store/cache.sqlite")
    assert victim.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        "DROP TABLE files; CREATE VIEW files AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
        "SELECT 'p' || x AS path, 1 size, 1 mtime_ns, 1 inode, 'd' digest FROM c",
        "DROP TABLE facts; CREATE VIEW facts AS SELECT 'k' AS key, hex(zeroblob(400000000)) AS value",
        "CREATE TRIGGER t AFTER INSERT ON files BEGIN DELETE FROM facts; END",
        "ALTER TABLE files ADD COLUMN more INT",
    ],
    ids=["endless view", "large view", "trigger", "column"],
)
def test_a_cache_that_is_another_database_is_refused(tmp_path: Path, change: str) -> None:
    DigestCache(tmp_path / "cache.sqlite")
    with sqlite3.connect(tmp_path / "cache.sqlite") as database:
        database.executescript(change)
    with pytest.raises(StoreError, match=r"expected the digests of files in .*, found another database"):
        DigestCache(tmp_path / "cache.sqlite")


@pytest.mark.parametrize("value", ["5", "[1, 2]", "[" * 200_000, b"5", None, '"' + "x" * 2**24 + '"'])
def test_facts_of_other_types_are_none(tmp_path: Path, value: object) -> None:
    from spctrl.store.digests import digest_cache
    from tasks.stage.fingerprints import code_of

    store = Store(tmp_path)
    function = ("spctrl.data.records:rejects_table",)
    expected = code_of(function, store)
    with sqlite3.connect(tmp_path / "cache.sqlite") as database:
        database.execute("UPDATE facts SET value = ?", (value,))
    assert code_of(function, store) == expected
    assert digest_cache(store).fact("no such key") is None


@pytest.mark.parametrize("digest", [None, b"\xff\0", 5, "", "x" * 65])
def test_digests_of_other_types_are_found_again(tmp_path: Path, digest: object) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    os.utime(path, (1, 1))
    cache = DigestCache(tmp_path / "cache.sqlite")
    expected = cache.file_digest(path)
    with sqlite3.connect(tmp_path / "cache.sqlite") as database:
        assert database.execute("UPDATE files SET digest = ?", (digest,)).rowcount == 1
    assert cache.file_digest(path) == expected == hashlib.sha256(b"content").hexdigest()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_neither_read_nor_locked(tmp_path: Path, kind: str) -> None:
    files = files_at(tmp_path)
    if kind == "pipe":
        os.mkfifo(tmp_path / "x")
    elif kind == "device":
        (tmp_path / "x").symlink_to("/dev/zero")
    else:
        (tmp_path / "x").mkdir()
    for read in (files.read, files.digest, lambda name: files.read(name, max_bytes=10)):
        with pytest.raises((StoreError, OSError)):
            read("x")
    with pytest.raises(StoreError), files.exclusive("x", "reading", pytest.fail):
        pytest.fail("locked")
