"""Keypoints of annotated instances by ViTPose, batched over all instances of many images.

REFERENCE section 12. Images are decoded and cropped in threads, ahead of the network, whose batches run across
images; an image and its mirror image go through in one pass.

Legend: N instances of all images together, K keypoints (17), H, W the network's input (256, 192), h, w a heatmap
(64, 48).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from eval.images import in_batches, read_rgb
from eval.vitpose.checkpoints import EXPERTS, PoseWeightsError, load_vitpose
from eval.vitpose.crops import (
    Codec,
    boxes_to_regions,
    cells_to_image,
    crop,
    scale_boxes,
)
from spctrl.data.boxes import clip_boxes
from spctrl.data.records import NUM_KEYPOINTS
from spctrl.data.skeletons import AP10K, HUMANART, Skeleton
from spctrl.errors import ExpectedError
from spctrl.image_models.base import choose_device, infer_halving

if TYPE_CHECKING:
    import torch
    from numpy.typing import ArrayLike, NDArray
    from PIL import Image

    ImageLike = Path | str | NDArray[np.uint8] | Image.Image

HEATMAP_WH = (48, 64)
BATCH_SIZES = {"cuda": 64, "cpu": 4}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of RGB in [0, 1]."""


class PoseInputError(ExpectedError):
    """Boxes that cannot be used; says of which image."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a network has to be used, which is how it was trained and is evaluated.

    Attributes:
        skeleton: for the pairs that a mirror image exchanges.
        expert: of ViTPose+ files with several.
        codec: the crop and the decoding: ``msra`` (affine crop, a quarter of a cell towards the second maximum) or
            ``udp`` (unbiased crop, DARK).
        flip_test: mean over the image and its mirror image.
        shift_heatmap: move the mirrored-back heatmap by one cell.
    """

    skeleton: Skeleton
    expert: int
    codec: Codec
    flip_test: bool = True
    shift_heatmap: bool = False


PROTOCOLS = {
    "ap10k": Protocol(skeleton=AP10K, expert=EXPERTS["ap10k"], codec="msra", shift_heatmap=True),
    "humanart": Protocol(skeleton=HUMANART, expert=EXPERTS["coco"], codec="udp"),
}
"""The paper's evaluation, by dataset."""


def choose_protocol(
    dataset: str,
    codec: str | None = None,
    flip_test: bool | None = None,
    shift_heatmap: bool | None = None,
    expert: int | None = None,
) -> Protocol:
    """A dataset's protocol, with other settings where they are given.

    Raises:
        ValueError: an unknown dataset or codec.
    """
    if dataset not in PROTOCOLS:
        raise ValueError(f"expected a dataset among {', '.join(PROTOCOLS)}, found {dataset!r}")
    if codec not in (None, "msra", "udp"):
        raise ValueError(f"expected a codec among msra, udp, found {codec!r}")
    given: dict[str, Any] = {
        "codec": codec,
        "flip_test": flip_test,
        "shift_heatmap": shift_heatmap,
        "expert": expert,
    }
    return replace(PROTOCOLS[dataset], **{name: value for name, value in given.items() if value is not None})


class PoseEstimates(NamedTuple):
    """Estimated poses, image by image and box by box in the order given.

    Attributes:
        keypoints: (N, K, 2) float64, pixels.
        scores: (N, K) float32, the heatmaps' maxima; not bounded, though trained networks stay within about [0, 1].
        heatmaps: (N, K, h, w) float32, after the flip test; None where they were not to be kept.
    """

    keypoints: NDArray[np.float64]
    scores: NDArray[np.float32]
    heatmaps: NDArray[np.float32] | None


def flip_indices(skeleton: Skeleton) -> list[int]:
    """Which keypoint each one is in the mirror image, (K,)."""
    indices = list(range(skeleton.num_keypoints))
    for left, right in skeleton.flip_pairs:
        indices[left], indices[right] = right, left
    return indices


def normalised(crops: Sequence[NDArray[np.uint8]], device: torch.device) -> torch.Tensor:
    """(B, 3, H, W) float32, by ImageNet's mean and deviation, of (H, W, 3) uint8 RGB crops."""
    import torch

    levels = torch.from_numpy(np.stack(crops)).to(device).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(each, device=device).view(3, 1, 1) * 255 for each in (MEAN, STD))
    return ((levels - mean) / std).contiguous(memory_format=torch.channels_last)


