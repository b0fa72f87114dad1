"""Features of images by the Inception network of FID and KID.

The network is torch-fidelity's: InceptionV3 with the weights of the original FID code, from a local file.

Legend: N images, B images of a batch, F features (2,048).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eval.images import Images, Pixels, in_batches, listed, read_rgb
from spctrl.errors import ExpectedError
from spctrl.image_models.base import choose_device
from spctrl.io.reading_faults import faults_of
from spctrl.weights import read_torch_file

if TYPE_CHECKING:
    import torch

Resize = Literal["legacy", "clean"]
Crop = Literal["none", "square"]
RESIZES: tuple[Resize, ...] = ("legacy", "clean")
SIDE = 299
NUM_FEATURES = 2048
BATCH_SIZE = 32

REMEDY = (
    "Get weights-inception-2015-12-05-6726825d.pth from torch-fidelity's releases (github.com/toshas/torch-fidelity, "
    "v0.2.0) and give its path, or write random ones to try the pipeline with: spctrl tiny-weights."
)


class Inception:
    """The network, with the way images come to its 299 x 299 pixels.

    Attributes:
        resize: ``legacy`` is bilinear without antialiasing, as TensorFlow 1 resized for the original FID; ``clean`` is
            PIL's bicubic with antialiasing and no rounding (Parmar et al., "On Aliased Resizing and Surprising
            Subtleties in GAN Evaluation", CVPR 2022). Values of one are not comparable with the other's.
        crop: ``square`` takes the centre square first, as generation crops poses; ``none`` squeezes the image.
    """

    def __init__(self, network: Any, *, device: torch.device, resize: Resize, crop: Crop) -> None:
        self.network = network.to(device).eval()
        self.device = device
        self.resize = resize
        self.crop = crop

    def features(
        self, images: Images, *, batch_size: int = BATCH_SIZE, size_wh: tuple[int, int] | None = None
    ) -> NDArray[np.float32]:
        """(N, F) float32 features, in the images' order; a folder's images by path.

        Args:
            images: a folder, files or arrays.
            batch_size: changes nothing but the time.
            size_wh: width and height that all images must have, where they are known.

        Raises:
            ImageError: an image is missing, broken, or of another size.
        """
        batches = in_batches(
            listed(images), lambda image: self._prepared(read_rgb(image, size_wh)), batch_size
        )
        return np.concatenate([self._infer(batch) for batch in batches])

    def _prepared(self, pixels: Pixels) -> NDArray[np.float32]:
        if self.crop == "square":
            pixels = centre_square(pixels)
        return resize_clean(pixels) if self.resize == "clean" else resize_legacy(pixels)

    def _infer(self, batch: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        """The network's own input is 8-bit and resized inside, so resized images enter at its first layer."""
        import torch

        with torch.inference_mode():
            pixels = torch.from_numpy(np.stack(batch)).to(self.device)
            stem = self.network.Conv2d_1a_3x3
            hook = stem.register_forward_pre_hook(lambda _layer, _inputs: ((pixels - 128) / 128,))
            try:
                (features,) = self.network(
                    torch.zeros((len(batch), 3, 2, 2), dtype=torch.uint8, device=self.device)
                )
            finally:
                hook.remove()
            result: NDArray[np.float32] = features.cpu().numpy()
        return result


def load_inception(
    weights: Path | str, *, resize: Resize = "legacy", crop: Crop = "none", device: str = "auto"
) -> Inception:
    """The network with weights from a local file.

    Args:
        weights: torch-fidelity's file.
        resize, crop: see ``Inception``.
        device: ``auto``, ``cpu`` or ``cuda:N``.

    Raises:
        ExpectedError: the file is missing, broken or of another network.
        ValueError: there is no such way to resize or crop, or no such device.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if resize not in RESIZES or crop not in ("none", "square"):
        raise ValueError(
            f"expected resize legacy or clean and crop none or square, found {resize!r}, {crop!r}"
        )
    path = Path(weights)
    if not path.is_file():
        raise ExpectedError(f"expected Inception weights at {path}, found no file. {REMEDY}")
    with faults_of(f"{path}: not the weights of torch-fidelity's Inception", REMEDY):
        read_torch_file(path)  # the network reads it again, and may run pickled code
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", [str(NUM_FEATURES)], feature_extractor_weights_path=str(path)
        )
    return Inception(network, device=choose_device(device), resize=resize, crop=crop)


def centre_square(pixels: Pixels) -> Pixels:
    """(S, S, 3): the middle of an image, as large as its short side allows."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def resize_legacy(pixels: Pixels) -> NDArray[np.float32]:
    """(3, 299, 299) float32 in [0, 255]: bilinear as in TensorFlow 1, by torch-fidelity's function."""
    import torch
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    image = torch.tensor(pixels).permute(2, 0, 1)[None].float()
    resized = interpolate_bilinear_2d_like_tensorflow1x(image, size=(SIDE, SIDE), align_corners=False)
    result: NDArray[np.float32] = resized[0].numpy()
    return result


def resize_clean(pixels: Pixels) -> NDArray[np.float32]:
    """(3, 299, 299) float32, about [0, 255]: each channel by PIL's bicubic filter in float."""
    channels = [Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(pixels, -1, 0)]
    return np.stack([np.asarray(each.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for each in channels])
