"""Depth maps and latents: batches, with decoding and encoding beside them, against one image at a time.

The baselines are written plainly and share only the network: depth as REFERENCE section 5 says, image and mirror
image in separate passes; latents as diffusers' training scripts prepare images. The networks are small;
``python -m benchmarks gpu`` measures the published sizes. All weights are random.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image

from benchmarks.common import Report, interleaved
from benchmarks.inputs import ap10k_documents, jpeg_of_size
from spctrl.conditions.masks import encode_png
from spctrl.data.records import Record

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spctrl.image_models.depth import DepthEstimator
    from spctrl.image_models.latents import LatentEncoder

# Torch and what needs it is imported where it is used: the other benchmarks run without it.

IMAGES, QUICK_IMAGES = 32, 8
REPEATS, QUICK_REPEATS = 3, 1
BATCH_SIZE = 16
MAX_LEVELS, MAX_LATENTS = 1, 0.01
"""How far results of the two sides may be apart in float32: levels of depth; float16 latents."""

OURS, ALONE, PLAIN = (
    f"this project, batches of {BATCH_SIZE}",
    "this project, batches of 1",
    "one image at a time",
)
Work = list[tuple[Record, bytes]]
Plain = Callable[[bytes], bytes]
Numbers = np.ndarray[Any, np.dtype[np.float64]]


def run(report: Report) -> None:
    work = _work(QUICK_IMAGES if report.quick else IMAGES)
    with TemporaryDirectory() as folder:
        _compare(report, work, Path(folder))


def _compare(report: Report, work: Work, folder: Path) -> None:
    import torch

    from spctrl.image_models import depth, latents

    depth.build_tiny(folder / "depth")
    latents.build_tiny(folder / "latents")
    where = f"the processor, {torch.get_num_threads()} threads"
    tiny = depth.load_depth_estimator(weights=folder / "depth", device="cpu")
    _compare_depth(report, tiny, f"the tiny ZoeDepth on {where}", work, at_least=1.5)
    full_size = depth.DepthEstimator(tiny.model, device=tiny.device)
    _compare_depth(report, full_size, f"the tiny ZoeDepth at 384 x 512 on {where}", work)
    encoder = latents.load_latent_encoder(weights=folder / "latents", device="cpu")
    _compare_latents(report, encoder, f"the tiny autoencoder on {where}", work)


def _work(count: int) -> Work:
    """AP-10K images of train at even distances, each as a JPEG of its real size."""
    documents, _ = ap10k_documents()
    images = documents["train"]["images"]
    work = []
    for image in images[:: max(1, len(images) // count)][:count]:
        size_wh = image["width"], image["height"]
        record = Record(image["id"], image["file_name"], size_wh, np.empty((0, 17, 3)), np.empty((0, 4)))
        work.append((record, jpeg_of_size(size_wh).read_bytes()))
    return work


def _compare_depth(
    report: Report, estimator: DepthEstimator, what: str, work: Work, *, at_least: float | None = None
) -> None:
    def levels(artifact: bytes) -> Numbers:
        return np.asarray(Image.open(io.BytesIO(artifact))).astype(float)

    _check(estimator, lambda data: _plain_depth(estimator, data), levels, MAX_LEVELS, work[:BATCH_SIZE])
    _race(report, f"Depth by {what}", estimator, lambda data: _plain_depth(estimator, data), work, at_least)


def _compare_latents(report: Report, encoder: LatentEncoder, what: str, work: Work) -> None:
    def values(artifact: bytes) -> Numbers:
        return np.frombuffer(artifact, "<f2").astype(float)

    _check(encoder, lambda data: _plain_latents(encoder, data), values, MAX_LATENTS, work[:BATCH_SIZE])
    _race(report, f"Latents by {what}", encoder, lambda data: _plain_latents(encoder, data), work)


def _check(model: Any, plain: Plain, read: Callable[[bytes], Numbers], limit: float, work: Work) -> None:
    """Both sides must do the same work."""
    for artifact, (_, data) in zip(_ours(model, work), work, strict=True):
        apart = float(np.abs(read(artifact) - read(plain(data))).max())
        if apart > limit:
            raise RuntimeError(f"results of the two sides are {apart:g} apart, expected at most {limit:g}")


def _race(
    report: Report, title: str, model: Any, plain: Plain, work: Work, at_least: float | None = None
) -> None:
    """A table of images per second, and the target of the first line."""
    contestants: dict[str, Callable[[], object]] = {
        OURS: lambda: _ours(model, work),
        ALONE: lambda: _ours(model, work, batch_size=1),
        PLAIN: lambda: [plain(data) for _, data in work],
    }
    repeats = QUICK_REPEATS if report.quick else REPEATS
    costs = interleaved(contestants, repeats)
    base_s, count = costs[PLAIN].wall_s, len(work)
    rows = [
        (name, f"{count / cost.wall_s:.2f}", f"{cost.cpu_s / count:.3f}", f"{base_s / cost.wall_s:.2f}")
        for name, cost in costs.items()
    ]
    report.table(
        f"{title}: {count} images, medians of {repeats} turns",
        ("", "images/s", "CPU s/image", "times one at a time"),
        rows,
        "From JPEG files in memory to artifacts.",
    )
    if at_least is not None:
        ratio = base_s / costs[OURS].wall_s
        report.target(f"{title}: one at a time / ours, wall time", ratio, at_least=at_least)


def _ours(model: Any, work: Work, batch_size: int = BATCH_SIZE) -> list[bytes]:
    from spctrl.image_models.base import run_model

    artifacts = []
    for result in run_model(model, work, batch_size=batch_size):
        if not isinstance(result, bytes):
            raise RuntimeError(f"an image was rejected: {result}")
        artifacts.append(result)
    return artifacts


# The plain ways


def _plain_depth(estimator: DepthEstimator, data: bytes) -> bytes:
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    height, width = image.shape[:2]
    k = 512 / min(height, width)
    H, W = (int(np.round(side * k / 64)) * 64 for side in (height, width))
    resized = cv2.resize(image, (W, H), interpolation=cv2.INTER_LANCZOS4 if k > 1 else cv2.INTER_AREA)
    mirrored = _plain_pass(estimator, np.ascontiguousarray(resized[:, ::-1]))
    depth = (_plain_pass(estimator, resized) + mirrored[:, ::-1]) / 2
    near, far = np.percentile(depth, 2), np.percentile(depth, 85)
    levels = (255 * (1 - (depth - near) / (far - near))).clip(0, 255).astype(np.uint8)
    rgb = Image.fromarray(np.stack([levels] * 3, axis=-1))
    return encode_png(np.asarray(rgb.resize((width, height), Image.Resampling.BICUBIC)))


def _plain_pass(estimator: DepthEstimator, image: NDArray[np.generic]) -> NDArray[np.float32]:
    import torch
    from torch.nn import functional as F

    H, W = image.shape[:2]
    pad_h, pad_w = int(np.sqrt(H / 2) * 3), int(np.sqrt(W / 2) * 3)
    with torch.inference_mode():
        pixels = torch.from_numpy(image).to(estimator.device).permute(2, 0, 1)[None].float() / 255
        pixels = F.pad(pixels, (pad_w, pad_w, pad_h, pad_h), mode="reflect")
        padded = pixels.shape[2:]
        scale = min(
            (n / p for n, p in zip(estimator.network_hw, padded, strict=True)), key=lambda s: abs(1 - s)
        )
        inner = [int(np.round(scale * side / 32)) * 32 for side in padded]
        pixels = F.interpolate(pixels, inner, mode="bilinear", align_corners=True)
        depth = estimator.model((pixels - 0.5) / 0.5).predicted_depth[None]
        depth = F.interpolate(depth, padded, mode="bicubic", align_corners=False)
        found: NDArray[np.float32] = depth[0, 0, pad_h : pad_h + H, pad_w : pad_w + W].cpu().numpy()
    return found


def _plain_latents(encoder: LatentEncoder, data: bytes) -> bytes:
    import torch
    from torchvision import transforms

    steps = [
        transforms.Resize(encoder.resolution),
        transforms.CenterCrop(encoder.resolution),
        transforms.ToTensor(),
        transforms.Normalize([0.5], [0.5]),
    ]
    pixels = transforms.Compose(steps)(Image.open(io.BytesIO(data)).convert("RGB"))
    with torch.inference_mode():
        posterior = encoder.vae.encode(pixels[None].to(encoder.device)).latent_dist
        latents: NDArray[np.float32] = torch.cat([posterior.mean, posterior.logvar], dim=1)[0].cpu().numpy()
    return latents.astype("<f2").tobytes()
