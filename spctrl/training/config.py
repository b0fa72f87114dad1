"""The settings of a training run, under the names of the paper's scripts (REFERENCE section 10).

Those of the scripts' flags that are not here have nothing to do: downloads from and uploads to a hub, the columns of
a dataset, memory-efficient attention (always on) and freeing of gradients (always done).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from spctrl.configuration import PathText, read_config
from spctrl.fingerprints import without_neutral

Positive = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Rate = Annotated[float, msgspec.Meta(gt=0)]

LATENT_MULTIPLE = 64
"""Stable Diffusion's autoencoder and UNet halve an image's sides six times."""
TIMESTEPS = 1000
"""Steps of Stable Diffusion's noise schedule."""

CONDITIONS = {
    "spatext": "spatext",
    "openpose": "openpose",
    "keypoint": "openpose",
    "sam_hq_mask": "mask",
    "zeo_depth_masked": "masked_depth",
}
"""For each conditioning mode the condition of a manifest that shows it."""

DRAWN_MODES = ("spatext", "openpose", "keypoint")
"""Modes whose conditions need not be stored."""


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training run, with the defaults of the paper's scripts and of diffusers; configs/train/ has the runs."""

    # What is trained

    model: Literal["controlnet", "t2i_adapter"] = "controlnet"
    """What takes the condition in; a ControlNet on index maps is SP-Ctrl's."""
    pretrained_model_name_or_path: PathText = "stable_diffusion"
    """Stable Diffusion 1.5: an entry of weights.yaml, or a folder in diffusers' format."""
    controlnet_model_name_or_path: PathText | None = None
    """Trained weights to start from, of the same model: an entry or a folder; null: start from the UNet."""
    output_dir: PathText | None = None
    """Where to train without Luigi; the task ``Train`` has a place of its own."""

    # Data

    dataset_name: Literal["ap10k", "humanart"]
    """Its training split is trained on."""
    conditioning_mode: Literal["spatext", "openpose", "keypoint", "sam_hq_mask", "zeo_depth_masked"]
    """The condition: index map, skeleton render, its keypoints alone, mask, or depth within the mask."""
    stored_conditions: bool = False
    """Read index maps and renders from the store, in the style of ``[openpose]``, instead of drawing them."""
    use_extra_mask: bool = False
    """Whether the mask is one more channel of the condition."""
    use_cached_latents: bool = True
    """Train on latents that were computed once, without the image encoder; false: encode images in every step."""
    resolution: Positive = 512
    """Side of the crop in pixels."""
    proportion_empty_prompts: Probability = 0.0
    """Probability of an empty prompt."""
    add_keypoint_prompt: Probability = 0.0
    """Probability that the labelled keypoints are named in a prompt."""
    prompt_templates: PathText | None = None
    """File of prompt templates; null: ``prompts/<dataset>.yaml``."""
    max_train_samples: Positive | None = None
    """Only so many images, the first ones; null: all."""

    # Keypoint tokens

    enable_learnable_kpttoken: bool = False
    """Whether each keypoint has a token of its own, whose embedding is trained."""
    text_encoder_lr: Rate | None = None
    """Learning rate of those embeddings; null: ``learning_rate``."""
    text_encoder_lr_scheduler: Rate | None = None
    """After each step of epoch e that rate becomes ``text_encoder_lr`` x this ** (int((e + 1) / 100) + 1), so that only
    the first step has ``text_encoder_lr`` itself; null: it stays."""

    # The spatial-text embedding, in conditioning mode spatext

    spatext_cond_channels: Positive = 3
    """Channels C that the index map becomes."""
    spatext_init_emb: PathText | None = None
    """File of (17, 768) text embeddings of the keypoints (``spctrl keypoint-embeddings``); null: random."""
    spatext_skeleton_type: Literal["one", "zero", "rand", "interp_kpt"] = "one"
    """Rows of the links: ones, zeros, random, or the mean of their ends'."""
    spatext_enable_learn_kpt: bool = False
    """Whether the keypoints' embeddings are trained."""
    spatext_enable_learn_sks: bool = False
    """Whether the links' rows are trained."""
    spatext_detach_kpt_grad_from_sks: bool = False
    """With ``interp_kpt``: whether links give the keypoints no gradient."""
    spatext_freeze_embedding: bool = False
    """Whether nothing of the embedding is trained."""
    spatext_layer_version: Literal["sigmoid_version"] | None = None
    """``sigmoid_version`` squashes the keypoints' rows into (0, 1)."""
    spatext_link_table: Literal["ap10k", "humanart"] = "ap10k"
    """Whose links the rows stand for; the released model has AP-10K's 17 for HumanArt too."""

    # Objective

    add_cross_attn_loss: bool = False
    """Whether the keypoint-concept loss is added."""
    attn_loss_weight: NonNegative = 1.0
    """Its weight."""
    heatmap_type: Literal["whole", "partition"] = "whole"
    """Its target: one map of the whole object for the class token, or one for each keypoint."""
    heatmap_target: Literal["released", "soft"] = "released"
    """In mode spatext: binary discs, as the paper trained on, or Gaussians, as in the other modes."""
    attn_loss_type: Literal["mse", "bce"] = "bce"
    """How maps are compared."""
    attn_loss_start_timestep: int | None = None
    attn_loss_end_timestep: int | None = None
    """Only timesteps strictly between the two count; null: no bound."""
    attn_loss_select_layer_type: str | None = None
    """Only cross-attention layers whose name contains this; null: all."""
    attn_loss_detach_query: bool = False
    """Whether the loss gives the image's queries no gradient."""
    heatmap_reweight_loss: Literal["humansd", "geodiffusion"] | None = None
    """Weights of the denoising loss over the image."""

    # Optimisation

    seed: int = 0
    """Of everything random."""
    train_batch_size: Positive = 4
    """Images of a micro-batch, in each process."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches of a step."""
    num_train_epochs: Positive = 1
    max_train_steps: Positive | None = None
    """Steps in place of ``num_train_epochs``."""
    learning_rate: Rate = 5e-6
    scale_lr: bool = False
    """Whether ``learning_rate`` is multiplied by micro-batches, their size and processes."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    lr_warmup_steps: Natural = 500
    lr_num_cycles: Positive = 1
    """Restarts of ``cosine_with_restarts``."""
    lr_power: Rate = 1.0
    """Exponent of ``polynomial``."""
    use_8bit_adam: bool = False
    """AdamW with states of 8 bits; needs bitsandbytes."""
    adam_beta1: Probability = 0.9
    adam_beta2: Probability = 0.999
    adam_weight_decay: NonNegative = 1e-2
    adam_epsilon: Rate = 1e-8
    max_grad_norm: Rate = 1.0
    """Gradients are clipped to this norm, those of the control network and of the token embeddings each by itself."""
    clip_tokens: Literal["rows", "table"] = "rows"
    """Whose gradient's norm counts for the latter: the keypoint tokens' own, or the whole token table's, as in the
    released trainer, where all other words of the prompts count too. With random weights (CLIP's text encoder, a narrow
    UNet) the table's norm was some 500 times the rows' in the median of 40 steps, 0.7 at most, so 1.0 clipped neither.
    With trained weights it has not been measured."""

    # How it is computed

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    allow_tf32: bool = False
    """Whether a GPU may round the factors of float32 products to 10 bits."""
    gradient_checkpointing: bool = False
    """Less memory, by computing activations twice."""
    torch_compile: bool = False
    """Whether UNet and control network are compiled: faster steps after a slow first one."""
    dataloader_num_workers: Natural = 0
    """Processes that load data, for each process that trains."""

    # Checkpoints and what is looked at

    checkpointing_steps: Positive = 500
    checkpoints_total_limit: Positive | None = 2
    """Latest checkpoints to keep; null: all."""
    resume_from_checkpoint: Literal["latest"] | None = "latest"
    """Continue from the latest usable checkpoint of this run or of a shorter one; null: start from step 1."""
    logging_steps: Positive = 10
    """Losses are reported every so many steps."""
    logging_dir: PathText = "logs"
    """Folder of TensorBoard's files, below the output."""
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    tracker_project_name: str = "spctrl"
    validation_steps: Positive | None = None
    """Draw images of the validation split every so many steps; null: never."""
    num_validation_images: Positive = 4
    validation_image: tuple[int, ...] = ()
    """Ids of images whose conditions they are drawn from; none: the first ones."""
    validation_prompt: str | None = None
    """Prompt of them all; null: each image's own."""

    def __post_init__(self) -> None:
        for fault in self._faults():
            raise ValueError(fault)

    def _faults(self) -> list[str]:
        """Settings that do not go together, in words."""
        start, end = self.timestep_window
        faults = {
            f"resolution: expected a multiple of {LATENT_MULTIPLE}, found {self.resolution}": self.resolution
            % LATENT_MULTIPLE,
            "conditioning_mode = spatext is for model = controlnet: a T2I-Adapter takes pictures, such as openpose": (
                self.model == "t2i_adapter" and self.conditioning_mode == "spatext"
            ),
            "add_cross_attn_loss is for model = controlnet: a T2I-Adapter has no cross-attention": (
                self.model == "t2i_adapter" and self.add_cross_attn_loss
            ),
            "heatmap_type = partition compares the keypoints that a prompt names: expected add_keypoint_prompt > 0": (
                self.add_cross_attn_loss and self.heatmap_type == "partition" and not self.add_keypoint_prompt
            ),
            "enable_learnable_kpttoken trains the keypoints that a prompt names: expected add_keypoint_prompt > 0": (
                self.enable_learnable_kpttoken and not self.add_keypoint_prompt
            ),
            "expected attn_loss_start_timestep < attn_loss_end_timestep, with a timestep strictly between them, found "
            f"{start} and {end}": end - start < 2,
        }
        return [fault for fault, is_there in faults.items() if is_there]

    @property
    def timestep_window(self) -> tuple[int, int]:
        """Bounds of the timesteps that the keypoint-concept loss counts; they do not count themselves."""
        start, end = self.attn_loss_start_timestep, self.attn_loss_end_timestep
        return -1 if start is None else start, TIMESTEPS if end is None else end

    @property
    def kind(self) -> Literal["spctrl", "controlnet", "t2i_adapter"]:
        """What is trained, as generation calls it."""
        return "spctrl" if self.conditioning_mode == "spatext" else self.model

    @property
    def conditions(self) -> tuple[str, ...]:
        """Conditions of a manifest that training reads; index maps and renders it draws."""
        is_drawn = self.conditioning_mode in DRAWN_MODES and not self.stored_conditions
        condition = () if is_drawn else (CONDITIONS[self.conditioning_mode],)
        extra = ("mask",) if self.use_extra_mask else ()
        latents = ("latents",) if self.use_cached_latents else ()
        return tuple(dict.fromkeys((*condition, *extra, *latents)))


