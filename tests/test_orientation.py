"""Orientation tags: what they say, copies without them, and that they turn nothing here."""

from __future__ import annotations

import io
import json
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from memory import MIB, memory_of
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tagged_images import (
    LONG,
    ORIENTATION,
    SHORT,
    directory,
    exif,
    png_chunk,
    saved,
    tagged,
    tiff,
    xmp,
)

from eval.images import ImageError, file_without_orientation, read_rgb, size_of
from spctrl.conditions.masks import check_depth
from spctrl.data.images import open_rgb, probe_image
from spctrl.data.orientation import orientation_of, without_orientation
from spctrl.data.records import Record, RecordError
from spctrl.inference.generator import read_condition
from spctrl.report.pictures import decode

SIZE_WH = (48, 32)
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
TURNED = (5, 6, 7, 8)


def record(size_wh: tuple[int, int] = SIZE_WH) -> Record:
    return Record(1, "1.jpg", size_wh, np.empty((0, 17, 3)), np.empty((0, 4)))


def scene() -> Image.Image:
    """An image that looks otherwise however it is turned, and survives compression."""
    pixels = np.zeros((*SIZE_WH[::-1], 3), np.uint8)
    pixels[:16, :16] = (240, 40, 40)
    pixels[:16, 32:] = (40, 240, 40)
    pixels[16:, :16] = (40, 40, 240)
    return Image.fromarray(pixels)


def by_pillow(data: bytes) -> tuple[int, NDArray[np.uint8]]:
    """The tag, and the pixels as Pillow's readers that apply it see them."""
    with Image.open(io.BytesIO(data)) as image:
        tag = orientation_of(image)
        return tag, np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def by_opencv(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB))


