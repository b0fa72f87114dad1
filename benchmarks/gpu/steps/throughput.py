"""ZoeDepth, the autoencoder, Inception, CLIP and the training loader: the GPU's rate, and that of all steps together.

Where all steps together are slower than the network alone, the CPU's cores that decode and encode are the limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu.inputs import Work, images_with_boxes
from benchmarks.gpu.measure import Measurements, flops_of, matrix_rate, peak_gib, seconds_of
from benchmarks.inputs import jpeg_of_size
from benchmarks.loader import dataset_records, write_ap10k_tokenizer, write_dataset
from spctrl.image_models.base import run_model

IMAGES, SMALL_IMAGES = 96, 2
BATCH_SIZE, EVAL_BATCH_SIZE, SMALL_BATCH_SIZE = 16, 32, 2
RESOLUTION, SMALL_RESOLUTION = 512, 64
LOADED_EPOCHS = 16


def run(measurements: Measurements) -> None:
    """Each network with random weights in its published size."""
    work = images_with_boxes([1] * (SMALL_IMAGES if measurements.small else IMAGES), one_size=True)
    measurements.add("CPU cores", count=len(os.sched_getaffinity(0)))
    with TemporaryDirectory() as folder:
        for measure in (_depth, _latents, _inception, _clip, _loader):
            measure(measurements, work, Path(folder))


def _depth(measurements: Measurements, work: Work, folder: Path) -> None:
    from transformers import ZoeDepthConfig, ZoeDepthForDepthEstimation

    from spctrl.image_models import depth

    if measurements.small:
        depth.build_tiny(folder / "depth")
        estimator = depth.load_depth_estimator(weights=folder / "depth", device=str(measurements.device))
    else:
        with torch.device(measurements.device):
            network = ZoeDepthForDepthEstimation(ZoeDepthConfig())
        estimator = depth.DepthEstimator(network, device=measurements.device)
    _image_model(measurements, "ZoeDepth (BEiT-L), with mirror images", estimator, work, torch.bfloat16)


def _latents(measurements: Measurements, work: Work, _: Path) -> None:
    from diffusers import AutoencoderKL

    from spctrl.image_models.latents import LatentEncoder

    with torch.device(measurements.device):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32,) * 4 if measurements.small else (128, 256, 512, 512),
            layers_per_block=2,
        )
    resolution = SMALL_RESOLUTION if measurements.small else RESOLUTION
    encoder = LatentEncoder(vae, resolution=resolution, device=measurements.device)
    _image_model(measurements, "VAE encoder", encoder, work, torch.float32)


def _image_model(measurements: Measurements, name: str, model: Any, work: Work, dtype: torch.dtype) -> None:
    size = SMALL_BATCH_SIZE if measurements.small else BATCH_SIZE
    batch = [model.decode(*each) for each in work[:size]]

    def pipeline() -> None:
        for result in run_model(model, work, batch_size=size):
            if not isinstance(result, bytes):
                raise RuntimeError(f"an image was rejected: {result}")

    _rates(measurements, name, lambda: model.infer(batch), size, pipeline, len(work), dtype, tf32=True)


def _inception(measurements: Measurements, work: Work, folder: Path) -> None:
    from eval.inception import load_inception
    from eval.tiny import build_inception

    build_inception(folder / "inception.pth")
    paths = _paths(work)
    for resize in ("clean",) if measurements.small else ("legacy", "clean"):
        network = load_inception(folder / "inception.pth", resize=resize, device=str(measurements.device))  # type: ignore[arg-type]
        size = _eval_batch(measurements)
        batch = [torch.rand(3, 299, 299).numpy() * 255] * size
        _rates(
            measurements,
            f"Inception, {resize}",
            lambda network=network, batch=batch: network._infer(batch),  # type: ignore[misc]
            size,
            lambda network=network, size=size: network.features(paths, batch_size=size),  # type: ignore[misc]
            len(paths),
            torch.float32,
            tf32=True,
        )


def _clip(measurements: Measurements, work: Work, folder: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from eval.clip_score import ClipScorer
    from eval.images import read_rgb
    from eval.tiny import build_clip
    from spctrl.models.tiny import write_tokenizer

    if measurements.small:
        build_clip(folder / "clip")
        model = CLIPModel.from_pretrained(folder / "clip")
    else:
        (folder / "clip").mkdir()
        CLIPImageProcessor().save_pretrained(folder / "clip")
        write_tokenizer(folder / "clip")
        text: dict[str, Any] = {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "projection_dim": 768,
        }
        vision: dict[str, Any] = {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
        }
        with torch.device(measurements.device):
            model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
    scorer = ClipScorer(model, CLIPProcessor.from_pretrained(folder / "clip"), device=measurements.device)
    paths, size = _paths(work), _eval_batch(measurements)
    batch = [(scorer._pixels(read_rgb(paths[0])), "a photo of a good dog in a forest")] * size
    _rates(
        measurements,
        "CLIP ViT-L/14",
        lambda: scorer._infer(batch),
        size,
        lambda: scorer.scores(paths, ["a photo of a good dog in a forest"] * len(paths), batch_size=size),
        len(paths),
        torch.float32,
    )


def _rates(
    measurements: Measurements,
    name: str,
    infer: Callable[[], object],
    batch_size: int,
    pipeline: Callable[[], object],
    images: int,
    dtype: torch.dtype,
    *,
    tf32: bool = False,
) -> None:
    device = measurements.device
    infer_s = seconds_of(infer, device, repeats=1 if measurements.small else 3)
    pipeline_s = seconds_of(pipeline, device, repeats=1, warm_ups=0 if measurements.small else 1)
    measurements.add(
        f"{name}, batches of {batch_size}",
        network_images_per_s=batch_size / infer_s,
        images_per_s=images / pipeline_s,
        share_of_network=infer_s / batch_size / (pipeline_s / images),
        peak_gib=peak_gib(infer, device),
        share_of_matrix_rate=flops_of(infer) / infer_s / matrix_rate(device, dtype, tf32=tf32),
    )


def _loader(measurements: Measurements, _: Work, folder: Path) -> None:
    """Training samples from cached latents."""
    from torch.utils.data import DataLoader

    from spctrl.training.dataset import SpCtrlDataset

    data = folder / "loader"
    data.mkdir()
    count = 4 if measurements.small else 64
    records, root = dataset_records(data, count)
    manifest = write_dataset(data, records, root)
    dataset = SpCtrlDataset(
        manifest,
        store=data / "store",
        latents=True,
        tokenizer=write_ap10k_tokenizer(data),
        enable_learnable_kpttoken=True,
        add_keypoint_prompt=0.8,
        heatmap_type="partition",
        resolution=RESOLUTION,
    )
    order = list(range(count)) * (1 if measurements.small else LOADED_EPOCHS)
    for workers in (0,) if measurements.small else (1, 4, 8, 15):
        loader: Any = DataLoader(
            dataset,
            batch_sampler=_batches(order, 4 if measurements.small else 20),
            num_workers=workers,
            pin_memory=measurements.device.type == "cuda",
        )
        seconds = seconds_of(lambda loader=loader: _read(loader), measurements.device, repeats=1, warm_ups=0)  # type: ignore[misc]
        measurements.add(
            f"training loader, cached latents, {workers} processes, with their start",
            images_per_s=len(order) / seconds,
        )


def _batches(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def _read(loader: Any) -> None:
    for _ in loader:
        pass


def _paths(work: Work) -> list[Path]:
    return [jpeg_of_size(record.size_wh) for record, _ in work]


def _eval_batch(measurements: Measurements) -> int:
    return SMALL_BATCH_SIZE if measurements.small else EVAL_BATCH_SIZE
