"""What is fuzzed: readers of files that come from elsewhere, each with seeds and with what must hold for any bytes.

A target's ``run`` returns where the reader took the input or refused it as it should, and raises everything else.
"""

from __future__ import annotations

import functools
import io
import json
import math
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import Workspace
from PIL import Image
from stores import FACTS, locations, table_of
from tampering import Rows, correct_provenance, run_folder, tamper

from spctrl.conditions.masks import check_depth, check_mask
from spctrl.conditions.openpose import render_openpose
from spctrl.conditions.spatext import render_spatext
from spctrl.configuration import ConfigurationError, read_config
from spctrl.data.annotations.decode import FAR_AWAY_IN_SIZES, AnnotationFileError, unsafe_path
from spctrl.data.datasets import AP10K, DATASETS, HUMANART, Dataset
from spctrl.data.images import FORMATS, open_rgb, opened_image, probe_image
from spctrl.data.index import INDEX_SCHEMA, write_index
from spctrl.data.orientation import orientation_of, without_orientation
from spctrl.data.records import Record, RecordError, records_from_table
from spctrl.demo_data import write_sample
from spctrl.errors import ExpectedError
from spctrl.export.layout import Layout
from spctrl.export.text_files import categories_json, heatmaps_npy, record_lines
from spctrl.inference.methods import Generation
from spctrl.inference.poses import index_map_of, read_pose
from spctrl.io.parquet import parquet_bytes
from spctrl.prompts import Templates, load_templates, subjects_from_table
from spctrl.report.pictures import decode
from spctrl.resources import packaged
from spctrl.storage import files_at
from spctrl.store.digests import content_digest
from spctrl.store.format import FORMAT
from spctrl.store.packs import write_container
from spctrl.store.store import Store
from tasks.dataset.export_state import Ledger, damaged_files
from tasks.maintenance import collect, verify

from .mutators import mutate_bytes, mutate_image, mutate_json, mutate_pickle, mutate_yaml

REPOSITORY = Path(__file__).parents[2]
MAX_PIXELS = 20_000
"""Small, so that what is accepted is drawn and decoded fast, and what takes more memory than it may stands out."""
SIZES_PX: dict[str, Any] = {"keypoint_radius_px": 4, "link_half_width_px": 4}
CODES = {
    "bad_annotation_entry", "bad_bbox", "bad_coordinate", "bad_image_entry", "bad_size", "bad_visibility",
    "duplicate_annotation_id", "duplicate_image_file_name", "duplicate_image_id", "far_away_keypoint", "keypoint_count",
    "unassigned_annotation", "unknown_background", "unknown_category", "unknown_image", "unsafe_path",
}  # fmt: skip


class Target(NamedTuple):
    """Something to fuzz.

    Attributes:
        seeds: small real inputs.
        run: must return, whatever the bytes.
        mutate: changes an input and keeps its form; see ``tests.fuzz.mutators``.
    """

    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes], None]
    mutate: Callable[[bytes, Random], bytes]


