"""Instance masks by SAM and SAM-HQ: a mask for each annotated instance, from its box or its labelled keypoints.

The released way encodes an image again for each of its instances. Here the images of a batch go through the image
encoder together and once, and all their prompts through the mask decoder together. Networks, preprocessing and
postprocessing are those of the packages segment-anything and segment-anything-hq.

Legend: B images, P prompts, C channels of a prompt (256), h and w cells of an embedded image (64), H and W pixels of
an image. A mask comes out of the decoder as (4h, 4w) logits.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from pycocotools import mask as rle

from spctrl.data.images import open_rgb
from spctrl.data.records import RecordError
from spctrl.image_models.base import choose_device, mixed_precision
from spctrl.image_models.sam_networks import PACKAGES, PATCH_PX, Backend, ModelType, load_network

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from spctrl.data.records import Record

PROMPTS_PER_PASS = 16
"""At the released size a prompt takes about 100 MB in the mask decoder."""
PROCESSOR_PASS_PX = 512 * 512
"""Most pixels in a pass of several images on a processor: what does not fit its caches is slower, not faster."""


class Prompt(NamedTuple):
    """Where an instance is, in pixels of the resized image.

    Attributes:
        is_box: two corners, upper left and lower right, or else points on the instance.
        xy: (n, 2) float64.
    """

    is_box: bool
    xy: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image resized to the network's longest side, (3, height, width) uint8, its own width and height, and a prompt
    for each instance."""

    pixels: torch.Tensor
    size_wh: tuple[int, int]
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Segments:
    """One image's instances.

    Attributes:
        runs: of each mask, in the image's own size: lengths of its runs in column order, of zeros first, int64.
        predicted_iou: (P,) float32.
        is_finite: whether all the network's numbers were.
    """

    runs: tuple[NDArray[np.int64], ...]
    predicted_iou: NDArray[np.float32]
    is_finite: bool


class _Predictions(NamedTuple):
    """The network's outputs for one image, on the device: (P, 4h, 4w) float32 logits and (P,) float32 predicted IoU."""

    logits: torch.Tensor
    predicted_iou: torch.Tensor


class _Features(NamedTuple):
    """Images as the mask decoder sees them, float32: (B, C, h, w), and SAM-HQ's finer (B, C / 8, 4h, 4w)."""

    embedding: torch.Tensor
    hq: torch.Tensor | None


