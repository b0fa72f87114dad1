"""A training step: cached latents and maps of the chosen layers, against the released manner, on the same networks.

The released manner encodes the images in every step, computes attention a second time for its maps, keeps those of all
cross-attention layers, head by head, and loops over the values of the index maps in float32; it is written plainly in
``benchmarks.released_step``, and shares the networks, the losses and the optimizer. The objective is the recommended
one. Stable Diffusion 1.5's networks are an eighth as wide here: their parts have the real ones' shares of the
arithmetic, but overhead takes most of the time. ``python -m benchmarks gpu`` measures the real sizes. All weights are
random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.common import Report, interleaved

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spctrl.training.config import TrainingConfig
    from spctrl.training.networks import Networks
    from spctrl.training.objective import Draws

# Torch and what needs it is imported where it is used: the other benchmarks run without it.

REPEATS, QUICK_REPEATS = 7, 1
LARGEST_DIFFERENCE = 2e-3
"""How far the losses of the two sides may be apart, relatively, in float32: cached latents are float16."""
OURS, RELEASED = "this project", "the released manner"

Step = Callable[[], dict[str, "Tensor"]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the networks and the batch are.

    Attributes:
        narrowed: what the widths of Stable Diffusion 1.5 are divided by.
        resolution: side of the images in pixels.
        batch_size: images of a step.
        precision: ``mixed_precision`` of a configuration.
        layers: of each block of the UNet; the text encoder has six times as many.
    """

    narrowed: int
    resolution: int
    batch_size: int
    precision: str
    layers: int = 2


ON_CPU = Sizes(narrowed=8, resolution=256, batch_size=2, precision="no")
QUICK = Sizes(narrowed=8, resolution=128, batch_size=2, precision="no")


def run(report: Report) -> None:
    import torch

    from benchmarks.gpu.measure import flops_of, matrix_rate
    from benchmarks.released_step import released

    sizes, repeats = (QUICK, QUICK_REPEATS) if report.quick else (ON_CPU, REPEATS)
    device = torch.device("cpu")
    work = make_work(sizes, device)
    steps = {OURS: ours(work), RELEASED: released(work)}
    _check(steps[OURS], steps[RELEASED])
    seconds = {name: cost.wall_s for name, cost in interleaved(dict(steps), repeats).items()}
    flops = {name: flops_of(step) for name, step in steps.items()}
    rate = matrix_rate(device, torch.float32)
    report.table(
        f"Training step on the CPU: {sizes.batch_size} images of {sizes.resolution} x {sizes.resolution}, "
        f"Stable Diffusion 1.5, widths / {sizes.narrowed}, float32; medians of {repeats} steps",
        ("", "ms a step", "images/s", "TFLOP", "of the matrix rate", "times released"),
        [
            (
                name,
                f"{seconds[name] * 1000:,.0f}",
                f"{sizes.batch_size / seconds[name]:.2f}",
                f"{flops[name] / 1e12:.3f}",
                f"{flops[name] / seconds[name] / rate:.0%}",
                f"{seconds[RELEASED] / seconds[name]:.2f}",
            )
            for name in seconds
        ],
        f"Forward, backward, clipping and AdamW. Measured matrix rate: {rate / 1e12:.2f} TFLOP/s.",
    )


# The two sides


class Work(NamedTuple):
    """What both sides work with."""

    networks: Networks
    config: TrainingConfig
    optimizer: Any
    batch: Mapping[str, Tensor]
    draws: Draws


def make_work(sizes: Sizes, device: torch.device) -> Work:
    """Networks with random weights, the recommended objective and a batch."""
    from spctrl.training.loop import make_optimizer

    networks, config = make_networks(sizes, device), make_config(sizes)
    batch, draws = make_batch(networks, sizes, device)
    return Work(networks, config, make_optimizer(config, networks.trained_groups()), batch, draws)


def ours(work: Work, *, cached: bool = True) -> Step:
    """A step as the training loop does it, from cached latents or from images."""
    from spctrl.training.objective import objective_of

    images = ("pixel_values",) if cached else ("latents_mean", "latents_logvar")
    batch = {name: value for name, value in work.batch.items() if name not in (*images, "large_heatmaps")}

    @contextmanager
    def losses() -> Iterator[dict[str, Tensor]]:
        # A run opens this once; here the other side's steps come between.
        with objective_of(work.networks, work.config) as objective:
            yield objective(batch, work.draws)

    return make_step(work, losses)


def make_step(work: Work, losses: Callable[[], AbstractContextManager[dict[str, Tensor]]]) -> Step:
    """Losses, gradients, clipping and an optimizer step, with the same dropout each time."""
    import torch

    def step() -> dict[str, Tensor]:
        torch.manual_seed(0)
        with ExitStack() as open_until_backward:
            with _autocast(work.config, work.draws.noise.device):
                found = open_until_backward.enter_context(losses())
            found["loss"].backward()
        for group in work.networks.trained_groups():
            torch.nn.utils.clip_grad_norm_(group, work.config.max_grad_norm)
        work.optimizer.step()
        work.optimizer.zero_grad()
        return {name: value.detach() for name, value in found.items()}

    return step