@functools.cache
def folder() -> Path:
    """An empty folder of this process."""
    kept = tempfile.TemporaryDirectory(prefix="spctrl-fuzz-")
    _KEPT.append(kept)
    return Path(kept.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def sample() -> Path:
    root = folder() / "sample"
    write_sample(root, images_per_split=2)
    return root


def same(found: object, expected: object) -> None:
    if found != expected:
        raise AssertionError(f"expected {expected!r}, found {found!r}")


# Annotation files


def annotation_seeds(dataset: Dataset) -> list[bytes]:
    """The drawn sample's files, with the images' sizes made small."""
    seeds = []
    for path in sorted((sample() / dataset.title / "annotations").glob("*.json")):
        content = json.loads(path.read_bytes())
        for image in content["images"]:
            factor = max(image["width"], image["height"]) / 100
            owned = [each for each in content["annotations"] if each["image_id"] == image["id"]]
            image |= {"width": int(image["width"] / factor), "height": int(image["height"] / factor)}
            for each in owned:
                for name in ("keypoints", "keypoints_21"):
                    if name in each:
                        each[name] = [
                            number if place % 3 == 2 else round(number / factor)
                            for place, number in enumerate(each[name])
                        ]
        content["categories"] = content["categories"][:2]
        used = {each["category_id"] for each in content["annotations"]}
        used -= {each["id"] for each in content["categories"]}
        content["categories"] += [{"id": each, "name": f"kind {each}"} for each in sorted(used)]
        seeds.append(json.dumps(content).encode())
    return seeds


def run_annotations(data: bytes, dataset: Dataset) -> None:
    """The index of any file holds only records that keep every rule, and that all later stages can use."""
    source, index_path = folder() / "annotations.json", folder() / "index.parquet"
    source.write_bytes(data)
    try:
        index = write_index(source, dataset, "train", index_path, max_pixels=MAX_PIXELS)
    except AnnotationFileError as error:
        same(str(source) in str(error), True)
        return
    table = pq.read_table(index_path, partitioning=None)
    same(table.schema.equals(INDEX_SCHEMA), True)
    rows = table.to_pylist()
    for row in rows:
        check_row(row, dataset)
    ids = [row["image_id"] for row in rows]
    same(len(set(ids)), len(ids))
    same(index.image_paths, [dataset.image_path(row["file_name"]) for row in rows])
    rejects = index.rejects.to_pylist()
    same(set(ids) & {row["image_id"] for row in rejects}, set())
    same({row["code"] for row in rejects} <= CODES and all(row["message"] for row in rejects), True)
    unannotated = index.adjustments.get("unannotated_images", 0)
    same(len(rows) + len(rejects) + unannotated >= index.images_in_file, True)
    same(all(row["instances"] for row in rows), True)
    use_records(table, dataset, source)
    if zlib.crc32(data) % 4 == 0:  # it takes as long as all before it
        compare_with_faulty_entry(data, dataset)


def compare_with_faulty_entry(data: bytes, dataset: Dataset) -> None:
    """A faulty annotation more changes no record: such files are read by other code, entry by entry."""
    try:
        content = json.loads(data)
        texts = [json.dumps(content)]
        content["annotations"].append(7)
        texts.append(json.dumps(content))
    except (ValueError, RecursionError):
        return  # Python's reader is stricter about some, such as numbers of many digits
    source, index_path = folder() / "faulty.json", folder() / "faulty.parquet"
    tables: list[pa.Table] = []
    codes: list[list[str]] = []
    for text in texts:
        source.write_text(text)
        try:
            index = write_index(source, dataset, "train", index_path, max_pixels=MAX_PIXELS)
        except AnnotationFileError:  # what Python's writer made of the file, such as halves of characters
            same(tables, [])
            return
        tables.append(pq.read_table(index_path, partitioning=None))
        codes.append(index.rejects.column("code").to_pylist())
    same(tables[0].equals(tables[1]), True)
    same(sorted(codes[1]), sorted([*codes[0], "unassigned_annotation"]))


def check_row(row: dict[str, Any], dataset: Dataset) -> None:
    """Each rule once more, in the plainest words."""
    width, height = row["width"], row["height"]
    same(width > 0 and height > 0 and width * height <= MAX_PIXELS, True)
    path = dataset.image_path(row["file_name"])
    same(unsafe_path(path), None)
    root = folder() / "root"
    same((root / path).resolve().is_relative_to(root.resolve()), True)
    same(all(ord(letter) >= 32 for letter in path) and "\\" not in path, True)
    same(all(len(part.encode()) <= 255 - len(".parquet") for part in path.split("/")), True)
    for each in row["instances"]:
        same(len(each["keypoints"]), dataset.skeleton.num_keypoints)
        for x, y, v in each["keypoints"]:
            same(v in (0, 1, 2) and math.isfinite(x) and math.isfinite(y), True)
            if v:
                near = -FAR_AWAY_IN_SIZES * width <= x <= (1 + FAR_AWAY_IN_SIZES) * width
                same(near and -FAR_AWAY_IN_SIZES * height <= y <= (1 + FAR_AWAY_IN_SIZES) * height, True)
        same(len(each["bbox_xywh"]) == 4 and all(map(math.isfinite, each["bbox_xywh"])), True)
        same(min(each["bbox_xywh"][2:]) >= 0 and math.isfinite(each["area"]), True)
        if each["keypoints_21"] is not None:
            same(len(each["keypoints_21"]), 21)
            same(all(math.isfinite(number) for point in each["keypoints_21"] for number in point), True)


def use_records(table: Any, dataset: Dataset, source: Path) -> None:
    """What later stages do with an index."""
    subjects_from_table(table)
    skeleton = dataset.skeleton
    for record in records_from_table(table):
        index_map = render_spatext(record, links=skeleton.links, **SIZES_PX)
        render = render_openpose(
            record, style="openpose", keypoint_names=skeleton.keypoint_names, links=skeleton.links, **SIZES_PX
        )
        for png in (index_map, render):
            with Image.open(io.BytesIO(png)) as image:
                same(image.size, record.size_wh)
        heatmaps_npy(record)
    layout = Layout(dataset=dataset, split="train", split_id="1", names="readme", openpose_style="openpose")
    ids = table.column("image_id").to_pylist()
    lines = [line for _, line in record_lines(source, layout, set(ids)) if b"\n" not in line]
    same([msgspec.json.decode(line, type=_Line).image_id for line in lines], ids)
    json.loads(categories_json(source, dataset))


class _Line(msgspec.Struct):
    image_id: int


# The record validator


def record_seeds() -> list[bytes]:
    rows = []
    for size_wh in ((64, 48), (1, 1)):
        numbers = [5.0, 6.0, 2.0] * 17 + [1.0, 2.0, 30.0, 40.0, 1200.0]
        rows.append(np.array([*size_wh, *numbers], np.float64).tobytes())
    return rows


def run_records(data: bytes) -> None:
    """Any numbers for the size, the keypoints, the box and the area: accepted exactly where the rules say so."""
    numbers = np.zeros(2 + 51 + 5)
    given = np.frombuffer(data[: len(data) // 8 * 8], "<f8")[: len(numbers)]
    numbers[: len(given)] = given
    if not np.isfinite(numbers).all() or abs(numbers[:2]).max() >= 2**62:
        return  # JSON has no such numbers; other tests write them all the same
    width, height = (int(number) for number in numbers[:2])
    keypoints, box, area = numbers[2:53].reshape(17, 3), numbers[53:57], numbers[57]
    good = {"id": 2, "file_name": "2.jpg", "width": 10, "height": 10}
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": width, "height": height}, good],
        "annotations": [
            {
                "id": 1, "image_id": 1, "category_id": 1, "area": float(area),
                "bbox": box.tolist(), "keypoints": keypoints.reshape(-1).tolist(),
            },
            {
                "id": 2, "image_id": 2, "category_id": 1, "area": 4.0,
                "bbox": [1, 2, 3, 4], "keypoints": [5, 6, 2] * 17,
            },
        ],
        "categories": [{"id": 1, "name": "fox"}],
    }  # fmt: skip
    source, index_path = folder() / "annotations.json", folder() / "index.parquet"
    source.write_text(json.dumps(content))
    index = write_index(source, AP10K, "train", index_path, max_pixels=MAX_PIXELS)
    near = all(
        v == 0 or (-width <= x <= 2 * width and -height <= y <= 2 * height) for x, y, v in keypoints.tolist()
    )
    usable = (
        width > 0
        and height > 0
        and width * height <= MAX_PIXELS
        and set(keypoints[:, 2].tolist()) <= {0.0, 1.0, 2.0}
        and near
        and box[2] >= 0
        and box[3] >= 0
    )
    table = pq.read_table(index_path, partitioning=None)
    same(1 in table.column("image_id").to_pylist(), usable)
    same(index.rejects.num_rows > 0, not usable)
    use_records(table, AP10K, source)


def mutate_numbers(data: bytes, chance: Random) -> bytes:
    numbers = np.frombuffer(data[: len(data) // 8 * 8], "<f8").copy()
    for _ in range(chance.randint(1, 3)):
        if len(numbers):
            edges = (
                0,
                1,
                2,
                3,
                -1,
                0.5,
                63,
                64,
                128,
                129,
                -64,
                -65,
                96,
                97,
                1e9,
                2.0**31,
                2.0**53,
                1e300,
                -1e300,
                5e-324,
            )
            numbers[chance.randrange(len(numbers))] = chance.choice(edges)
    return numbers.tobytes()


# Image files


def image_seeds() -> list[bytes]:
    """Small images of every format and of many modes."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 4), np.uint8)
    image = Image.fromarray(pixels, "RGBA").resize((64, 48))
    gray, mask = image.convert("L"), image.convert("L").point(lambda level: 255 * (level > 127))
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (image.convert("RGB"), "JPEG", {}),
        (image.convert("RGB"), "JPEG", {"progressive": True}),
        (image.convert("CMYK"), "JPEG", {}),
        (gray, "JPEG", {"exif": _exif(6)}),
        (gray, "PNG", {}),
        (mask, "PNG", {}),
        (mask.convert("1"), "PNG", {}),
        (image, "PNG", {"exif": _exif(6)}),
        (image.convert("P"), "PNG", {"transparency": 3}),
        (gray, "PNG", {"save_all": True, "append_images": [mask]}),
        (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG", {}),
        (image, "WEBP", {}),
        (image, "WEBP", {"lossless": True}),
        (image, "WEBP", {"lossless": True, "exif": _exif(6)}),
        (image, "WEBP", {"save_all": True, "append_images": [image.rotate(90)]}),
        (mask, "BMP", {}),
        (image.convert("RGB"), "BMP", {}),
        (image.convert("P"), "GIF", {"save_all": True, "append_images": [mask]}),
        (image, "TIFF", {}),
        (gray, "TIFF", {"exif": _exif(6)}),
        (mask.convert("1"), "TIFF", {"compression": "group4"}),
        (image.convert("RGB"), "TIFF", {"compression": "jpeg"}),
        (image.convert("RGB"), "TIFF", {"compression": "tiff_lzw"}),
        (gray, "TIFF", {"compression": "tiff_deflate"}),
        (gray.convert("F"), "TIFF", {}),
        (gray.convert("I"), "TIFF", {}),
    ]
    return [_saved(*each) for each in kinds]


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _saved(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def run_images(data: bytes) -> None:
    """Any file as an image: its facts, its pixels and its use as mask or depth map have the annotated size, or it is
    rejected.
    """
    from spctrl.export.shards import _image_suffix

    record = record_of(data)
    try:
        facts = json.loads(probe_image(record, data))
    except RecordError as error:
        same(error.code in ("bad_image", "image_size", "exif_orientation") and bool(error.message), True)
        same(" at 0x" in error.message, False)  # reasons are stored, and must be the same every time
        facts = None
    if facts is not None:
        same((facts["width"], facts["height"]), record.size_wh)
        check_orientation(data, facts["orientation"])
        same(_image_suffix(data) in {"jpg", "png", "webp", "bmp", "gif", "tiff"}, True)
        shown = decode(data)  # the report's
        same(shown is None or shown.size <= 3 * MAX_PIXELS, True)
    try:
        image = open_rgb(record, data)
        same((image.mode, image.size), ("RGB", record.size_wh))
    except RecordError as error:
        same(error.code in ("bad_image", "image_size", "exif_orientation"), True)
    for check in (check_mask, check_depth):
        try:
            png = check(record, data)
        except RecordError as error:
            same(error.code in ("bad_image", "image_size", "bad_mask", "exif_orientation"), True)
        else:
            pixels = decode(png)
            same(pixels is not None and pixels.shape[1::-1] == record.size_wh, True)


def check_orientation(data: bytes, orientation: int) -> None:
    """What an export copies of an image that the images stage lets through."""
    copy = without_orientation(data)
    same(copy is data, orientation == 1)
    same(len(copy), len(data))
    with Image.open(io.BytesIO(copy), formats=FORMATS) as image:
        same(orientation_of(image), 1)


def record_of(data: bytes) -> Record:
    """A record of the size that the file says it has, where an index would let it through."""
    try:
        with opened_image(data) as image:
            size_wh = image.size
    except Exception:
        size_wh = (64, 48)
    if not 0 < size_wh[0] * size_wh[1] <= MAX_PIXELS:
        size_wh = (64, 48)
    return Record(1, "1.jpg", size_wh, np.empty((0, 17, 3)), np.empty((0, 4)))


# Configurations


def _kinds() -> dict[str, type[msgspec.Struct]]:
    from eval.settings import Evaluation
    from spctrl.training.config import TrainingConfig

    return {"train": TrainingConfig, "generate": Generation, "evaluate": Evaluation, "prompts": Templates}


def configuration_seeds() -> list[bytes]:
    """The shipped files behind a byte that says which kind they are."""
    return [
        bytes([kind]) + path.read_bytes()
        for kind, name in enumerate(_kinds())
        for shipped in (REPOSITORY / "configs" / name, packaged(name))
        for path in sorted(shipped.glob("*.yaml"))
    ]


def run_configuration(data: bytes) -> None:
    """Any text as a configuration: read as its kind, or refused by name."""
    path = folder() / "some.yaml"
    path.write_bytes(data[1:])
    kinds = list(_kinds().values())
    kind = kinds[(data[0] if data else 0) % len(kinds)]
    try:
        found = load_templates(path, "ap10k") if kind is Templates else read_config(path, kind)
    except ConfigurationError as error:
        same(str(path) in str(error), True)
    else:
        same(isinstance(found, kind), True)


# Poses


def pose_seeds() -> list[bytes]:
    seeds = []
    for dataset in (AP10K, HUMANART):
        for seed in annotation_seeds(dataset):
            content = json.loads(seed)
            image = content["images"][0]
            pose = {
                "width": image["width"],
                "height": image["height"],
                "background": image.get("background"),
                "caption": "a fox",
                "anns": [each for each in content["annotations"] if each["image_id"] == image["id"]],
            }
            seeds.append(json.dumps(pose).encode())
    return seeds


def run_pose(data: bytes) -> None:
    """Any file as a pose: drawn in its own size, or refused by name."""
    path = folder() / "pose.json"
    path.write_bytes(data)
    for dataset in DATASETS.values():
        try:
            pose = read_pose(path, dataset)
        except ConfigurationError as error:
            same(str(path) in str(error), True)
        else:
            if pose.size_wh[0] * pose.size_wh[1] <= MAX_PIXELS:
                same(index_map_of(pose, dataset).shape, pose.size_wh[::-1])


# Weights


def weight_seeds() -> list[bytes]:
    import torch

    contents: list[Any] = [
        {"<left_eye>": torch.zeros(4), "<nose>": torch.ones(4)},
        {"state_dict": {"backbone.cls_token": torch.zeros(1, 1, 4)}, "meta": {"epoch": 1, "loss": np.float64(0.5)}},
        torch.zeros(17, 4),
        {"conv.weight": torch.zeros(2, 2, dtype=torch.float16), "n": torch.tensor(3)},
        [1, "x", None, {"a": (1, 2.0)}],
    ]  # fmt: skip
    seeds = []
    for content in contents:
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            seeds.append(buffer.getvalue())
    return seeds


def run_weights(data: bytes) -> None:
    """Any file as weights: tensors, or refused; a pickle runs nothing."""
    from eval.vitpose.checkpoints import _read_checkpoint
    from spctrl.image_models.sam_networks import _read_weights
    from spctrl.models.embedding import load_keypoint_init
    from spctrl.models.tokens import load_learned_embeds
    from spctrl.training.checkpoints import STATE, read_state

    path = folder() / STATE
    path.write_bytes(data)
    readers: tuple[Callable[[], object], ...] = (
        lambda: load_learned_embeds(path),
        lambda: load_keypoint_init(path),
        lambda: read_state(folder()),
        lambda: _read_checkpoint(path),
        lambda: _read_weights(path, "sam", "vit_b"),
    )
    for read in readers:
        try:
            read()
        except ExpectedError as error:
            same(str(path) in str(error), True)


# Stores and exports that come from elsewhere


KEY, PACK = "0" * 32, "11111111111111111111111111111111.tar"


def store_seeds() -> list[bytes]:
    """What a small store and an export say of themselves, as JSON."""
    content = b"an artifact"
    sha = content_digest(content)
    index = [[KEY, 512, len(content), sha, None, None], ["1" * 32, 0, 0, "", "bad_image", "no image"]]
    files = {name: {"size": 3, "digest": sha} for name in ("artifacts.parquet", "rejects.parquet")}
    provenance = {**FACTS, "format": FORMAT, "fingerprint": "f", "files": files, "packs": {PACK: 10_240}}
    return [
        json.dumps(
            {
                "index": index,
                "provenance": provenance,
                "manifest": [[1, KEY, PACK, 512, len(content), sha]],
                "ledger": [["data/1.jpg", "hard x", sha], ["manifests/train_split1.parquet", "text", sha]],
                "fingerprint": {"fingerprint": "f"},
                "accepted": {"a": "b"},
            }
        ).encode()
    ]


def run_store(data: bytes) -> None:
    """Whatever a store and an export say of themselves: they are read, verified, repaired and cleaned, or refused, and
    nothing beside them is touched.
    """
    arena = folder() / "arena"
    shutil.rmtree(arena, ignore_errors=True)
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        said = None
    said = said if isinstance(said, dict) else {}
    store_root, exports = arena / "store", arena / "exports"
    run = store_root / "runs/mask/ap10k-train/f"
    ledgers_folder = exports / "AP-10K_triplet/.spctrl"
    baits = [arena / "bait.txt", exports / "bait.txt", exports / "other/data/1.jpg"]
    for path in (*baits, store_root / "packs/mask" / PACK, run / "x", ledgers_folder / "x"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"bait")
    tar, _ = write_container(".png", [(KEY, b"an artifact")])
    (store_root / "packs/mask" / PACK).write_bytes(tar)
    index_columns = ("key", "offset", "size", "digest", "code", "message")
    _write_table(
        store_root / "packs/mask" / PACK.replace(".tar", ".parquet"), said.get("index"), index_columns
    )
    manifest_columns = ("image_id", "key", "pack", "offset", "size", "digest")
    _write_table(run / "artifacts.parquet", said.get("manifest"), manifest_columns)
    _write_table(ledgers_folder / "train.parquet", said.get("ledger"), ("path", "made_from", "digest"))
    _write_json(run / "provenance.json", said.get("provenance"))
    _write_json(ledgers_folder / "train.json", said.get("fingerprint"))
    _write_json(store_root / "accepted.json", said.get("accepted"))
    before = {path for path in arena.rglob("*") if not path.is_relative_to(store_root)}
    use_store(Store(store_root), exports)
    same([path.read_bytes() for path in baits], [b"bait"] * len(baits))
    after = {path for path in arena.rglob("*") if not path.is_relative_to(store_root)}
    own = exports / "AP-10K_triplet"
    same({path for path in before ^ after if not path.is_relative_to(own)}, set())


def use_store(store: Store, exports: Path) -> None:
    """Everything that reads what a store says, and then acts on it."""
    place = files_at(exports / "AP-10K_triplet", temporaries=".spctrl")

    def clean_export() -> None:
        ledger = Ledger.read(place, ".spctrl/train.json")
        damaged_files(ledger)
        place.remove(ledger.files)

    def read_all() -> None:
        for location in locations(store, "mask").values():
            if location.code is None:
                store.read("mask", location)

    steps: tuple[Callable[[], object], ...] = (
        store.accepted,
        lambda: [run.is_whole() for run in store.runs()],
        read_all,
        lambda: verify(store, exports, repair=False),
        lambda: verify(store, exports, repair=True),
        lambda: collect(store, [], keep=1, grace_s=-1, dry_run=True),
        lambda: collect(store, [], keep=0, grace_s=-1, dry_run=False),
        clean_export,
    )
    for step in steps:
        with suppress(ExpectedError):
            step()


ARTIFACT_COLUMNS = ["key", "pack", "digest"]
CONDITION_COLUMNS = [f"{name}_{what}" for name in ("spatext", "mask") for what in ("path", "digest")]
NAMES_IN_TABLES = {
    "manifest": ["file_name", "image_path", "image_digest", *CONDITION_COLUMNS],
    "index": ["file_name", "drawing_digest"],
    "images": ARTIFACT_COLUMNS,
    "mask": ARTIFACT_COLUMNS,
    "spatext": ARTIFACT_COLUMNS,
}
"""Columns that hold names of files or what is found under them, by stage."""
IMAGE_PATHS, ARENA = "images.txt", "ARENA"


@functools.cache
def built_store() -> Path:
    """The store of a small dataset, with a report and all exports made."""
    workspace = tampered_workspace(folder() / "built")
    assert workspace.build().succeeded
    return workspace.store


def tampered_workspace(at: Path) -> Workspace:
    workspace = Workspace(at / "work", sample())
    workspace.configure("build", datasets=["ap10k"], splits=["train"], conditions=["spatext", "mask"])
    workspace.configure("export", format="folders,webdataset", heatmaps="yes")
    return workspace


def tables_seeds() -> list[bytes]:
    """Names in the tables of a store, as JSON."""
    tables = {
        stage: pq.read_table(
            run_folder(built_store(), stage) / table_of(stage), columns=columns, partitioning=None
        ).to_pydict()
        for stage, columns in NAMES_IN_TABLES.items()
    }
    lines = (run_folder(built_store(), "index") / IMAGE_PATHS).read_text().splitlines()
    return [json.dumps({**tables, IMAGE_PATHS: lines}).encode()]


def run_tables(data: bytes) -> None:
    """Whatever names the tables of a store hold, with digests that fit: it is exported or refused, and nothing that
    lies elsewhere is read into the export, linked, changed or removed.
    """
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        return
    arena = folder() / "tampered"
    shutil.rmtree(arena, ignore_errors=True)
    workspace = tampered_workspace(arena)
    shutil.copytree(built_store(), workspace.store)
    baits = [arena / "x", workspace.folder / "x", workspace.exports / "x", workspace.exports / "other/x"]
    for path in baits:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"bait")
    for stage, columns in NAMES_IN_TABLES.items():
        found = said.get(stage) if isinstance(said, dict) else None
        if isinstance(found, dict):
            tamper(
                workspace.store,
                stage,
                table_of(stage),
                functools.partial(_replace_names, columns=columns, values=found),
            )
    lines = said.get(IMAGE_PATHS) if isinstance(said, dict) else None
    if isinstance(lines, list):
        path = run_folder(workspace.store, "index") / IMAGE_PATHS
        path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass"))
        correct_provenance(path)
    workspace.build()
    own = (workspace.store, workspace.export_folder("ap10k"))
    others = {path for path in arena.rglob("*") if not any(path.is_relative_to(each) for each in own)}
    names = {"work", "x", "luigi-test.cfg", "store", "exports", "other", "report.html", ".spctrl", "lock"}
    names |= {"report.json", "report.parquet"}  # the report's ledger
    same({path.name for path in others} - names, set())
    same([(path.read_bytes(), path.stat().st_nlink) for path in baits], [(b"bait", 1)] * len(baits))
    exported = [path for path in workspace.export_folder("ap10k").rglob("*") if path.is_file()]
    same([path for path in exported if path.read_bytes() == b"bait"], [])


def mutate_names(data: bytes, chance: Random) -> bytes:
    """Some names replaced by ways out of their folders, else as ``mutate_json``."""
    try:
        said = json.loads(data)
        for _ in range(chance.randint(1, 3)):
            column = chance.choice(list(said[chance.choice(list(NAMES_IN_TABLES))].values()))
            ways = ("", "data/", "/", f"{ARENA}/", "./", ".spctrl/")
            column[chance.randrange(len(column))] = (
                chance.choice(ways)
                + "../" * chance.randrange(7)
                + chance.choice(("x", "new", "x/new", "", "lock"))
            )
    except (ValueError, RecursionError, TypeError, LookupError, AttributeError):
        return mutate_json(data, chance)
    return json.dumps(said).encode() if chance.random() < 0.7 else mutate_json(data, chance)


def is_surrogate(letter: str) -> bool:
    return "\ud800" <= letter <= "\udfff"


def _replace_names(rows: Rows, columns: Sequence[str], values: dict[str, object]) -> None:
    """Texts of columns, row by row, where there are texts that Arrow can hold."""
    for column in columns:
        found = values.get(column)
        for row, value in zip(rows, found if isinstance(found, list) else [], strict=False):
            if isinstance(value, str) and not any(map(is_surrogate, value)):
                row[column] = value.replace(ARENA, str(folder() / "tampered"))


def _write_table(path: Path, rows: object, names: tuple[str, ...]) -> None:
    """Rows as a Parquet file, in whatever types they have; nothing where Arrow finds none for them."""
    listed = [row for row in rows if isinstance(row, list)] if isinstance(rows, list) else []
    columns = {
        name: [row[place] if place < len(row) else None for row in listed] for place, name in enumerate(names)
    }
    try:
        pq.write_table(pa.table(columns), path)
    except (pa.ArrowException, OSError, OverflowError, UnicodeEncodeError):
        path.write_bytes(b"PAR1")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")


def parquet_seeds() -> list[bytes]:
    """A pack's index, a ledger, and a manifest, as files."""
    nothing = pa.nulls(1, pa.string())
    index = pa.table(
        {"key": [KEY], "offset": [512], "size": [11], "digest": ["0"], "code": nothing, "message": nothing}
    )
    ledger = pa.table({"path": ["data/1.jpg"], "made_from": ["x"], "digest": ["0" * 64]})
    manifest = pa.table(
        {"image_id": [1], "key": [KEY], "pack": [PACK], "offset": [512], "size": [11], "digest": [""]}
    )
    return [parquet_bytes(each) for each in (index, ledger, manifest)]


def run_parquet(data: bytes) -> None:
    """Any file where a pack's index or a ledger should be: read, or taken for none."""
    root = folder() / "parquet"
    place = Store(root)
    name = f"packs/mask/{PACK}"
    for each in (name, name.replace(".tar", ".parquet"), "ledger.parquet"):
        (root / each).parent.mkdir(parents=True, exist_ok=True)
        (root / each).write_bytes(data)
    for location in place.pack_locations("mask", PACK).values():
        same(location.offset >= 0 and location.size >= 0, True)
    locations(place, "mask")
    for path in Ledger.read(place.files, "ledger.json").files:
        same((root / path).resolve().is_relative_to(root.resolve()), True)


TARGETS = {
    "annotations-ap10k": Target(
        lambda: annotation_seeds(AP10K), lambda data: run_annotations(data, AP10K), mutate_json
    ),
    "annotations-humanart": Target(
        lambda: annotation_seeds(HUMANART), lambda data: run_annotations(data, HUMANART), mutate_json
    ),
    "records": Target(record_seeds, run_records, mutate_numbers),
    "images": Target(image_seeds, run_images, mutate_image),
    "configuration": Target(configuration_seeds, run_configuration, mutate_yaml),
    "poses": Target(pose_seeds, run_pose, mutate_json),
    "weights": Target(weight_seeds, run_weights, mutate_pickle),
    "store": Target(store_seeds, run_store, mutate_json),
    "tables": Target(tables_seeds, run_tables, mutate_names),
    "parquet": Target(parquet_seeds, run_parquet, mutate_bytes),
}
