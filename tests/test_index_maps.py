"""Index maps of others' files: which images are taken for one, which are refused, and how they are resized."""

from __future__ import annotations

import itertools
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tagged_images import exif, saved

from spctrl.conditions.index_maps import index_map_of_image, read_index_map, resize_index_map
from spctrl.data.images import equal_channels
from spctrl.data.records import RecordError
from spctrl.inference.methods import MapResize

SIZE_WH = (40, 24)


def a_map() -> NDArray[np.uint8]:
    pixels = np.zeros(SIZE_WH[::-1], np.uint8)
    pixels[3:9, 5:20], pixels[10:14, 6:9], pixels[20, 30] = 51, 17, 69
    return pixels


def palette_image(pixels: NDArray[np.uint8], colours: Any) -> Image.Image:
    image = Image.fromarray(pixels)
    image.putpalette([channel for value in range(256) for channel in colours(value)])
    return image


def with_alpha(alpha: NDArray[np.uint8] | int) -> Image.Image:
    image = Image.fromarray(a_map()).convert("RGBA")
    image.putalpha(Image.fromarray(np.broadcast_to(np.uint8(alpha), SIZE_WH[::-1]).copy()))
    return image


GREY = Image.fromarray(a_map())
SAME: dict[str, bytes] = {
    "L": saved(GREY, "PNG"),
    "LA": saved(GREY.convert("LA"), "PNG"),
    "RGB": saved(GREY.convert("RGB"), "PNG"),
    "RGBA": saved(with_alpha(255), "PNG"),
    "RGBA, transparent background": saved(with_alpha((a_map() > 0) * np.uint8(255)), "PNG"),
    "L, transparent background": saved(GREY, "PNG", transparency=0),
    "palette of all greys": saved(palette_image(a_map(), lambda value: (value,) * 3), "PNG"),
    "palette of the values in use, in another order": saved(GREY.convert("RGB").quantize(16), "PNG"),
    "palette whose greys are reversed": saved(palette_image(255 - a_map(), lambda i: (255 - i,) * 3), "PNG"),
    "GIF": saved(GREY, "GIF"),
    "16 bits": saved(Image.fromarray(a_map().astype(np.uint16)), "PNG"),
    "16 bits, TIFF": saved(Image.fromarray(a_map().astype(np.uint16)), "TIFF"),
    "32 bits": saved(Image.fromarray(a_map().astype(np.int32)), "TIFF"),
    "real numbers": saved(Image.fromarray(a_map().astype(np.float32)), "TIFF"),
    "RGB, TIFF": saved(GREY.convert("RGB"), "TIFF", compression="tiff_lzw"),
    "CMYK": saved(GREY.convert("RGB").convert("CMYK"), "TIFF"),
    "BMP": saved(GREY.convert("RGB"), "BMP"),
    "WebP": saved(GREY.convert("RGB"), "WEBP", lossless=True),
    "an orientation tag": saved(GREY.convert("RGB"), "PNG", exif=b"Exif\0\0" + exif(6)),
}


LOSSY = {
    "JPEG": saved(GREY, "JPEG", quality=100),
    "WebP": saved(GREY.convert("RGB"), "WEBP", quality=100),
    "WebP with alpha": saved(with_alpha(255), "WEBP", quality=100, exif=b"Exif\0\0" + exif(1)),
    "JPEG in TIFF": saved(GREY, "TIFF", compression="jpeg"),
}


@pytest.mark.parametrize("data", LOSSY.values(), ids=LOSSY)
def test_an_index_map_with_lossy_compression_is_refused_whatever_its_values(data: bytes) -> None:
    with pytest.raises(RecordError, match=r"lossless format, found .* Save the map as PNG"):
        read_index_map(data)


@pytest.mark.parametrize("data", SAME.values(), ids=SAME)
def test_an_index_map_is_read_from_any_mode_whose_channels_are_equal(data: bytes) -> None:
    found = read_index_map(data)
    assert found.dtype == np.uint8
    assert np.array_equal(found, a_map())


def changed(pixels: NDArray[Any], x: int, y: int, value: Any) -> NDArray[Any]:
    pixels = pixels.copy()
    pixels[y, x] = value
    return pixels