WITHOUT_EFFECT = frozenset(
    {
        "output_dir",
        "dataloader_num_workers",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "logging_steps",
        "logging_dir",
        "report_to",
        "tracker_project_name",
        "validation_steps",
        "num_validation_images",
        "validation_image",
        "validation_prompt",
    }
)
"""Settings that the trained weights do not depend on."""

NEUTRAL = {"clip_tokens": "rows"}
"""See ``without_neutral``."""

RATE_SETTINGS = frozenset(
    {
        "num_train_epochs",
        "max_train_steps",
        "learning_rate",
        "scale_lr",
        "lr_scheduler",
        "lr_warmup_steps",
        "lr_num_cycles",
        "lr_power",
        "text_encoder_lr",
        "text_encoder_lr_scheduler",
    }
)
"""Settings that act through the number of steps and the learning rates of each step alone."""


def read_training_config(path: Path) -> TrainingConfig:
    """A YAML file of configs/train/.

    Raises:
        ConfigurationError: it is not there, or holds unknown settings or values that cannot be.
    """
    return read_config(path, TrainingConfig)


def decisive_settings(config: TrainingConfig) -> dict[str, Any]:
    """Everything that the trained weights depend on, defaults included, except ``NEUTRAL`` ones; JSON values."""
    settings = msgspec.to_builtins(config)
    decisive = {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT}
    return without_neutral(decisive, NEUTRAL)


def computation_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of decisive settings those that, with its learning rates, say what one step computes."""
    return {name: value for name, value in settings.items() if name not in RATE_SETTINGS}


def write_training_config(config: TrainingConfig, path: Path) -> None:
    """Write all settings, defaults included, as a file that ``read_training_config`` reads."""
    path.write_bytes(msgspec.yaml.encode(config))