class PoseEstimator:
    """ViTPose with everything around it."""

    def __init__(
        self,
        model: Any,
        protocol: Protocol,
        *,
        device: torch.device,
        batch_size: int | None = None,
        half: bool = False,
    ) -> None:
        """See ``from_weights``."""
        import torch

        # Transposed convolutions, half of a ViTPose's time on a processor, are a quarter faster this way.
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.protocol = protocol
        self.device = device
        self.batch_size = batch_size or BATCH_SIZES[device.type]
        self.half = half
        self._flip_indices = flip_indices(protocol.skeleton)

    @classmethod
    def from_weights(
        cls,
        path: Path | str,
        dataset: str = "ap10k",
        *,
        codec: str | None = None,
        flip_test: bool | None = None,
        shift_heatmap: bool | None = None,
        expert: int | None = None,
        device: str = "auto",
        batch_size: int | None = None,
        half: bool = False,
    ) -> PoseEstimator:
        """An estimator with weights of any of the three kinds of ``eval.vitpose.checkpoints``.

        Args:
            path: the folder or checkpoint file.
            dataset: whose keypoints the network knows, and whose protocol it is used by (``PROTOCOLS``).
            codec, flip_test, shift_heatmap, expert: instead of the protocol's.
            device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda:N``.
            batch_size: instances in one pass; halved by itself where they do not fit. Usually 64, on a processor 4,
                whose cache larger batches leave.
            half: compute in half precision (float16 on a GPU, bfloat16 on a CPU), faster where the hardware has it (6
                times on an H200), with heatmaps that are off by up to a few hundredths.

        Raises:
            ExpectedError: the weights cannot be used (see ``load_vitpose``), or have not 17 keypoints.
            ValueError: an unknown dataset, codec or device.
        """
        protocol = choose_protocol(dataset, codec, flip_test, shift_heatmap, expert)
        model, _ = load_vitpose(Path(path), expert=protocol.expert)
        if model.config.num_labels != NUM_KEYPOINTS:
            raise PoseWeightsError(
                f"{path}: expected {NUM_KEYPOINTS} keypoints as {dataset} has, found {model.config.num_labels}"
            )
        return cls(model, protocol, device=choose_device(device), batch_size=batch_size, half=half)

    def predict(
        self,
        images: Iterable[ImageLike],
        bboxes_xywh: Iterable[ArrayLike],
        *,
        annotated_wh: Iterable[tuple[int, int]] | None = None,
        keep_heatmaps: bool = True,
    ) -> PoseEstimates:
        """Poses of all boxes of all images.

        Args:
            images: paths, (height, width, 3) uint8 RGB arrays or PIL images. An orientation tag turns nothing.
            bboxes_xywh: for each image its (n, 4) boxes in pixels (n may be 0), or the four numbers of its only one.
            annotated_wh: where the boxes are of images of these sizes and ``images`` are their generated counterparts:
                boxes are clipped to the annotated image (as mmpose does), mapped to the image's own size, and the
                keypoints mapped back to the annotated image's pixels.
            keep_heatmaps: give them too; 10,000 instances take 2 GB.

        Raises:
            ImageError: an image is missing, broken or not RGB.
            PoseInputError: a box is not finite or has no area, or the arguments differ in length or are not sequences.
        """
        crops = self._crops(rows_of_images(images, bboxes_xywh, annotated_wh))
        found: list[PoseEstimates] = []
        while batch := list(itertools.islice(crops, self.batch_size)):
            found.append(self._poses(batch, keep_heatmaps))
        w, h = HEATMAP_WH
        none = np.empty((0, NUM_KEYPOINTS), np.float32)
        heatmaps = [each.heatmaps for each in found if each.heatmaps is not None]
        return PoseEstimates(
            np.concatenate([np.empty((0, NUM_KEYPOINTS, 2)), *(each.keypoints for each in found)]),
            np.concatenate([none, *(each.scores for each in found)]),
            np.concatenate([np.empty((0, NUM_KEYPOINTS, h, w), np.float32), *heatmaps])
            if keep_heatmaps
            else None,
        )

    def infer(self, batch: Sequence[NDArray[np.uint8]]) -> list[tuple[torch.Tensor, ...]]:
        """For each (H, W, 3) uint8 RGB crop its keypoints (K, 2) in cells, scores (K,) and heatmaps (K, h, w).

        Raises:
            PoseWeightsError: the network's output is not finite.
        """
        import torch

        from eval.vitpose.decoding import decode

        with torch.inference_mode():
            heatmaps = self._heatmaps(batch)
            if not heatmaps.isfinite().all():
                raise PoseWeightsError(
                    "expected finite heatmaps, found others: the weights are broken"
                    + (", or too large for half precision: use half=False" if self.half else "")
                )
            keypoints, scores = decode(heatmaps, self.protocol.codec)
        return list(zip(keypoints, scores, heatmaps, strict=True))

    def _heatmaps(self, crops: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """(B, K, h, w) float32; an image and its mirror image go through together."""
        import torch

        from eval.vitpose.decoding import merge_flipped

        flip_test = self.protocol.flip_test
        pixels = normalised(crops, self.device)
        half = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        with torch.autocast(self.device.type, dtype=half, enabled=self.half):
            heatmaps: torch.Tensor = self.model(
                torch.cat([pixels, pixels.flip(-1)]) if flip_test else pixels
            ).heatmaps
        if not flip_test:
            return heatmaps.float()
        straight, flipped = heatmaps.float().chunk(2)
        indices = torch.tensor(self._flip_indices, device=self.device)
        return merge_flipped(straight, flipped, indices, shift=self.protocol.shift_heatmap)

    def _poses(self, batch: Sequence[_Crop], keep_heatmaps: bool) -> PoseEstimates:
        import torch

        outputs = infer_halving(cast("Any", self), [each.pixels for each in batch])
        cells, scores, heatmaps = (torch.stack(each) for each in zip(*outputs, strict=True))
        keypoints = cells_to_image(
            cells.cpu().numpy(),
            np.stack([each.centre for each in batch]),
            np.stack([each.size for each in batch]),
            codec=self.protocol.codec,
            heatmap_wh=HEATMAP_WH,
        )
        factors = np.stack([each.to_annotated for each in batch])[:, None]
        return PoseEstimates(
            keypoints * factors, scores.cpu().numpy(), heatmaps.cpu().numpy() if keep_heatmaps else None
        )

    def _crops(self, rows: Iterable[Row]) -> Iterator[_Crop]:
        """All instances' crops in order, made ahead in threads."""

        def crops_of_image(row: Row) -> list[_Crop]:
            return _crops_of_image(row, self.protocol.codec)

        with_boxes = (row for row in rows if len(row.boxes))
        batches = in_batches(with_boxes, crops_of_image, self.batch_size)
        return itertools.chain.from_iterable(itertools.chain.from_iterable(batches))


@dataclass(frozen=True, slots=True)
class _Crop:
    """An instance on its way to the network: input pixels (H, W, 3), where they are in the image, and how many of the
    annotated image's pixels one of its pixels is (2,)."""

    pixels: NDArray[np.uint8]
    centre: NDArray[np.float32]
    size: NDArray[np.float32]
    to_annotated: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Row:
    """An image, its boxes (n, 4), and the size of the image that they were annotated in, where it is another one."""

    image: ImageLike
    boxes: NDArray[np.float64]
    annotated_wh: tuple[int, int] | None


def _crops_of_image(row: Row, codec: Codec) -> list[_Crop]:
    pixels = read_rgb(row.image)
    own_wh = (pixels.shape[1], pixels.shape[0])
    annotated_wh = row.annotated_wh or own_wh
    boxes = row.boxes
    if row.annotated_wh is not None:
        boxes = scale_boxes(clip_boxes(boxes, annotated_wh, smallest_px=1), annotated_wh, own_wh)
    to_annotated = np.divide(annotated_wh, own_wh)
    return [
        _Crop(crop(pixels, centre, size, codec=codec), centre, size, to_annotated)
        for centre, size in zip(*boxes_to_regions(boxes), strict=True)
    ]


_NOTHING = object()


def rows_of_images(
    images: Iterable[ImageLike],
    bboxes_xywh: Iterable[ArrayLike],
    annotated_wh: Iterable[tuple[int, int]] | None,
) -> Iterator[Row]:
    """The arguments of ``predict`` image by image.

    Raises:
        PoseInputError: one of them ends before the others or is no sequence, or boxes are not boxes.
    """
    if not isinstance(images, Iterable) or isinstance(images, str):
        raise PoseInputError(
            f"expected images, each with its boxes, found a single {type(images).__name__}: put it into a list, "
            "and its boxes too"
        )
    columns: dict[str, Iterable[Any]] = {"images": images, "bboxes_xywh": bboxes_xywh}
    if annotated_wh is not None:
        columns["annotated_wh"] = annotated_wh
    for number, row in enumerate(itertools.zip_longest(*columns.values(), fillvalue=_NOTHING)):
        ended = [name for name, value in zip(columns, row, strict=True) if value is _NOTHING]
        if ended:
            raise PoseInputError(
                f"expected {', '.join(columns)} of one length, found only {number} in {ended[0]}"
            )
        image, boxes, size = (*row, None)[:3]
        yield Row(image, _checked_boxes(boxes, number), size)


def _checked_boxes(boxes: ArrayLike, number: int) -> NDArray[np.float64]:
    try:
        found = np.asarray(boxes, np.float64)
    except (TypeError, ValueError):
        found = np.array(np.nan)
    if not found.size or found.shape == (4,):
        found = found.reshape(-1, 4)
    if found.ndim != 2 or found.shape[1] != 4 or not np.isfinite(found).all() or (found[:, 2:] <= 0).any():
        raise PoseInputError(
            f"image {number}: expected boxes (n, 4) of x, y, width and height, finite and with an area, found {boxes!r}"
        )
    return found