COLOURS = changed(np.stack([a_map()] * 3, -1), 7, 4, (51, 50, 51))
REFUSED: dict[str, tuple[bytes, str]] = {
    "RGB": (saved(Image.fromarray(COLOURS), "PNG"), "mode RGB: (51, 50, 51) at x = 7, y = 4"),
    "the last pixel": (
        saved(Image.fromarray(changed(COLOURS * 0, 39, 23, (0, 0, 1))), "PNG"),
        "(0, 0, 1) at x = 39, y = 23",
    ),
    "a palette that colours indices": (
        saved(palette_image(a_map(), lambda value: (value, value // 2, 0)), "PNG"),
        "mode P: (51, 25, 0) at x = 5, y = 3. Save the palette's indices as mode L",
    ),
    "a label that is not opaque": (
        saved(with_alpha(changed(a_map() * 0 + 255, 7, 4, 128)), "PNG"),
        "alpha below 255 at x = 7, y = 4",
    ),
    "a transparent label": (saved(GREY, "PNG", transparency=17), "alpha below 255 at x = 6, y = 10"),
    "values of no keypoint": (
        saved(Image.fromarray(changed(a_map(), 1, 2, 18)), "PNG"),
        "found 18. Is it another kind of condition? The first is at x = 1, y = 2",
    ),
    "one bit": (saved(Image.new("1", SIZE_WH, 1), "PNG"), "found 255. Is it another"),
    "16 bits": (
        saved(Image.fromarray(changed(a_map().astype(np.uint16), 3, 1, 51 * 257)), "PNG"),
        "found 13107 at x = 3, y = 1",
    ),
    "negative": (saved(Image.fromarray(changed(a_map().astype(np.int32), 3, 1, -1)), "TIFF"), "found -1 at"),
    "a fraction": (
        saved(Image.fromarray(changed(a_map().astype(np.float32), 3, 1, 1.5)), "TIFF"),
        "found 1.5 at x = 3",
    ),
    "no number": (saved(Image.fromarray(changed(a_map().astype(np.float32), 3, 1, np.nan)), "TIFF"), "found nan"),
    "RGB of 16 bits": (
        cv2.imencode(".png", np.stack([a_map().astype(np.uint16)] * 3, -1))[1].tobytes(),
        "found mode RGB of 16, of which Pillow reads the upper 8",
    ),
    "no image": (b"P5 1 1 255 0", "expected an image"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_index_map_is_refused_at_its_first_pixel(data: bytes, message: str) -> None:
    with pytest.raises(RecordError) as caught:
        read_index_map(data)
    assert caught.value.code == "bad_image"
    assert message in caught.value.message


def test_a_map_of_another_size_is_refused() -> None:
    assert read_index_map(SAME["RGB"], SIZE_WH).shape == SIZE_WH[::-1]
    with pytest.raises(RecordError, match="image_size"):
        read_index_map(SAME["RGB"], SIZE_WH[::-1])


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "I", "F"])
def test_images_in_memory_are_read_alike(mode: str) -> None:
    assert np.array_equal(index_map_of_image(GREY.convert(mode)), a_map())


def test_other_conditions_of_one_channel_may_have_any_value() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    for mode in ("L", "RGB", "LA", "RGBA", "I"):
        assert np.array_equal(equal_channels(Image.fromarray(levels).convert(mode), "a mask"), levels)


# Resizing


@pytest.mark.parametrize(
    ("how", "side", "resolution", "expected"),
    [
        ("floor", 5, 3, [0, 1, 3]),
        ("centre", 5, 3, [0, 2, 4]),
        ("floor", 3, 5, [0, 0, 1, 1, 2]),
        ("centre", 3, 5, [0, 0, 1, 2, 2]),
        ("floor", 7, 4, [0, 1, 3, 5]),
        ("centre", 7, 4, [0, 2, 4, 6]),
        ("floor", 3, 8, [0, 0, 0, 1, 1, 1, 2, 2]),
        ("centre", 3, 8, [0, 0, 0, 1, 1, 2, 2, 2]),
        ("floor", 6, 6, [0, 1, 2, 3, 4, 5]),
        ("centre", 6, 6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_resized_maps_have_the_pixels_that_were_worked_out_by_hand(
    how: MapResize, side: int, resolution: int, expected: list[int]
) -> None:
    rows, columns = np.mgrid[:side, :side].astype(np.uint8)
    places = np.array(expected)
    across = resize_index_map(columns, resolution, how)
    down = resize_index_map(rows, resolution, how)
    assert across.dtype == np.uint8
    assert np.array_equal(across, np.tile(places, (resolution, 1)))
    assert np.array_equal(down, across.T)


@pytest.mark.parametrize(("how", "mode"), [("floor", "nearest"), ("centre", "nearest-exact")])
def test_resized_maps_equal_torch_s_at_odd_sizes(how: MapResize, mode: str) -> None:
    torch = pytest.importorskip("torch", reason="the models extra is not installed")
    rng = np.random.default_rng(0)
    for height, width, resolution in itertools.product((31, 63, 97, 129), (45, 101), (24, 64, 136)):
        pixels = rng.integers(0, 70, (height, width), np.uint8)
        as_released = torch.nn.functional.interpolate(
            torch.from_numpy(pixels)[None, None].float(), (resolution, resolution), mode=mode
        )
        assert np.array_equal(resize_index_map(pixels, resolution, how), as_released[0, 0].numpy())