def near(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> bool:
    return first.shape == second.shape and np.abs(first.astype(int) - second).mean() < 8


def code_of(data: bytes) -> str | None:
    """The reason for which a file cannot be rid of its tag; None where it can."""
    try:
        without_orientation(data)
    except RecordError as error:
        assert error.message
        return error.code
    return None


# Copies without the tag


@pytest.mark.parametrize("way", ["EXIF", "XMP", "both"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", FORMATS)
def test_a_copy_has_the_stored_pixels_for_all_readers(kind: str, orientation: int, way: str) -> None:
    for order in "<>":
        for value in (SHORT, LONG):
            data = tagged(scene(), kind, orientation, order, value, way)
            assert by_pillow(data)[0] == orientation
            copy = without_orientation(data)
            assert len(copy) == len(data)
            assert (copy == data) == (orientation == 1)
            tag, pixels = by_pillow(copy)
            assert tag == 1
            assert near(pixels, np.asarray(scene()))
            assert near(by_opencv(copy), np.asarray(scene()))
            changed = np.frombuffer(copy, np.uint8) != np.frombuffer(data, np.uint8)
            assert np.count_nonzero(changed) <= (2 if way == "both" else 1) + 8 * (kind == "PNG")


@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_without_a_tag_stays_as_it_is(kind: str) -> None:
    data = saved(scene(), kind)
    assert without_orientation(data) is data


def test_the_tag_of_a_thumbnail_is_its_own() -> None:
    block = exif(6)
    data = saved(scene(), "JPEG", exif=b"Exif\0\0" + block)
    copy = without_orientation(data)
    assert copy[copy.index(block[:8]) :][: len(block)] == exif(1)


def test_every_frame_of_readers_of_mpo_is_upright() -> None:
    data = saved(scene(), "MPO", save_all=True, append_images=[scene()], exif=b"Exif\0\0" + exif(6))
    assert by_pillow(data)[0] == 6
    tag, pixels = by_pillow(without_orientation(data))
    assert (tag, near(pixels, np.asarray(scene()))) == (1, True)


@pytest.mark.parametrize("kind", [1, SHORT, LONG, 5, 7, 11, 12, 99])
def test_a_value_of_any_type_turns_nothing_in_a_copy(kind: int) -> None:
    """Pillow turns by a rational and a real number too, OpenCV by a byte and by what has no known type."""
    values = {1: b"\6", SHORT: b"\6\0", LONG: b"\6\0\0\0", 7: b"\6\0", 99: b"\6\0"}
    values |= {5: struct.pack("<II", 6, 1), 11: struct.pack("<f", 6), 12: struct.pack("<d", 6)}
    value = values[kind]
    block = struct.pack("<2sHIHHHI", b"II", 42, 8, 1, ORIENTATION, kind, 1)
    block += (value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", 26)) + bytes(4)
    block += value if len(value) > 4 else b""
    for data in (
        saved(scene(), "JPEG", exif=b"Exif\0\0" + block),
        saved(scene(), "WEBP", lossless=True, exif=b"Exif\0\0" + block),
        (png := saved(scene(), "PNG"))[:33] + png_chunk(b"eXIf", block) + png[33:],
    ):
        copy = without_orientation(data)
        assert (copy != data) == (by_pillow(data)[0] != 1 or by_opencv(data).shape[:2] != SIZE_WH[::-1])
        assert (json.loads(probe_image(record(), data))["orientation"] != 1) == (copy != data)
        tag, pixels = by_pillow(copy)
        assert (tag, near(pixels, np.asarray(scene()))) == (1, True)
        assert near(by_opencv(copy), np.asarray(scene()))


def test_overlapping_blocks_of_xmp_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many entries names the same block of 200 kB: together they would be read for minutes."""
    entries = b"".join(struct.pack("<HHII", 700, 1, 200_000, 8) for _ in range(16_000))
    first = struct.pack("<HHIHH", ORIENTATION, SHORT, 1, 6, 0)
    block = struct.pack("<2sHIH", b"II", 42, 8, 16_001) + first + entries + bytes(4 + 200_000)
    data = saved(scene(), "PNG")
    data = data[:33] + png_chunk(b"eXIf", block) + data[33:]
    blocks = []
    monkeypatch.setattr(
        "spctrl.data.orientation._rewrite_xmp", lambda data, block: blocks.append(block) or []
    )
    with suppress(RecordError):
        without_orientation(data)
    assert len(blocks) == 1


@pytest.mark.parametrize(("before", "behind"), [(6, None), (None, 6), (1, 6), (3, 6)])
def test_a_tag_behind_the_pixels_of_a_png_counts(before: int | None, behind: int | None) -> None:
    data = saved(scene(), "PNG")
    first, last = (png_chunk(b"eXIf", exif(each)) if each else b"" for each in (before, behind))
    data = data[:33] + first + data[33:-12] + last + data[-12:]
    assert json.loads(probe_image(record(), data))["orientation"] == 6
    copy = without_orientation(data)
    assert by_pillow(copy)[0] == 1
    assert near(by_opencv(copy), np.asarray(scene()))


def compressed_xmp(orientation: int) -> bytes:
    """A PNG whose XMP is compressed."""
    data = saved(scene(), "PNG")
    text = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(orientation))
    return data[:33] + png_chunk(b"iTXt", text) + data[33:]


def raw_profile(orientation: int) -> bytes:
    """A PNG whose EXIF is hexadecimal text, as older versions of ImageMagick write it."""
    data = saved(scene(), "PNG")
    block = b"Exif\0\0" + exif(orientation)
    text = f"Raw profile type exif\0\nexif\n{len(block):8}\n{block.hex()}\n".encode()
    return data[:33] + png_chunk(b"tEXt", text) + data[33:]


@pytest.mark.parametrize("made", [compressed_xmp, raw_profile])
def test_a_tag_that_cannot_be_rewritten_rejects_the_record(made: Any) -> None:
    data = made(6)
    assert by_pillow(data)[0] == 6
    for refuse in (without_orientation, lambda each: probe_image(record(), each)):
        with pytest.raises(RecordError, match=r"found 6 where .*`exiftool -all=`") as caught:
            refuse(data)
        assert caught.value.code == "exif_orientation"
    assert code_of(made(1)) is None


# Hostile files


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF
def test_a_truncated_or_damaged_file_raises_nothing_else(kind: str) -> None:
    data = tagged(scene(), kind, 6, way="both")
    chance = np.random.default_rng(0)
    for end in chance.integers(0, len(data), 100):
        assert code_of(data[: int(end)]) in (None, "exif_orientation")
    for _ in range(300):
        damaged = bytearray(data)
        for place in chance.integers(0, 700, 3):
            damaged[int(place) % len(data)] = int(chance.integers(0, 256))
        assert code_of(bytes(damaged)) in (None, "exif_orientation")


HOSTILE = {
    "no header": b"garbage",
    "only a header": b"II*\0",
    "a directory outside": struct.pack("<2sHI", b"II", 42, 2**32 - 1),
    "a directory at the end": struct.pack("<2sHI", b"II", 42, 8),
    "a directory in the header": struct.pack("<2sHI", b"II", 42, 0) + bytes(20),
    "more entries than there are": struct.pack("<2sHIH", b"II", 42, 8, 65535) + bytes(30),
    "entries of any size": struct.pack("<2sHIH", b"II", 42, 8, 4000)
    + b"".join(struct.pack("<HHII", tag, 1, 2**31, 8) for tag in range(4000)),
    "an orientation far away": struct.pack("<2sHIHHHII", b"II", 42, 8, 1, ORIENTATION, SHORT, 99, 2**31),
    "orientation 0": exif(0),
    "orientation 9": exif(9),
    "orientation 65535": exif(65535),
}


@pytest.mark.parametrize("block", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_hostile_block_takes_no_memory_and_no_time(kind: str, block: bytes) -> None:
    if kind == "PNG":
        data = saved(scene(), kind)
        data = data[:33] + png_chunk(b"eXIf", block) + data[33:]
    else:
        data = saved(scene(), kind, exif=b"Exif\0\0" + block)
    assert memory_of(lambda: code_of(data)) < 16 * MIB
    assert code_of(data) in (None, "exif_orientation")
    with suppress(RecordError):
        probe_image(record(), data)


def test_opencv_is_not_asked_about_a_chunk_larger_than_the_file() -> None:
    """It would take as much memory as the chunk says."""
    data = tagged(scene(), "PNG", 6)
    bomb = data[: data.index(b"IEND") - 4] + struct.pack(">I4s", 2**30, b"tEXt") + b"x" * 20

    def work() -> None:
        assert code_of(bomb) == "exif_orientation"

    assert memory_of(work) < 32 * MIB


# The one frame of pixels


@pytest.mark.parametrize("way", ["EXIF", "XMP"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", FORMATS)
def test_a_tag_turns_nothing_in_any_reader(kind: str, orientation: int, way: str, tmp_path: Path) -> None:
    data, plain = tagged(scene(), kind, orientation, way=way), tagged(scene(), kind, 1)
    facts, expected = (by_probe(each) for each in (data, plain))
    assert facts.pop("orientation") == orientation
    assert expected.pop("orientation") == 1
    assert facts == expected
    path, twin = tmp_path / "tagged.png", tmp_path / "plain.png"
    path.write_bytes(data)
    twin.write_bytes(plain)
    assert size_of(path) == SIZE_WH
    assert np.array_equal(read_rgb(path), read_rgb(twin))
    assert np.array_equal(open_rgb(record(), data), open_rgb(record(), plain))
    assert np.array_equal(read_condition(data, "openpose", 32), read_condition(plain, "openpose", 32))
    shown, same = decode(data), decode(plain)
    assert shown is not None
    assert same is not None
    assert np.array_equal(shown, same)


def by_probe(data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(probe_image(record(), data))
    del found["sha256"]
    return found


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", FORMATS)
def test_a_depth_map_with_a_tag_is_taken_over_as_stored(kind: str, orientation: int) -> None:
    grey = scene().convert("L").convert("RGB")
    data, plain = (tagged(grey, kind, each) for each in (orientation, 1))
    if kind == "JPEG":  # whose colours are not quite equal
        data = saved(grey.convert("L"), kind, exif=b"Exif\0\0" + exif(orientation))
        plain = saved(grey.convert("L"), kind)
    assert check_depth(record(), data) == check_depth(record(), plain)


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("read", [probe_image, open_rgb, check_depth])
def test_a_size_that_only_the_tag_makes_right_is_rejected(read: Any, kind: str, orientation: int) -> None:
    with pytest.raises(RecordError) as caught:
        read(record(SIZE_WH[::-1]), tagged(scene(), kind, orientation))
    assert caught.value.code == "image_size"
    assert caught.value.message == (
        "expected the annotated 32 x 48 pixels, found 48 x 32, which the file's EXIF orientation tag "
        f"({orientation}) turns to the annotated size. Rotate the pixels and remove the tag, for example with "
        "`mogrify -auto-orient`"
    )


@pytest.mark.parametrize("orientation", [1, 2, 3, 4])
def test_a_tag_that_does_not_explain_the_size_is_not_named(orientation: int) -> None:
    with pytest.raises(RecordError) as caught:
        probe_image(record(SIZE_WH[::-1]), tagged(scene(), "JPEG", orientation))
    assert caught.value.message == "expected the annotated 32 x 48 pixels, found 48 x 32"


@pytest.mark.parametrize("kind", FORMATS)
def test_other_programs_get_a_copy_where_they_would_turn_it(kind: str, tmp_path: Path) -> None:
    path, copy = tmp_path / "image.jpg", tmp_path / "copy.jpg"
    for orientation in range(1, 9):
        data = tagged(scene(), kind, orientation)
        path.write_bytes(data)
        found, size_wh = file_without_orientation(path, copy)
        assert (found, size_wh) == (path if orientation == 1 else copy, SIZE_WH)
        assert path.read_bytes() == data
        assert near(np.asarray(cv2.imread(str(found), cv2.IMREAD_COLOR_RGB)), np.asarray(scene()))
    path.write_bytes(compressed_xmp(6))
    with pytest.raises(ImageError, match=r"image\.jpg: expected an orientation tag that can be set to 1"):
        file_without_orientation(path, copy)


@pytest.mark.parametrize("script", ["estimate.py", "detect.py"])
def test_mmpose_and_mmdet_get_stored_pixels(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With OpenMMLab's environment replaced by what reads images as mmcv does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from eval.openmmlab import MmposeEstimator, OpenMMLab, detect

    seen = []

    def run(self: object, name: str, request: Any, folder: Path) -> None:
        assert name == script
        listed = request["boxes" if script == "estimate.py" else "images"]
        names = pq.read_table(listed).column("image_path").to_pylist()
        seen.extend(np.asarray(cv2.imread(each, cv2.IMREAD_COLOR_RGB)) for each in names)
        rows = [{"keypoints": [0.0] * 34, "scores": [0.0] * 17}] * len(seen)
        schema = pa.schema(
            [("image_path", pa.string()), ("bbox_xywh", pa.list_(pa.float64())), ("score", pa.float64())]
        )
        table = pa.Table.from_pylist(rows) if script == "estimate.py" else schema.empty_table()
        pq.write_table(table, request["result"])

    monkeypatch.setattr(OpenMMLab, "run", run)
    paths = []
    for orientation in range(1, 9):
        paths.append(tmp_path / f"{orientation}.jpg")
        paths[-1].write_bytes(tagged(scene(), "JPEG", orientation))
    if script == "estimate.py":
        config = tmp_path / "config.py"
        estimator = MmposeEstimator(tmp_path, tmp_path / "weights.pth", config=config)
        estimator.predict(paths, [[[1, 2, 3, 4]]] * 8, keep_heatmaps=False)
    else:
        assert len(detect(tmp_path, paths, config="config", weights=tmp_path)) == 8
    assert len(seen) == 8
    assert all(near(each, np.asarray(scene())) for each in seen)


# 16 bits


def png16(pixels: NDArray[np.uint16]) -> bytes:
    """An (H, W, 2, 3 or 4) array as a PNG of 16 bits a channel."""
    height, width, channels = pixels.shape
    colours = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def levels(channels: int) -> NDArray[np.uint16]:
    shape = SIZE_WH[::-1] if channels == 1 else (*SIZE_WH[::-1], channels)
    return np.random.default_rng(0).integers(256, 65536, shape, np.uint16)


GREY16 = Image.fromarray(levels(1))
NOT_8_BITS = {
    "16-bit grey PNG": (saved(GREY16, "PNG"), "I;16"),
    "16-bit grey TIFF": (saved(GREY16, "TIFF"), "I;16"),
    "16-bit grey TIFF, big-endian": (tiff(levels(1), ">"), "I;16B"),
    "16-bit grey TIFF, signed": (tiff(levels(1).astype(np.int16)), "I"),
    "32-bit integers": (saved(Image.fromarray(levels(1).astype(np.int32)), "TIFF"), "I"),
    "real numbers": (saved(Image.fromarray(levels(1).astype(np.float32)), "TIFF"), "F"),
    "8-bit grey TIFF, signed": (tiff(levels(1).astype(np.int8)), "L, signed"),
    "16-bit RGB TIFF in planes": (tiff(levels(3), planar=True), "RGB, 16 bits in planes"),
    "16-bit RGBA TIFF in planes": (tiff(levels(4), ">", planar=True), "RGBA, 16 bits in planes"),
}


@pytest.mark.parametrize(("data", "kind"), NOT_8_BITS.values(), ids=NOT_8_BITS)
def test_pixels_that_pil_does_not_scale_to_8_bits_are_rejected(
    data: bytes, kind: str, tmp_path: Path
) -> None:
    expected = f"expected 8 bits a channel, found pixels of the kind {kind}. Convert the image to 8 bits"
    for read in (probe_image, open_rgb, check_depth):
        with pytest.raises(RecordError) as caught:
            read(record(), data)
        assert (caught.value.code, caught.value.message) == ("bad_image", expected)
    with pytest.raises(RecordError, match="expected 8 bits"):
        read_condition(data, "spctrl", 32)
    assert decode(data) is None
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    for measure in (read_rgb, size_of):
        with pytest.raises(ImageError) as failed:
            measure(path)
        assert str(failed.value) == f"{path}: {expected}"


SCALED = {
    **{f"PNG of {n} channels": (png16(levels(n)), levels(n)) for n in (2, 3, 4)},
    **{
        f"TIFF of {n} channels{order}{' packed' * packed}{' planes' * planar}": (
            tiff(levels(n), order, packed=packed, planar=planar),
            levels(n),
        )
        for n in (3, 4)
        for order in "<>"
        for packed, planar in ((False, False), (True, False), (True, True))
    },
}


@pytest.mark.parametrize(("data", "pixels"), SCALED.values(), ids=SCALED)
def test_16_bits_that_pil_scales_to_8_are_right(
    data: bytes, pixels: NDArray[np.uint16], tmp_path: Path
) -> None:
    high = (pixels >> 8).astype(np.uint8)
    expected = np.stack([high[..., 0]] * 3, axis=-1) if pixels.shape[2] == 2 else high[..., :3]
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    assert np.abs(np.asarray(open_rgb(record(), data)).astype(int) - expected).max() <= 1
    assert np.abs(read_rgb(path).astype(int) - expected).max() <= 1


def test_a_directory_without_entries_is_no_tag() -> None:
    assert code_of(saved(scene(), "JPEG", exif=b"Exif\0\0" + directory([]))) is None