class Segmenter:
    """Makes an image's instance masks: see ``ImageModel`` and ``load_segmenter``."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        backend: Backend,
        prompt: Literal["box", "points"],
        device: torch.device,
        empty: Literal["reject", "keep"],
    ) -> None:
        self.model = model.to(device)
        self.backend = backend
        self.prompt = prompt
        self.device = device
        self.empty = empty
        self._resize = PACKAGES[backend].utils.transforms.ResizeLongestSide(model.image_encoder.img_size)
        with torch.inference_mode():
            self._position = model.prompt_encoder.get_dense_pe()  # (1, C, h, w)

    def decode(self, record: Record, data: bytes) -> Decoded:
        """The resized image and its prompts.

        Raises:
            RecordError: the file is no image (``bad_image``), its size is not the annotated one or leaves nothing of
                the short side when resized (``image_size``), a box is outside the image (``bad_box``).
        """
        prompts = self._prompts(record)
        rgb = np.asarray(open_rgb(record, data))
        small_hw = self._resize.get_preprocess_shape(*rgb.shape[:2], self._resize.target_length)
        if 0 in small_hw:
            raise RecordError(
                "image_size",
                f"expected sides that are a pixel or more when the longer one is {max(small_hw)}, "
                f"found {record.size_wh[0]} x {record.size_wh[1]} pixels",
            )
        pixels = self._resize.apply_image(rgb)
        return Decoded(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), record.size_wh, prompts)

    def _prompts(self, record: Record) -> tuple[Prompt, ...]:
        """Prompts as ``SamPredictor`` would take them: boxes are not cut at the image's border."""
        width, height = record.size_wh
        prompts = []
        for index, (keypoints, (x, y, w, h)) in enumerate(
            zip(record.keypoints, record.bboxes_xywh.tolist(), strict=True)
        ):
            xy = keypoints[keypoints[:, 2] > 0, :2]
            is_box = self.prompt == "box" or len(xy) == 0
            if is_box:
                # Written so that NaN is outside.
                if not (x < width and y < height and x + w > 0 and y + h > 0):
                    raise RecordError(
                        "bad_box",
                        f"expected a box in the image of {width} x {height} pixels for instance {index}, "
                        f"found x, y, width, height = {x:g}, {y:g}, {w:g}, {h:g}",
                    )
                xy = np.array([[x, y], [x + w, y + h]])
            prompts.append(Prompt(is_box, self._resize.apply_coords(xy, (height, width))))
        return tuple(prompts)

    def batch_key(self, decoded: Decoded) -> None:
        """Any images share a batch: they are padded to squares."""

    @torch.inference_mode()
    def infer(self, batch: Sequence[Decoded]) -> list[Segments]:
        """Masks of all instances of all images; an image without instances costs nothing.

        Masks are enlarged and coded where the network is: a CPU core takes 14 ms to enlarge one to 1024 x 768 pixels.
        """
        return [
            Segments(
                runs=tuple(self._runs(image, logits) for logits in found.logits),
                predicted_iou=found.predicted_iou.cpu().numpy(),
                is_finite=bool(found.logits.isfinite().all() & found.predicted_iou.isfinite().all()),
            )
            for image, found in zip(batch, self.predict(batch), strict=True)
        ]

    def _runs(self, image: Decoded, logits: torch.Tensor) -> NDArray[np.int64]:
        """Runs of one instance's mask in the image's own size; at 12,000 x 9,000 pixels that takes about 0.8 GB."""
        full = self.model.postprocess_masks(logits[None, None], image.pixels.shape[1:], image.size_wh[::-1])
        return run_lengths(full[0, 0] > self.model.mask_threshold)

    @torch.inference_mode()
    def predict(self, batch: Sequence[Decoded]) -> list[_Predictions]:
        """Logits and predicted IoU of all instances of all images."""
        prompted = [image for image in batch if image.prompts]
        prompts = [(place, prompt) for place, image in enumerate(prompted) for prompt in image.prompts]
        side = 4 * self.model.image_encoder.img_size // PATCH_PX
        logits = torch.empty(len(prompts), side, side, device=self.device)
        ious = torch.empty(len(prompts), device=self.device)
        if prompts:
            features = self._encode_images([image.pixels for image in prompted])
            for chunk in _chunks([prompt for _, prompt in prompts]):
                owners = torch.tensor([prompts[i][0] for i in chunk], device=self.device)
                of_chunk = self._decode_prompts(features, owners, [prompts[i][1] for i in chunk])
                logits[chunk], ious[chunk] = of_chunk
        counts = [len(image.prompts) for image in batch]
        return [_Predictions(*each) for each in zip(logits.split(counts), ious.split(counts), strict=True)]

    def _encode_images(self, images: Sequence[torch.Tensor]) -> _Features:
        """All images in one pass, or on a processor in as few as are of use."""
        size = len(images)
        if self.device.type == "cpu":
            size = max(PROCESSOR_PASS_PX // self.model.image_encoder.img_size**2, 1)
        passes = [self._encode_pass(images[start : start + size]) for start in range(0, len(images), size)]
        embeddings, hqs = zip(*passes, strict=True)
        return _Features(torch.cat(embeddings), None if hqs[0] is None else torch.cat(hqs))

    def _encode_pass(self, images: Sequence[torch.Tensor]) -> _Features:
        squares = torch.stack([self.model.preprocess(image.to(self.device)) for image in images])
        decoder = self.model.mask_decoder
        with mixed_precision(self.device):
            if self.backend == "sam":
                return _Features(self.model.image_encoder(squares).float(), None)
            embedding, early = self.model.image_encoder(squares)
            # The first block of global attention still has the detail that the last one has lost.
            hq = decoder.embedding_encoder(embedding) + decoder.compress_vit_feat(
                early[0].permute(0, 3, 1, 2)
            )
        return _Features(embedding.float(), hq.float())

    def _decode_prompts(
        self, features: _Features, owners: torch.Tensor, prompts: Sequence[Prompt]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (P, 4h, 4w) and IoU (P,) of prompts of one shape; ``owners`` (P,) says whose image each is of.

        As the packages' ``MaskDecoder`` does for one image (single mask, and for SAM-HQ the sum of both tokens'
        masks), with an image for each prompt. In float32: the decoder is a small part of the work, and half
        precision would blur the prompts' coordinates.
        """
        decoder = self.model.mask_decoder
        sparse, dense = self._embed_prompts(prompts)
        own = [decoder.iou_token.weight, decoder.mask_tokens.weight]
        if features.hq is not None:
            own.append(decoder.hf_token.weight)
        tokens = torch.cat([torch.cat(own).expand(len(prompts), -1, -1), sparse], dim=1)
        images = features.embedding[owners] + dense
        tokens, cells = decoder.transformer(images, self._position.expand_as(images), tokens)
        fine = decoder.output_upscaling(cells.transpose(1, 2).reshape(images.shape))
        logits = _dot(decoder.output_hypernetworks_mlps[0](tokens[:, 1]), fine)
        if features.hq is not None:
            fine = decoder.embedding_maskfeature(fine) + features.hq[owners]
            logits += _dot(decoder.hf_mlp(tokens[:, 1 + len(decoder.mask_tokens.weight)]), fine)
        return logits, decoder.iou_prediction_head(tokens[:, 0])[:, 0]

    def _embed_prompts(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        xy = torch.from_numpy(np.stack([prompt.xy for prompt in prompts])).to(self.device, torch.float32)
        if prompts[0].is_box:
            embedded = self.model.prompt_encoder(points=None, boxes=xy.flatten(1), masks=None)
        else:
            labels = torch.ones(xy.shape[:2], dtype=torch.int32, device=self.device)
            embedded = self.model.prompt_encoder(points=(xy, labels), boxes=None, masks=None)
        sparse, dense = embedded
        return sparse, dense

    def encode(self, record: Record, decoded: Decoded, output: Segments) -> bytes:
        """JSON with ``instances``, one for each of the record's, in order: ``annotation_index``, the mask in COCO's
        compressed run-length encoding (``size`` H, W and ``counts``), its ``area`` in pixels and ``predicted_iou``.

        Raises:
            RecordError: a value that is not finite (``not_finite``), no pixel in any mask (``empty_mask``) unless
                such images are kept.
        """
        if not output.is_finite:
            raise RecordError(
                "not_finite", "expected finite numbers from the segmenter, found NaN or infinity"
            )
        width, height = record.size_wh
        instances: list[dict[str, Any]] = []
        for runs, iou in zip(output.runs, output.predicted_iou.tolist(), strict=True):
            coded = rle.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
            instances.append(
                {
                    "annotation_index": len(instances),
                    "size": coded["size"],
                    "counts": coded["counts"].decode("ascii"),
                    "area": int(runs[1::2].sum()),
                    "predicted_iou": iou,
                }
            )
        if self.empty == "reject" and not any(instance["area"] for instance in instances):
            raise RecordError(
                "empty_mask", f"expected a mask, found no pixel for any of {len(instances)} instances"
            )
        return json.dumps({"instances": instances}).encode()


def load_segmenter(
    *,
    backend: Backend,
    model_type: ModelType,
    weights: str | Path,
    prompt: Literal["box", "points"],
    device: str = "auto",
    empty: Literal["reject", "keep"] = "reject",
) -> Segmenter:
    """A segmenter from a released checkpoint, or from one of ``build_tiny``.

    Args:
        backend: the package.
        model_type: the size; ``vit_tiny`` is SAM-HQ's only.
        weights: a state dict (.pth). Sizes are the released ones unless ``<weights>.json`` gives others.
        prompt: what points at an instance; with ``points``, its box where no keypoint is labelled.
        device: ``auto``, ``cpu`` or ``cuda:N``.
        empty: what to do with images in whose mask no pixel is set.

    Raises:
        ExpectedError: no such model, or weights that are missing, damaged or another model's.
        ValueError: there is no such device.
    """
    on = choose_device(device)
    network = load_network(backend, model_type, Path(weights))
    return Segmenter(network, backend=backend, prompt=prompt, device=on, empty=empty)


def _chunks(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Positions of prompts that can be decoded together: of one kind and number of points, which padding would
    change, and no more than memory allows."""
    groups: dict[tuple[bool, int], list[int]] = defaultdict(list)
    for position, prompt in enumerate(prompts):
        groups[prompt.is_box, len(prompt.xy)].append(position)
    return [
        group[start : start + PROMPTS_PER_PASS]
        for group in groups.values()
        for start in range(0, len(group), PROMPTS_PER_PASS)
    ]


def run_lengths(mask: torch.Tensor) -> NDArray[np.int64]:
    """Lengths of the runs of a (H, W) bool mask in column order, of zeros first, as COCO's encoding counts them."""
    pixels = mask.T.flatten()
    changes = (pixels[1:] != pixels[:-1]).nonzero()[:, 0] + 1
    start = changes.new_zeros(1 + int(pixels[0]))
    ends = torch.cat([start, changes, changes.new_tensor([len(pixels)])])
    lengths: NDArray[np.int64] = ends.diff().cpu().numpy()
    return lengths


def _dot(weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """(P, c) times (P, c, y, x), summed over c."""
    return (weights[:, None] @ features.flatten(2)).reshape(-1, *features.shape[2:])
