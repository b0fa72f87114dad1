"""Depth maps by ZoeDepth: near is bright.

REFERENCE section 5. The steps around the network are those of controlnet_aux's ``ZoeDetector`` (size, percentiles) and
of ZoeDepth's own inference (padding, mirror image), which transformers' ``ZoeDepthImageProcessor`` documents too.

Legend: B images of a batch, H and W of the resized image, h and w of the network's input and output.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image

from spctrl.conditions.masks import encode_png
from spctrl.data.images import open_rgb
from spctrl.data.records import RecordError
from spctrl.errors import ExpectedError
from spctrl.image_models.base import choose_device, mixed_precision
from spctrl.image_models.loading import WeightsFolder, load_strictly, mark_random
from spctrl.io.network_size import MAX_SIDE, read_config

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from spctrl.data.records import Record

SHORT_SIDE, SIDE_MULTIPLE = 512, 64
LONGEST_SIDE = 2048
"""Bound of the resized image's long side: attention's memory grows with the square of the area."""

NEAR_PERCENTILE, FAR_PERCENTILE = 2, 85
FLAT = 1e-5
"""Relative depth range below which there are only rounding errors of float32, the bicubic resize's among them."""

NETWORK_HW, NETWORK_MULTIPLE = (384, 512), 32
"""Size of the network's input that ZoeD_M12_N was trained at, and what its sides are rounded to."""

ZOEDEPTH = WeightsFolder(
    what="ZoeDepth trained on NYU Depth v2 (ZoeD_M12_N) in transformers' format",
    source="Intel/zoedepth-nyu on the Hugging Face hub",
    files="config.json, preprocessor_config.json and model.safetensors",
    setting="[depth] weights",
    kind=("model_type", "zoedepth"),
)


class DepthEstimator:
    """Depth maps of the images' own sizes. An ``ImageModel``.

    On a GPU the network runs in mixed precision (bfloat16), on a processor in float32.
    """

    def __init__(
        self,
        model: Any,
        *,
        device: torch.device,
        network_hw: tuple[int, int] = NETWORK_HW,
        network_multiple: int = NETWORK_MULTIPLE,
    ) -> None:
        self.model = model.to(device).eval()
        self.device = device
        self.network_hw = network_hw
        self.network_multiple = network_multiple

    def decode(self, record: Record, data: bytes) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB, in the size of ``resized_wh``.

        Raises:
            RecordError: ``bad_image`` or ``image_size``.
        """
        pixels = np.asarray(open_rgb(record, data))
        enlarged = min(record.size_wh) < SHORT_SIDE
        how = cv2.INTER_LANCZOS4 if enlarged else cv2.INTER_AREA
        return np.asarray(cv2.resize(pixels, resized_wh(record.size_wh), interpolation=how), np.uint8)

    def batch_key(self, decoded: NDArray[np.uint8]) -> tuple[int, ...]:
        """Images of one resized shape share a pass; on AP-10K there are 25 such shapes."""
        return decoded.shape

    def infer(self, batch: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        """For each image (H, W) float32 depth in metres: the mean over the image and its mirror image.

        The image is padded by reflection, since the network's depth is poor along borders, and resized for it; its
        output is resized back (bicubic) and the padding cropped. Image and mirror image go through in one pass.
        """
        import torch
        from torch.nn import functional as F

        height, width = batch[0].shape[:2]
        pad_h, pad_w = (int(math.sqrt(side / 2) * 3) for side in (height, width))
        padded_hw = (height + 2 * pad_h, width + 2 * pad_w)
        with torch.inference_mode():
            levels = torch.from_numpy(np.stack(batch)).to(self.device)
            images = levels.permute(0, 3, 1, 2).contiguous().float() / 255  # (B, 3, H, W)
            images = F.pad(images, (pad_w, pad_w, pad_h, pad_h), mode="reflect")
            images = F.interpolate(images, self._input_hw(padded_hw), mode="bilinear", align_corners=True)
            images = (images - 0.5) / 0.5
            with mixed_precision(self.device):
                outputs = self.model(torch.cat([images, images.flip(-1)])).predicted_depth  # (2B, h, w)
            straight, mirrored = outputs.float().chunk(2)
            depth = (straight + mirrored.flip(-1))[:, None] / 2
            depth = F.interpolate(depth, padded_hw, mode="bicubic", align_corners=False)
            cropped = depth[:, 0, pad_h : pad_h + height, pad_w : pad_w + width]
            return list(cropped.cpu().numpy())

    def encode(self, record: Record, decoded: NDArray[np.uint8], output: NDArray[np.float32]) -> bytes:
        """8-bit PNG of three equal channels in the image's own size.

        Raises:
            RecordError: ``not_finite``.
        """
        levels = Image.fromarray(depth_levels(output)).resize(record.size_wh, Image.Resampling.BICUBIC)
        return encode_png(cv2.merge([np.asarray(levels)] * 3))

    def _input_hw(self, padded_hw: tuple[int, int]) -> tuple[int, int]:
        """The network's input size: one scale for both sides, that of the side which it changes least."""
        scale = min(
            (wanted / side for wanted, side in zip(self.network_hw, padded_hw, strict=True)),
            key=lambda each: abs(1 - each),
        )
        height, width = (
            round(scale * side / self.network_multiple) * self.network_multiple for side in padded_hw
        )
        return height, width


