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
from spctrl.models.stable_diffusion import move

STEPS, FEW, GUIDANCE = 50, 2, 7.5
BATCH_SIZES, SMALL_BATCH_SIZES = (8, 32), (2,)
LEAST = 3.0
"""Target: images a second, times one at a time."""

PROMPT = "a photo of a good dog, standing in a forest, its left eye, nose and tail"


def run(measurements: Measurements) -> None:
    """One image at a time, and batches."""
    generator = _generator(measurements)
    vae, device = generator.pipeline.vae, measurements.device
    move(vae, device, generator.pipeline.unet.dtype)
    base_s = seconds_of(lambda: _released(generator), device, repeats=1 if measurements.small else 2)
    move(vae, device, torch.float32)
    measurements.add("one image at a time, as released", images_per_s=1 / base_s)
    found, flops = {}, _step_flops(generator)
    sizes = SMALL_BATCH_SIZES if measurements.small else BATCH_SIZES
    for size in sizes:
        found[size] = _measure(measurements, f"batches of {size}", generator, size, flops)
    best = max(found, key=lambda size: found[size])
    add_kernels(measurements, f"generation, batches of {best}, 5 steps", lambda: _run(generator, best, 5))
    measurements.speed_target(
        "ours / one image at a time, images per second", found[best] * base_s, at_least=LEAST
    )


def run_compiled(measurements: Measurements) -> None:
    """Batches, compiled; the first case is the one without."""
    generator, size = _generator(measurements), (SMALL_BATCH_SIZES if measurements.small else BATCH_SIZES)[-1]
    flops = _step_flops(generator)
    _measure(measurements, f"batches of {size}", generator, size, flops)
    for network in (generator.pipeline.unet, generator.pipeline.controlnet):
        network.compile(backend="eager" if measurements.small else "inductor")
    start = time.perf_counter()
    _run(generator, size, 2)
    wait_for(measurements.device)
    measurements.add("first compiled batch of 2 steps", seconds=time.perf_counter() - start)
    _measure(measurements, f"batches of {size}, compiled", generator, size, flops)
    add_kernels(
        measurements, f"compiled generation, batches of {size}, 5 steps", lambda: _run(generator, size, 5)
    )


def _measure(
    measurements: Measurements, case: str, generator: ImageGenerator, size: int, flops_per_image: float
) -> float:
    """Images per second; ``flops_per_image`` are a step's."""
    device = measurements.device

    steps = generator.sampler.steps
    peak = peak_gib(lambda: _run(generator, size, FEW), device)
    seconds, few_s = (
        seconds_of(functools.partial(_run, generator, size, each), device, repeats=1, warm_ups=0)
        for each in (steps, FEW)
    )
    per_step_s = (seconds - few_s) / (steps - FEW)
    measurements.add(
        case,
        images_per_s=size / seconds,
        ms_per_step=1000 * per_step_s,
        peak_gib=peak,
        share_of_matrix_rate=size
        * flops_per_image
        / per_step_s
        / matrix_rate(device, generator.pipeline.unet.dtype),
    )
    return size / seconds


def _step_flops(generator: ImageGenerator) -> float:
    """Floating-point operations of a step, for each image; of networks that are not compiled."""
    one, two = (flops_of(functools.partial(_run, generator, 1, steps)) for steps in (1, 2))
    return two - one


def _run(generator: ImageGenerator, size: int, steps: int) -> None:
    few = Sampler(steps=steps, guidance_scale=GUIDANCE, resolution=generator.sampler.resolution)
    side = few.resolution
    condition = np.zeros((1, side, side), np.float32)
    condition[:, side // 4 : side // 2, side // 4 : side // 2] = 5
    requests = [Request(condition, PROMPT, seed) for seed in range(size)]
    ImageGenerator(generator.pipeline, generator.kind, few, generator.device).infer(requests)


def _released(generator: ImageGenerator) -> None:
    """Diffusers' pipeline with one prompt and one index map, all networks in half precision, to a PIL image."""
    side = generator.sampler.resolution
    generator.pipeline(
        PROMPT,
        image=torch.zeros(1, 1, side, side),
        height=side,
        width=side,
        num_inference_steps=generator.sampler.steps,
        guidance_scale=GUIDANCE,
    )


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
        move(network.eval().requires_grad_(False), device, dtype)
    sampler = Sampler(steps=4 if small else STEPS, guidance_scale=GUIDANCE, resolution=sizes.resolution)
    return ImageGenerator(pipeline, "spctrl", sampler, device)