def _autocast(config: TrainingConfig, device: torch.device) -> Any:
    import torch

    from spctrl.training.networks import FROZEN_DTYPES

    dtype = FROZEN_DTYPES[config.mixed_precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# What both sides work with


def make_config(sizes: Sizes) -> TrainingConfig:
    """The recommended objective. Its learning rates are zero, so that all steps are of the same networks."""
    import msgspec

    from spctrl.training.config import TrainingConfig

    return msgspec.convert(
        {
            "dataset_name": "ap10k",
            "conditioning_mode": "spatext",
            "resolution": sizes.resolution,
            "train_batch_size": sizes.batch_size,
            "add_keypoint_prompt": 0.8,
            "enable_learnable_kpttoken": True,
            "add_cross_attn_loss": True,
            "attn_loss_weight": 0.1,
            "attn_loss_type": "mse",
            "attn_loss_start_timestep": 250,
            "attn_loss_end_timestep": 500,
            "attn_loss_select_layer_type": "down_blocks.2",
            "attn_loss_detach_query": True,
            "heatmap_type": "partition",
            "learning_rate": 1e-12,
            "mixed_precision": sizes.precision,
        },
        TrainingConfig,
    )


def make_networks(sizes: Sizes, device: torch.device) -> Networks:
    """Stable Diffusion 1.5's networks with random weights, and an SP-Ctrl ControlNet with 17 keypoint tokens.

    As in a training run that encodes images, UNet and autoencoder are in the lower precision, all else in float32.
    The weights are initialised on the device, where that takes the least time.
    """
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from spctrl.models import SpCtrlControlNetModel
    from spctrl.models.stable_diffusion import move
    from spctrl.models.tokens import trainable_token_rows
    from spctrl.training.networks import FROZEN_DTYPES, Networks

    torch.manual_seed(0)
    narrow = sizes.narrowed
    text_width, groups = 768 // narrow, 32 // narrow
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=sizes.resolution // 8,
            layers_per_block=sizes.layers,
            block_out_channels=tuple(width // narrow for width in (320, 640, 1280, 1280)),
            norm_num_groups=groups,
            cross_attention_dim=text_width,
            attention_head_dim=8,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=tuple(width // narrow for width in (128, 256, 512, 512)),
            layers_per_block=2,
            norm_num_groups=groups,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49_425,
                hidden_size=text_width,
                intermediate_size=4 * text_width,
                num_attention_heads=12,
                num_hidden_layers=6 * sizes.layers,
                bos_token_id=49_406,
                eos_token_id=49_407,
            )
        )
        control = SpCtrlControlNetModel.from_unet(
            unet,
            conditioning_embedding_out_channels=tuple(max(2, width // narrow) for width in (16, 32, 96, 256)),
        )
    for frozen in (unet, vae, text):
        frozen.requires_grad_(False).eval()
    for frozen in (unet, vae):
        move(frozen, device, FROZEN_DTYPES[sizes.precision])
    rows = trainable_token_rows(text, range(49_408, 49_425))
    return Networks(
        tokenizer=None,
        text_encoder=text,
        unet=unet,
        vae=vae,
        noise=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        latent_scale=0.18215,
        control=control.train(),
        token_rows=rows,
        token_table=None,
        dataset_name="ap10k",
        model="controlnet",
    )


def make_batch(networks: Networks, sizes: Sizes, device: torch.device) -> tuple[dict[str, Tensor], Draws]:
    """Random images with what either side reads of them; half of the timesteps lie in the loss's window."""
    import torch

    from spctrl.losses.keypoint_concept import resize
    from spctrl.training.objective import draw

    B, R, K, T = sizes.batch_size, sizes.resolution, 17, 77
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((B, 3, R, R), generator=generator).to(device) * 2 - 1
    values = torch.tensor([0, *range(1, 18), *range(51, 68)], dtype=torch.float32)
    rough = values[torch.randint(len(values), (B, 1, R // 32, R // 32), generator=generator)]
    tokens = torch.randint(49_406, (B, T), generator=generator)
    tokens[:, 0], tokens[:, 1 : 1 + K], tokens[:, 1 + K :] = 49_406, torch.arange(49_408, 49_425), 49_407
    is_keypoint = torch.zeros((B, T), dtype=torch.bool)
    is_keypoint[:, 1 : 1 + K] = True
    large_heatmaps = (torch.rand((B, K, R, R), generator=generator) > 0.99).float()
    with torch.no_grad():
        posterior = networks.vae.encode(images.to(networks.vae.dtype)).latent_dist
    batch = {
        "pixel_values": images,
        "latents_mean": posterior.mean.half(),
        "latents_logvar": posterior.logvar.half(),
        "conditioning_image": torch.nn.functional.interpolate(rough, (R, R)),
        "input_ids": tokens,
        "token_mask": is_keypoint,
        "keypoint_mask": torch.ones((B, K), dtype=torch.bool),
        "heatmaps": resize(large_heatmaps),
        "large_heatmaps": large_heatmaps,
    }
    draws = draw(0, batch_size=B, resolution=R, num_timesteps=1000)
    draws = draws._replace(timesteps=torch.arange(B) % 2 * 300 + 100)
    return {name: value.to(device) for name, value in batch.items()}, draws.to(device)


def _check(our_step: Step, their_step: Step) -> None:
    """Both sides must compute the same losses."""
    found, theirs = our_step(), their_step()
    for name, value in found.items():
        apart = abs(float(value - theirs[name])) / abs(float(theirs[name]))
        if not apart <= LARGEST_DIFFERENCE:
            raise RuntimeError(
                f"{name} of the two sides is {apart:g} apart, expected at most {LARGEST_DIFFERENCE}"
            )
