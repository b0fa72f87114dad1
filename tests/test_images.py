"""Looking at image files: broken ones, huge ones, links that lead out, and a hash that survives small changes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from spctrl.data.datasets import MAX_IMAGE_FILE_BYTES
from spctrl.data.images import perceptual_hash, probe_image, read_image_file
from spctrl.data.records import Record, RecordError
from spctrl.demo_data.scenes import draw_animal_scene, draw_people_scene

SIZE_WH = (160, 120)
FORMATS = {
    "JPEG": {"quality": 90},
    "progressive JPEG": {"quality": 90, "progressive": True},
    "PNG": {},
}


def record(size_wh: tuple[int, int] = SIZE_WH) -> Record:
    return Record(1, "1.jpg", size_wh, np.empty((0, 17, 3)), np.empty((0, 4)))


def saved(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind.removeprefix("progressive "), **(options or FORMATS.get(kind, {})))
    return buffer.getvalue()


def noise(size_wh: tuple[int, int] = SIZE_WH) -> Image.Image:
    pixels = np.random.default_rng(0).integers(
        0, 256, (size_wh[1] // 4 + 1, size_wh[0] // 4 + 1, 3), np.uint8
    )
    return Image.fromarray(pixels).resize(size_wh, Image.Resampling.BICUBIC)


def scene(seed: int, people: bool = False) -> Image.Image:
    draw = draw_people_scene if people else draw_animal_scene
    return Image.fromarray(draw(np.random.default_rng(seed)).rgb)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


def facts(data: bytes, size_wh: tuple[int, int] = SIZE_WH) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(probe_image(record(size_wh), data))
    return found


def code_of(data: bytes, size_wh: tuple[int, int] = SIZE_WH) -> str:
    with pytest.raises(RecordError) as caught:
        probe_image(record(size_wh), data)
    assert (
        "0x" not in caught.value.message
    )  # no memory address: reasons are stored, and must be the same every time
    return caught.value.code


@pytest.mark.parametrize("kind", [*FORMATS, "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_a_good_image_gives_its_facts(kind: str, mode: str) -> None:
    if kind in ("JPEG", "progressive JPEG") and mode in ("P", "1"):
        mode = "CMYK"
    data = saved(noise().convert(mode), kind)
    found = facts(data)
    assert found["sha256"] == hashlib.sha256(data).hexdigest()
    assert (found["width"], found["height"]) == SIZE_WH
    assert len(found["phash"]) == 16
    assert int(found["phash"], 16) >= 0
    assert found["orientation"] == 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_images_with_alpha_are_fine(mode: str) -> None:
    assert len(facts(saved(noise().convert(mode), "PNG"))["phash"]) == 16


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99])
def test_a_truncated_image_is_rejected(kind: str, share: float) -> None:
    data = saved(noise(), kind)
    assert code_of(data[: int(len(data) * share)]) == "bad_image"


@pytest.mark.parametrize("missing", [1, 2, 3, 10])
def test_a_jpeg_that_lacks_its_last_bytes_is_rejected(missing: int) -> None:
    assert code_of(saved(noise())[:-missing]) == "bad_image"


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_images_give_facts_or_a_reason_and_nothing_else(kind: str) -> None:
    data = saved(noise(), kind)
    rng = np.random.default_rng(1)
    reasons = 0
    for _ in range(150):
        damaged = bytearray(data)
        for position in rng.integers(
            0, min(len(damaged), int(rng.choice([40, 400, 10**6]))), int(rng.integers(1, 6))
        ):
            damaged[position] = int(rng.integers(0, 256))
        try:
            probe_image(record(), bytes(damaged))
        except RecordError as error:
            reasons += error.code in ("bad_image", "image_size")
    assert reasons > 10


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"<html><body>404 Not Found</body></html>",
        bytes(10_000),
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 160 120\n%%EndComments\nshowpage\n",
    ],
    ids=["empty", "text", "HTML", "zeros", "JPEG start", "PNG start", "PostScript"],
)
def test_garbage_is_rejected(data: bytes) -> None:
    assert code_of(data) == "bad_image"


def test_no_postscript_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object, **kwargs: object) -> None:
        raise AssertionError("a PostScript interpreter was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    header = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 160 120\n%%EndComments\n"
    assert code_of(header + b"newpath 0 0 moveto 9 9 lineto stroke\nshowpage\n%%EOF\n") == "bad_image"


def test_the_reason_of_garbage_is_the_same_each_time() -> None:
    messages = set()
    for _ in range(3):
        with pytest.raises(RecordError) as caught:
            probe_image(record(), b"not an image")
        messages.add(caught.value.message)
    assert len(messages) == 1


@pytest.mark.parametrize("size_wh", [(161, 120), (160, 119), (120, 160), (1, 1)])
def test_another_size_than_the_annotated_one_is_rejected(size_wh: tuple[int, int]) -> None:
    data = saved(noise())
    with pytest.raises(
        RecordError, match=f"annotated {size_wh[0]} x {size_wh[1]} pixels, found 160 x 120"
    ) as caught:
        probe_image(record(size_wh), data)
    assert caught.value.code == "image_size"


@pytest.mark.parametrize("annotated", [(60_000, 60_000), SIZE_WH])
def test_a_header_that_claims_a_huge_size_is_rejected_at_once(annotated: tuple[int, int]) -> None:
    data = png_header(60_000, 60_000)
    started = time.perf_counter()
    tracemalloc.start()
    code = code_of(data, annotated)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert code == "bad_image"
    assert time.perf_counter() - started < 1
    assert peak_bytes < 10_000_000


@pytest.mark.parametrize("kind", FORMATS)
def test_a_one_pixel_image_works(kind: str) -> None:
    assert facts(saved(Image.new("RGB", (1, 1), (9, 200, 30)), kind), (1, 1))["width"] == 1


# The perceptual hash


def bits_apart(first: str, second: str) -> int:
    return (int(first, 16) ^ int(second, 16)).bit_count()


def hash_of(image: Image.Image, kind: str = "JPEG", **options: Any) -> str:
    found: str = facts(saved(image, kind, **options), image.size)["phash"]
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("people", [False, True])
def test_a_near_copy_has_nearly_the_same_hash(seed: int, people: bool) -> None:
    image = scene(seed, people)
    original = hash_of(image, quality=92)

    def smaller(factor: float) -> Image.Image:
        size_wh = int(image.width * factor), int(image.height * factor)
        return image.resize(size_wh, Image.Resampling.LANCZOS)

    copies = {
        "PNG": hash_of(image, "PNG"),
        "low quality": hash_of(image, quality=40),
        "progressive": hash_of(image, quality=75, progressive=True),
        "4/5 of the size": hash_of(smaller(0.8), quality=85),
        "9/10 of the size": hash_of(smaller(0.9), quality=85),
        "half the size": hash_of(smaller(0.5), quality=85),
        "brighter": hash_of(image.point(lambda value: min(255, int(value * 1.1))), quality=90),
    }
    assert {name: found for name, found in copies.items() if bits_apart(original, found) > 4} == {}


def test_other_images_have_far_hashes() -> None:
    hashes = [hash_of(scene(seed, people)) for seed in range(6) for people in (False, True)]
    distances = [bits_apart(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 8
    assert np.median(distances) > 20


def test_the_same_pixels_always_have_the_same_hash() -> None:
    gray = np.random.default_rng(2).integers(0, 256, (32, 32), np.uint8)
    assert perceptual_hash(gray) == perceptual_hash(gray.copy())
    assert len(perceptual_hash(np.zeros((32, 32), np.uint8))) == 16


def test_only_regular_files_of_a_size_that_images_have_are_read(tmp_path: Path) -> None:
    image, folder, pipe, sparse, looped = (tmp_path / name for name in "abcde")
    image.write_bytes(b"bytes")
    folder.mkdir()
    os.mkfifo(pipe)  # reading it would wait without end
    with sparse.open("wb") as file:
        file.truncate(MAX_IMAGE_FILE_BYTES + 1)
    looped.symlink_to(looped)
    assert read_image_file(image) == b"bytes"
    for path, reason in (
        (folder, "regular file"),
        (pipe, "regular file"),
        (sparse, "at most"),
        (looped, "cannot be read"),
        (image / "below", "cannot be read"),
    ):
        with pytest.raises(RecordError, match=reason):
            read_image_file(path)
    with pytest.raises(FileNotFoundError):
        read_image_file(tmp_path / "nowhere")
