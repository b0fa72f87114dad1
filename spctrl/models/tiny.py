"""Very small Stable Diffusion 1.5 models with random weights, the same ones each time, in the real ones' formats.

Widths are small and everything else is as in the real models: 49,408 token rows, 77 tokens, latents of an eighth of
the image's side, the names and the number of layers. So whatever loads the real ones loads these.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spctrl.data.datasets import DATASETS
from spctrl.image_models import latents
from spctrl.image_models.loading import mark_random

if TYPE_CHECKING:
    from collections.abc import Sequence

VOCABULARY_SIZE = 49_408
MAX_TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"
TEXT_WIDTH = 32
BLOCK_WIDTHS = (16, 32, 32, 32)
CONDITION_WIDTHS = (4, 8, 8, 16)
"""Of the ControlNet's stem, which works at the condition's full size."""
NORM_GROUPS = 4
LEARNED_EMBEDS = "learned_embeds.bin"
TOKEN_SPREAD = 0.02
"""Of the rows of the text encoder's token embedding."""
CONDITION_STRENGTH = 0.2
"""Spread of the weights that a ControlNet starts with at zero, so that its condition shows."""

WORDS = (
    "a photo picture drawing of the in on are some several there is and with by good close clear background stands "
    "lying portrait painting person people two three man woman dancing standing sitting eye tail ear paw wrist ankle "
    "dog cat horse cow sheep antelope argali bison buffalo zebra deer bear fox wolf lion tiger leopard elephant"
)
"""Words of one token, besides those of keypoints and backgrounds."""


def build_stable_diffusion(folder: Path) -> None:
    """Write the folder of a whole Stable Diffusion 1.5 in diffusers' format."""
    import diffusers
    from diffusers import PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with random_weights(0):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=BLOCK_WIDTHS,
            norm_num_groups=NORM_GROUPS,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=VOCABULARY_SIZE,
                hidden_size=TEXT_WIDTH,
                projection_dim=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                num_attention_heads=4,
                num_hidden_layers=2,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=VOCABULARY_SIZE - 2,
                eos_token_id=VOCABULARY_SIZE - 1,
                pad_token_id=1,
            )
        )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    unet.save_pretrained(folder / "unet")
    text_encoder.save_pretrained(folder / "text_encoder")
    scheduler.save_pretrained(folder / "scheduler")
    latents.build_tiny(folder / "vae")
    write_tokenizer(folder / "tokenizer")
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": diffusers.__version__,
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    mark_random(folder)


def build_controlnet(folder: Path, stable_diffusion: Path) -> None:
    """Write a ControlNet for RGB conditions, made from the UNet of a Stable Diffusion folder."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(stable_diffusion, subfolder="unet", low_cpu_mem_usage=False)
    with random_weights(1):
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=CONDITION_WIDTHS)
        _let_condition_show(controlnet)
    controlnet.save_pretrained(folder)
    mark_random(folder)


def build_spctrl(folder: Path, stable_diffusion: Path, dataset: str) -> None:
    """Write a checkpoint in the released manner: the folder ``controlnet``, and keypoint tokens beside it."""
    import torch
    from diffusers import UNet2DConditionModel

    from spctrl.models import SpCtrlControlNetModel
    from spctrl.models.tokens import PLACEHOLDERS, save_learned_embeds

    unet = UNet2DConditionModel.from_pretrained(stable_diffusion, subfolder="unet", low_cpu_mem_usage=False)
    with random_weights(3):
        controlnet = SpCtrlControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=CONDITION_WIDTHS
        )
        _let_condition_show(controlnet)
        rows = TOKEN_SPREAD * torch.randn((len(PLACEHOLDERS[dataset]), TEXT_WIDTH))
    controlnet.save_pretrained(folder / "controlnet")
    save_learned_embeds(folder / LEARNED_EMBEDS, dict(zip(PLACEHOLDERS[dataset], rows, strict=True)))
    mark_random(folder / "controlnet")


def build_t2i_adapter(folder: Path) -> None:
    """Write a T2I-Adapter for RGB conditions."""
    from diffusers import T2IAdapter

    with random_weights(2):
        adapter = T2IAdapter(in_channels=3, channels=list(BLOCK_WIDTHS), num_res_blocks=2, downscale_factor=8)
    adapter.save_pretrained(folder)
    mark_random(folder)


def _let_condition_show(controlnet: Any) -> None:
    """Give what starts at zero random weights, and the stem such weights that the condition comes through it."""
    from torch import nn

    for parameter in controlnet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=CONDITION_STRENGTH)
    for layer in controlnet.controlnet_cond_embedding.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)


@contextmanager
def random_weights(seed: int) -> Iterator[None]:
    """Weights drawn inside depend on the seed alone, and random numbers outside are none the wiser."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def write_tokenizer(folder: Path) -> None:
    """CLIP's byte-pair tokenizer, in the files of Stable Diffusion 1.5.

    It has CLIP's 49,408 entries, of which all but those for ``WORDS`` and single characters are never used.
    """
    merges = _merges(_words())
    characters = sorted(_byte_characters())
    used = [*characters, *(f"{each}</w>" for each in characters), *("".join(pair) for pair in merges)]
    unused = [f"<unused-{i}></w>" for i in range(VOCABULARY_SIZE - 2 - len(used))]
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {token: i for i, token in enumerate([*used, *unused, START, END])})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "add_prefix_space": False,
            "do_lower_case": True,
            "model_max_length": MAX_TOKENS,
            "tokenizer_class": "CLIPTokenizer",
        },
    )


def _words() -> list[str]:
    """All words that shall be one token."""
    texts = [WORDS]
    for dataset in DATASETS.values():
        texts += [*dataset.backgrounds.values(), *dataset.skeleton.keypoint_names]
    return sorted({word for text in texts for word in text.replace("_", " ").split()})


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, learned until each word is one token.

    tokenizers' own trainer breaks ties at random.
    """
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while counts := Counter(pair for parts in spelled for pair in itertools.pairwise(parts)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        spelled = [_merged(parts, best) for parts in spelled]
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """A word's parts with each occurrence of a pair joined, from the left."""
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _byte_characters() -> list[str]:
    """The printable characters that stand for the 256 bytes."""
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
