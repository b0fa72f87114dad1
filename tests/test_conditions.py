"""Precomputed masks and depth maps: what is taken over, to the pixel, and what is rejected."""

from __future__ import annotations

import io
import json
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from spctrl.conditions.masks import check_depth, check_mask, mask_depth, mask_iou, union_mask
from spctrl.data.records import Record, RecordError

WIDTH, HEIGHT = 37, 23
Pixels = NDArray[np.uint8]
Check = Callable[[Record, bytes], bytes]


def record(width: int = WIDTH, height: int = HEIGHT) -> Record:
    return Record(1, "1.jpg", (width, height), np.empty((0, 17, 3)), np.empty((0, 4)))


def png(pixels: NDArray[np.generic] | Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def pixels_of(data: bytes) -> tuple[str, Pixels]:
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        return image.mode, np.asarray(image)


def header_only(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


@pytest.fixture
def mask() -> Pixels:
    found = np.zeros((HEIGHT, WIDTH), np.uint8)
    found[5:15, 10:30] = 255
    return found


@pytest.fixture
def depth() -> Pixels:
    return np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH), np.uint8)


def same_in_other_files(mask: Pixels) -> dict[str, bytes]:
    gray = Image.fromarray(mask)
    palette = Image.fromarray((mask > 0).astype(np.uint8)).convert("P")
    palette.putdata((mask > 0).astype(np.uint8).ravel().tolist())
    palette.putpalette([0, 0, 0, 255, 255, 255])
    return {
        "gray": png(gray),
        "interlaced or not, other compression": png(gray, compress_level=0),
        "one bit": png(gray.convert("1")),
        "palette": png(palette),
        "RGB": png(gray.convert("RGB")),
        "gray and alpha": png(Image.merge("LA", [gray, gray])),
        "RGB and alpha": png(Image.merge("RGBA", [gray] * 3 + [Image.new("L", gray.size, 9)])),
    }


@pytest.mark.parametrize("kind", same_in_other_files(np.zeros((1, 1), np.uint8)))
def test_a_mask_is_taken_over_to_the_pixel_from_any_8_bit_png(mask: Pixels, kind: str) -> None:
    mode, found = pixels_of(check_mask(record(), same_in_other_files(mask)[kind]))
    assert mode == "L"
    assert np.array_equal(found, mask)


@pytest.mark.parametrize("value", [0, 255])
def test_a_mask_of_nothing_or_everything_is_fine(value: int) -> None:
    mask = np.full((HEIGHT, WIDTH), value, np.uint8)
    assert np.array_equal(pixels_of(check_mask(record(), png(mask)))[1], mask)


@pytest.mark.parametrize("kind", ["palette", "1 bit", "with alpha", "RGB"])
def test_a_mask_without_foreground_is_rejected_where_asked(kind: str) -> None:
    empty = Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8))
    data = png(empty.convert({"palette": "P", "1 bit": "1", "with alpha": "LA", "RGB": "RGB"}[kind]))
    with pytest.raises(RecordError, match="expected a mask with foreground, found none") as caught:
        check_mask(record(), data, empty="reject")
    assert caught.value.code == "empty_mask"
    assert not pixels_of(check_mask(record(), data, empty="keep"))[1].any()


def test_a_single_pixel_is_foreground() -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[-1, -1] = 255
    assert np.array_equal(pixels_of(check_mask(record(), png(mask), empty="reject"))[1], mask)


def test_equal_masks_in_different_files_give_equal_bytes(mask: Pixels) -> None:
    assert len({check_mask(record(), data) for data in same_in_other_files(mask).values()}) == 1


@pytest.mark.parametrize("value", [1, 127, 254])
def test_a_mask_with_other_values_is_rejected(mask: Pixels, value: int) -> None:
    mask[0, 0] = value
    with pytest.raises(RecordError, match="found 3 values from 0 to 255") as caught:
        check_mask(record(), png(mask))
    assert caught.value.code == "bad_mask"