def resized_wh(size_wh: tuple[int, int]) -> tuple[int, int]:
    """Size with the short side at 512 and both sides rounded to multiples of 64.

    The long side ends at 2048: an image longer than four times its short side is squeezed along it, so that none is
    rejected and none fills the memory. The map is resized to the image's own size, which undoes it.
    """
    scale = SHORT_SIDE / min(size_wh)
    width, height = (
        min(round(side * scale / SIDE_MULTIPLE) * SIDE_MULTIPLE, LONGEST_SIDE) for side in size_wh
    )
    return width, height


def depth_levels(depth: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Levels of a depth map: 255 at the 2nd percentile and nearer, 0 at the 85th and farther, truncated.

    A flat map, whose percentiles are equal but for rounding, is 0 everywhere: black means far, and nothing stands
    out. (The released formula divides 0 by 0 there, or makes a picture of rounding errors.)

    Args:
        depth: (H, W) float32.

    Returns:
        (H, W) uint8.

    Raises:
        RecordError: ``not_finite``.
    """
    if not np.isfinite(depth).all():
        raise RecordError("not_finite", "the depth network's output has values that are not finite")
    near, far = np.percentile(depth, (NEAR_PERCENTILE, FAR_PERCENTILE)).astype(np.float32)
    if far - near <= FLAT * abs(far):
        return np.zeros(depth.shape, np.uint8)
    levels: NDArray[np.float32] = (1 - (depth - near) / (far - near)) * 255
    return levels.clip(0, 255).astype(np.uint8)


def load_depth_estimator(*, weights: Path, device: str = "auto") -> DepthEstimator:
    """The estimator of a transformers ZoeDepth folder. Only safetensors are read, never pickles.

    The network's input size is taken from ``preprocessor_config.json`` where the folder has one.

    Args:
        weights: the folder.
        device: ``auto``, ``cpu`` or ``cuda:N``.

    Raises:
        ExpectedError: the folder is not there, not that of such a model, broken, or has missing or unexpected keys.
        ValueError: there is no such device.
    """
    import torch
    from transformers import ZoeDepthForDepthEstimation

    chosen = choose_device(device)
    model = load_strictly(
        ZOEDEPTH,
        weights,
        lambda folder: ZoeDepthForDepthEstimation.from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed then, and load_strictly names them
            use_safetensors=True,
            dtype=torch.float32,
        ),
    )
    network_hw, multiple = _network_size(weights / "preprocessor_config.json")
    return DepthEstimator(model, device=chosen, network_hw=network_hw, network_multiple=multiple)


def _network_size(path: Path) -> tuple[tuple[int, int], int]:
    if not path.exists():
        return NETWORK_HW, NETWORK_MULTIPLE
    try:
        config = read_config(path, most=MAX_SIDE)
        height, width = (int(config["size"][side]) for side in ("height", "width"))
        multiple = int(config.get("ensure_multiple_of", NETWORK_MULTIPLE))
        if min(height, width, multiple) < 1:
            raise ValueError(f"found {height} x {width} and multiples of {multiple}")
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ExpectedError(
            f"{ZOEDEPTH.setting}: {path}: expected the network's input size (size, ensure_multiple_of): {error!r}. "
            f"Get the file from {ZOEDEPTH.source}, or remove it: {NETWORK_HW[0]} x {NETWORK_HW[1]} is then used."
        ) from None
    return (height, width), multiple


def build_tiny(folder: Path) -> None:
    """Write a very small ZoeDepth with random weights, the same ones each time, in transformers' format."""
    import torch
    from transformers import BeitConfig, ZoeDepthConfig, ZoeDepthForDepthEstimation

    # Spread of the weights, and a seed, that make a wide range of depth: in a narrow one, levels are rounding errors.
    spread, seed = 0.3, 4
    backbone = BeitConfig(
        image_size=64,
        num_hidden_layers=4,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        use_relative_position_bias=True,
        reshape_hidden_states=False,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        initializer_range=spread,
    )
    config = ZoeDepthConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[4, 4, 4, 4],
        fusion_hidden_size=4,
        bottleneck_features=4,
        num_relative_features=4,
        bin_embedding_dim=4,
        num_attractors=[2, 2, 2, 1],
        bin_configurations=[{"n_bins": 4, "min_depth": 0.001, "max_depth": 10.0}],
        initializer_range=spread,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ZoeDepthForDepthEstimation(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero otherwise
                torch.nn.init.normal_(parameter, std=spread)
    model.save_pretrained(folder)
    size = {"height": 96, "width": 128}
    preprocessing = {
        "size": size,
        "ensure_multiple_of": NETWORK_MULTIPLE,
        "image_processor_type": "ZoeDepthImageProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=1) + "\n")
    mark_random(folder)
