"""Generation at Stable Diffusion 1.5's size, UniPC: one image at a time as released, against batches."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.measure import (
    Measurements,
    add_kernels,
    flops_of,
    matrix_rate,
    peak_gib,
    seconds_of,
    wait_for,
)
from benchmarks.train_step import Sizes, make_networks
from spctrl.inference.generator import ImageGenerator, Request
from spctrl.inference.methods import Sampler

STEPS, FEW, GUIDANCE = 50, 2, 7.5
BATCH_SIZES, SMALL_BATCH_SIZES = (8, 32), (2,)
LEAST = 3.0
"""Target: images a second, times one at a time."""

PROMPT = "a photo of a good dog, standing in a forest, its left eye, nose and tail"


def run(measurements: Measurements) -> None:
    """One image at a time, and batches."""
    generator = _generator(measurements)
    base_s = seconds_of(
        lambda: _released(generator), measurements.device, repeats=1 if measurements.small else 2
    )
    measurements.add("one image at a time, as released", images_per_s=1 / base_s)
    found = {}
    sizes = SMALL_BATCH_SIZES if measurements.small else BATCH_SIZES
    for size in sizes:
        found[size] = _measure(measurements, f"batches of {size}", generator, size)
    best = max(found, key=lambda size: found[size])
    add_kernels(measurements, f"generation, batches of {best}, 5 steps", lambda: _run(generator, best, 5))
    measurements.speed_target(
        "ours / one image at a time, images per second", found[best] * base_s, at_least=LEAST
    )


def run_compiled(measurements: Measurements) -> None:
    """Batches, compiled; the first case is the one without."""
    generator, size = _generator(measurements), (SMALL_BATCH_SIZES if measurements.small else BATCH_SIZES)[-1]
    _measure(measurements, f"batches of {size}", generator, size)
    for network in (generator.pipeline.unet, generator.pipeline.controlnet):
        network.compile(backend="eager" if measurements.small else "inductor")
    start = time.perf_counter()
    _run(generator, size, 2)
    wait_for(measurements.device)
    measurements.add("first compiled batch of 2 steps", seconds=time.perf_counter() - start)
    _measure(measurements, f"batches of {size}, compiled", generator, size)
    add_kernels(
        measurements, f"compiled generation, batches of {size}, 5 steps", lambda: _run(generator, size, 5)
    )


def _measure(measurements: Measurements, case: str, generator: ImageGenerator, size: int) -> float:
    """Images per second; a warm-up comes before."""
    device = measurements.device

    def generate(steps: int = generator.sampler.steps) -> None:
        _run(generator, size, steps)

    peak = peak_gib(functools.partial(generate, 2), device)
    seconds = seconds_of(generate, device, repeats=1, warm_ups=0)
    few_s = seconds_of(functools.partial(generate, FEW), device, repeats=1, warm_ups=0)
    per_step_s = (seconds - few_s) / (generator.sampler.steps - FEW)
    measurements.add(
        case,
        images_per_s=size / seconds,
        ms_per_step=1000 * per_step_s,
        peak_gib=peak,
        share_of_matrix_rate=size
        * _step_flops(generator)
        / per_step_s
        / matrix_rate(device, generator.pipeline.unet.dtype),
    )
    return size / seconds


_STEP_FLOPS: list[float] = []
"""Found once, before anything is compiled."""


def _step_flops(generator: ImageGenerator) -> float:
    """Floating-point operations of a step, for each image."""
    if not _STEP_FLOPS:
        one, two = (flops_of(lambda steps=steps: _run(generator, 1, steps)) for steps in (1, 2))  # type: ignore[misc]
        _STEP_FLOPS.append(two - one)
    return _STEP_FLOPS[0]


def _run(generator: ImageGenerator, size: int, steps: int) -> None:
    few = Sampler(steps=steps, guidance_scale=GUIDANCE, resolution=generator.sampler.resolution)
    side = few.resolution
    condition = np.zeros((1, side, side), np.float32)
    condition[:, side // 4 : side // 2, side // 4 : side // 2] = 5
    requests = [Request(condition, PROMPT, seed) for seed in range(size)]
    ImageGenerator(generator.pipeline, generator.kind, few, generator.device).infer(requests)


def _released(generator: ImageGenerator) -> None:
    """Diffusers' pipeline with one prompt and one index map, all networks in half precision, to a PIL image."""
    pipeline, side = generator.pipeline, generator.sampler.resolution
    precision = pipeline.vae.dtype
    pipeline.vae.to(pipeline.unet.dtype)
    pipeline(
        PROMPT,
        image=torch.zeros(1, 1, side, side),
        height=side,
        width=side,
        num_inference_steps=generator.sampler.steps,
        guidance_scale=GUIDANCE,
    )
    pipeline.vae.to(precision)


def _generator(measurements: Measurements) -> ImageGenerator:
    """A generator as ``load_generator`` makes it, of random weights."""
    from diffusers import UniPCMultistepScheduler
    from transformers import CLIPTokenizer

    from spctrl.inference.pipeline import SpCtrlPipeline
    from spctrl.models.tiny import write_tokenizer

    device, small = measurements.device, measurements.small
    sizes = (
        Sizes(narrowed=16, resolution=64, batch_size=2, precision="no", layers=1)
        if small
        else Sizes(narrowed=1, resolution=512, batch_size=2, precision="no")
    )
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    networks = make_networks(sizes, device)
    with TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer: Any = CLIPTokenizer.from_pretrained(folder)
    pipeline = SpCtrlPipeline(
        vae=networks.vae,
        text_encoder=networks.text_encoder,
        tokenizer=tokenizer,
        unet=networks.unet,
        controlnet=networks.control,
        scheduler=UniPCMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    for network in (pipeline.unet, pipeline.text_encoder, pipeline.controlnet):
        torch.nn.Module.to(network.eval().requires_grad_(False), device, dtype)
    sampler = Sampler(steps=4 if small else STEPS, guidance_scale=GUIDANCE, resolution=sizes.resolution)
    return ImageGenerator(pipeline, "spctrl", sampler, device)