def test_a_mask_of_0_and_1_is_rejected(mask: Pixels) -> None:
    with pytest.raises(RecordError, match="found 2 values from 0 to 1") as caught:
        check_mask(record(), png(mask // 255))
    assert caught.value.code == "bad_mask"


@pytest.mark.parametrize("channel", [0, 1, 2])
@pytest.mark.parametrize("check", [check_mask, check_depth])
def test_colours_are_rejected_whichever_channel_differs(mask: Pixels, check: Check, channel: int) -> None:
    colours = np.stack([mask] * 3, axis=-1)
    colours[3, 4, channel] ^= 255
    with pytest.raises(RecordError, match="found colours") as caught:
        check(record(), png(colours))
    assert caught.value.code == "bad_image"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(png(np.zeros((HEIGHT, WIDTH), np.uint16)), id="16 bit"),
        pytest.param(b"", id="empty"),
        pytest.param(b"no image", id="garbage"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 37 23\n%%EndComments\n", id="PostScript"),
        pytest.param(header_only(WIDTH, HEIGHT), id="header only"),
    ],
)
@pytest.mark.parametrize("check", [check_mask, check_depth])
def test_what_is_no_8_bit_image_is_rejected(data: bytes, check: Check) -> None:
    with pytest.raises(RecordError) as caught:
        check(record(), data)
    assert caught.value.code == "bad_image"
    assert (
        "0x" not in caught.value.message
    )  # no memory address: reasons are stored, and must be the same every time


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_truncated_file_is_rejected(depth: Pixels, share: float, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(depth).save(buffer, kind)
    data = buffer.getvalue()
    with pytest.raises(RecordError) as caught:
        check_depth(record(), data[: int(len(data) * share)])
    assert caught.value.code == "bad_image"


@pytest.mark.parametrize("size_wh", [(WIDTH + 1, HEIGHT), (WIDTH, HEIGHT - 1), (HEIGHT, WIDTH)])
def test_another_size_than_the_image_is_rejected(mask: Pixels, size_wh: tuple[int, int]) -> None:
    data = png(mask)
    message = f"{size_wh[0]} x {size_wh[1]} pixels, found {WIDTH} x {HEIGHT}"
    for make in (check_mask, check_depth, lambda r, d: mask_depth(r, d, d)):
        with pytest.raises(RecordError, match=message) as caught:
            make(record(*size_wh), data)
        assert caught.value.code == "image_size"


@pytest.mark.parametrize("side", [60_000, 30_000, 9_000])
def test_a_header_that_claims_a_huge_size_is_rejected_at_once(side: int) -> None:
    started = time.perf_counter()
    with pytest.raises(RecordError) as caught:
        check_mask(record(), header_only(side, side))
    assert caught.value.code in ("bad_image", "image_size")
    with pytest.raises(RecordError):
        check_mask(record(side, side), header_only(side, side))
    assert time.perf_counter() - started < 2


def test_depth_becomes_three_equal_channels(depth: Pixels) -> None:
    mode, found = pixels_of(check_depth(record(), png(depth)))
    assert mode == "RGB"
    assert all(np.array_equal(found[..., channel], depth) for channel in range(3))


def test_depth_within_the_mask_is_kept_and_zero_elsewhere(mask: Pixels, depth: Pixels) -> None:
    masked = mask_depth(record(), check_depth(record(), png(depth)), check_mask(record(), png(mask)))
    mode, found = pixels_of(masked)
    expected = (depth.astype(np.float64) * (mask / 255)).astype(np.uint8)
    assert mode == "RGB"
    assert all(np.array_equal(found[..., channel], expected) for channel in range(3))
    assert found[mask == 0].max() == 0
    assert found[mask == 255].max() > 0


def test_a_one_pixel_image_works() -> None:
    one = np.full((1, 1), 255, np.uint8)
    small = record(1, 1)
    assert pixels_of(mask_depth(small, check_depth(small, png(one)), check_mask(small, png(one))))[
        1
    ].tolist() == [[[255] * 3]]


def test_masks_are_compared_whatever_their_mode(mask: Pixels) -> None:
    half = mask.copy()
    half[5:10] = 0
    for data in (png(half), png(half // 255), png(np.dstack([half] * 3))):
        assert mask_iou(png(mask), data, (WIDTH, HEIGHT)) == 0.5
    empty = png(np.zeros_like(mask))
    assert mask_iou(empty, empty, (WIDTH, HEIGHT)) == 1


@pytest.mark.parametrize(
    ("truth", "code"),
    [
        (png(np.zeros((HEIGHT, WIDTH + 1), np.uint8)), "image_size"),
        (png(np.zeros((HEIGHT, WIDTH), np.uint16)), "bad_image"),
        (b"", "bad_image"),
    ],
)
def test_masks_that_cannot_be_compared_say_why(mask: Pixels, truth: bytes, code: str) -> None:
    with pytest.raises(RecordError) as error:
        mask_iou(png(mask), truth, (WIDTH, HEIGHT))
    assert error.value.code == code


def segments(**changed: Any) -> bytes:
    """Two instances without a pixel, of which the second has changed fields."""
    whole = {
        "annotation_index": 0,
        "size": [HEIGHT, WIDTH],
        "counts": "cj0",  # 851 of background: all
        "area": 0,
        "predicted_iou": 0.5,
    }
    return json.dumps({"instances": [whole, {**whole, **changed}]}).encode()


@pytest.mark.parametrize(
    "data",
    [
        segments(size=[10**6, 10**6]),
        segments(size=[WIDTH, HEIGHT]),
        segments(size=[HEIGHT]),
        segments(size=None),
        segments(counts="PPPPPPPPPP9"),
        segments(counts="0"),
        segments(counts="~"),
        segments(counts=[5]),
        segments(area="1"),
        b"{}",
        b"[]",
        b"{",
        b"[" * 10**5,
        b'{"instances": [1]}',
    ],
)
def test_segments_that_do_not_fit_the_image_are_refused_before_they_are_decoded(data: bytes) -> None:
    pytest.importorskip("pycocotools", reason="the models extra is not installed")
    with pytest.raises(RecordError) as caught:
        union_mask(record(), data)
    assert caught.value.code == "bad_segments"


def test_the_union_of_run_lengths_has_the_image_s_size() -> None:
    rle = pytest.importorskip("pycocotools.mask", reason="the models extra is not installed")
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[3:9, 4:20] = 1
    counts = rle.encode(np.asfortranarray(pixels))["counts"].decode()
    mode, found = pixels_of(union_mask(record(), segments(counts=counts)))
    assert mode == "L"
    np.testing.assert_array_equal(found, pixels * 255)
