"""Conditions that are images of their own: masks, depth maps, and depth within the mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np

from spctrl.conditions.segments import parse_segments
from spctrl.data.annotations.areas import check_run_lengths
from spctrl.data.images import equal_channels, opened_image
from spctrl.data.records import RecordError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spctrl.data.records import Record


def check_mask(record: Record, data: bytes, *, empty: Literal["reject", "keep"] = "keep") -> bytes:
    """A precomputed mask as an 8-bit single-channel PNG of 0 and 255.

    Args:
        record: the image's.
        data: the mask's file.
        empty: what to do with a mask in which no pixel is set.

    Raises:
        RecordError: not an image (``bad_image``), of another size (``image_size``), with other values (``bad_mask``),
            or without a pixel that is set (``empty_mask``) unless such masks are kept.
    """
    mask = _decode_gray(record.size_wh, data, "mask")
    values = np.flatnonzero(np.bincount(mask.reshape(-1), minlength=256))
    if not np.isin(values, (0, 255)).all():
        raise RecordError(
            "bad_mask",
            f"expected a mask of 0 and 255 only, found {len(values)} values from 0 to {values[-1]}",
        )
    if empty == "reject" and not mask.any():
        raise RecordError(
            "empty_mask", "expected a mask with foreground, found none; [mask] empty = keep takes it over"
        )
    return encode_png(mask)


def check_depth(record: Record, data: bytes) -> bytes:
    """A precomputed depth map (near is bright) as an 8-bit PNG of three equal channels.

    Raises:
        RecordError: not an image (``bad_image``) or of another size (``image_size``).
    """
    return encode_png(cv2.merge([_decode_gray(record.size_wh, data, "depth map")] * 3))


def mask_depth(record: Record, depth_png: bytes, mask_png: bytes) -> bytes:
    """Depth x mask / 255 per pixel: an 8-bit RGB PNG that is 0 outside the mask."""
    depth = _decode_gray(record.size_wh, depth_png, "depth map")
    mask = _decode_gray(record.size_wh, mask_png, "mask")
    return encode_png(cv2.merge([np.where(mask == 255, depth, np.uint8(0))] * 3))


def union_mask(record: Record, segments_json: bytes) -> bytes:
    """The pixels of any instance: an 8-bit single-channel PNG of 0 and 255, of the image's size.

    Args:
        record: the image's.
        segments_json: of the stage ``segments``: COCO run lengths of each instance.

    Raises:
        RecordError: it is something else, or of an image of another size (``bad_segments``).
    """
    from pycocotools import mask as rle  # of the models extra

    try:
        instances = parse_segments(segments_json)
        for instance in instances:  # before decoding: sizes and lengths decide how much memory is written
            check_run_lengths(instance, record.size_wh)
    except ValueError as error:
        raise RecordError("bad_segments", f"expected segments of the image, found {error}") from error
    width, height = record.size_wh
    if not instances:
        return encode_png(np.zeros((height, width), np.uint8))
    union = rle.decode(rle.merge([{"size": each["size"], "counts": each["counts"]} for each in instances]))
    return encode_png(np.ascontiguousarray(union) * np.uint8(255))


def mask_iou(mask_png: bytes, truth_png: bytes, size_wh: tuple[int, int]) -> float:
    """Intersection over union of two masks, 0 to 1; two empty masks agree.

    Args:
        mask_png, truth_png: image files with equal channels; what is not 0 is foreground.
        size_wh: width and height in pixels that both must have.

    Raises:
        RecordError: one is not an image (``bad_image``) or of another size (``image_size``).
    """
    mask, truth = (_decode_gray(size_wh, data, "mask") > 0 for data in (mask_png, truth_png))
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def encode_png(pixels: cv2.typing.MatLike) -> bytes:
    """(H, W) or (H, W, 3) uint8 as a PNG file."""
    done, data = cv2.imencode(".png", pixels)
    if not done:
        raise ValueError(f"cannot encode an array of shape {pixels.shape} and type {pixels.dtype} as PNG")
    return data.tobytes()


def _decode_gray(size_wh: tuple[int, int], data: bytes, what: str) -> NDArray[np.uint8]:
    """(H, W) uint8 of an 8-bit image whose channels are equal."""
    with opened_image(data, size_wh) as image:
        return equal_channels(image, f"a {what}")
