"""Configurations of training: names, defaults, faults, and the files of configs/train/."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from spctrl.configuration import ConfigurationError
from spctrl.training.config import (
    NEUTRAL,
    RATE_SETTINGS,
    WITHOUT_EFFECT,
    TrainingConfig,
    decisive_settings,
    read_training_config,
    write_training_config,
)

FILES = sorted((Path(__file__).parents[1] / "configs" / "train").glob("*.yaml"))

# REFERENCE section 10, and the flags of diffusers' ControlNet training that have something to do here.
RELEASED_FLAGS = """
    pretrained_model_name_or_path controlnet_model_name_or_path output_dir dataset_name conditioning_mode use_extra_mask
    add_keypoint_prompt enable_learnable_kpttoken spatext_cond_channels spatext_init_emb spatext_skeleton_type
    spatext_enable_learn_kpt spatext_enable_learn_sks spatext_detach_kpt_grad_from_sks spatext_freeze_embedding
    spatext_layer_version add_cross_attn_loss attn_loss_weight heatmap_type attn_loss_type attn_loss_start_timestep
    attn_loss_end_timestep attn_loss_select_layer_type attn_loss_detach_query text_encoder_lr text_encoder_lr_scheduler
    heatmap_reweight_loss seed resolution train_batch_size num_train_epochs max_train_steps checkpointing_steps
    checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate
    scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power use_8bit_adam dataloader_num_workers adam_beta1
    adam_beta2 adam_weight_decay adam_epsilon max_grad_norm logging_dir allow_tf32 report_to mixed_precision
    max_train_samples proportion_empty_prompts validation_prompt validation_image num_validation_images validation_steps
    tracker_project_name
"""


def write(path: Path, **settings: Any) -> Path:
    given = {"dataset_name": "ap10k", "conditioning_mode": "spatext", **settings}
    path.write_bytes(msgspec.yaml.encode(given))
    return path


def test_the_flags_of_the_released_scripts_are_settings_with_their_defaults(tmp_path: Path) -> None:
    config = read_training_config(write(tmp_path / "a.yaml"))
    assert set(RELEASED_FLAGS.split()) <= {field.name for field in msgspec.structs.fields(TrainingConfig)}
    defaults = {
        "add_keypoint_prompt": 0,
        "spatext_cond_channels": 3,
        "spatext_skeleton_type": "one",
        "attn_loss_weight": 1.0,
        "heatmap_type": "whole",
        "attn_loss_type": "bce",
        "enable_learnable_kpttoken": False,
        "lr_warmup_steps": 500,
        "adam_weight_decay": 1e-2,
        "max_grad_norm": 1.0,
    }
    assert {name: getattr(config, name) for name in defaults} == defaults


def test_the_recommended_run_is_that_of_the_paper() -> None:
    (path,) = (path for path in FILES if path.stem == "ap10k_spctrl")
    config = read_training_config(path)
    recommended = {
        "mixed_precision": "fp16",
        "resolution": 512,
        "learning_rate": 1e-5,
        "train_batch_size": 20,
        "num_train_epochs": 800,
        "proportion_empty_prompts": 0.5,
        "add_keypoint_prompt": 0.8,
        "heatmap_type": "partition",
        "attn_loss_type": "mse",
        "attn_loss_select_layer_type": "down_blocks.2",
        "attn_loss_start_timestep": 250,
        "attn_loss_end_timestep": 500,
        "attn_loss_detach_query": True,
        "enable_learnable_kpttoken": True,
        "text_encoder_lr": 0.5,
        "text_encoder_lr_scheduler": 0.5,
        "attn_loss_weight": 0.1,
        "spatext_cond_channels": 3,
        "spatext_skeleton_type": "one",
        "add_cross_attn_loss": True,
        "clip_tokens": "table",  # as in the released trainer
    }
    assert {name: getattr(config, name) for name in recommended} == recommended


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_can_be_read(path: Path) -> None:
    config = read_training_config(path)
    assert path.stem == "smoke" or path.stem.startswith(f"{config.dataset_name}_")
    assert path.stem.endswith("t2i_adapter") == (config.model == "t2i_adapter")


def test_the_baselines_of_the_table_are_there() -> None:
    methods = ("spctrl", "controlnet_openpose", "controlnet_mask", "controlnet_depth", "t2i_adapter")
    wanted = {f"{dataset}_{method}" for dataset in ("ap10k", "humanart") for method in methods}
    assert wanted <= {path.stem for path in FILES}


def test_humanart_s_runs_have_as_many_steps_as_ap10k_s() -> None:
    configs = {path.stem: read_training_config(path) for path in FILES}
    animals = 7023  # REFERENCE section 1
    for name, config in configs.items():
        if config.dataset_name == "humanart":
            model = configs[name.replace("humanart", "ap10k")]
            steps_per_epoch = math.ceil(animals / model.train_batch_size)
            assert config.max_train_steps == model.num_train_epochs * steps_per_epoch, name
            assert config.train_batch_size == model.train_batch_size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lerning_rate": 1.0}, "no setting 'lerning_rate'; did you mean learning_rate"),
        ({"learning_rate": "fast"}, r"learning_rate"),
        ({"train_batch_size": 0}, r">= 1.*train_batch_size"),
        ({"resolution": 100}, "resolution: expected a multiple of 64, found 100"),
        ({"conditioning_mode": "depth"}, "conditioning_mode"),
        ({"model": "t2i_adapter"}, "a T2I-Adapter takes pictures"),
        (
            {"model": "t2i_adapter", "conditioning_mode": "openpose", "add_cross_attn_loss": True},
            "a T2I-Adapter has no cross-attention",
        ),
        ({"add_cross_attn_loss": True, "heatmap_type": "partition"}, "expected add_keypoint_prompt > 0"),
        ({"enable_learnable_kpttoken": True}, "expected add_keypoint_prompt > 0"),
        (
            {"attn_loss_start_timestep": 500, "attn_loss_end_timestep": 250},
            "expected attn_loss_start_timestep < attn_loss_end_timestep.*found 500 and 250",
        ),
    ],
)
def test_a_fault_is_named_with_its_file(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "faulty.yaml", **settings)
    with pytest.raises(ConfigurationError, match=f"faulty.yaml: .*{message}"):
        read_training_config(path)


def test_only_settings_that_change_the_weights_are_decisive(tmp_path: Path) -> None:
    plain = decisive_settings(read_training_config(write(tmp_path / "a.yaml")))
    harmless = write(
        tmp_path / "b.yaml",
        seed=0,
        checkpointing_steps=7,
        validation_steps=3,
        report_to="none",
        output_dir="x",
    )
    assert decisive_settings(read_training_config(harmless)) == plain
    assert decisive_settings(read_training_config(write(tmp_path / "c.yaml", seed=1))) != plain
    table = decisive_settings(read_training_config(write(tmp_path / "d.yaml", clip_tokens="table")))
    assert table == {**plain, "clip_tokens": "table"}
    fields = {field.name for field in msgspec.structs.fields(TrainingConfig)}
    assert plain.keys() == fields - WITHOUT_EFFECT - {"clip_tokens"}, "fingerprints of before the setting"
    assert set(WITHOUT_EFFECT) | RATE_SETTINGS | set(NEUTRAL) <= {
        field.name for field in msgspec.structs.fields(TrainingConfig)
    }


def test_written_settings_read_back(tmp_path: Path) -> None:
    config = read_training_config(FILES[0])
    write_training_config(config, tmp_path / "all.yaml")
    assert read_training_config(tmp_path / "all.yaml") == config


@pytest.mark.parametrize(
    ("settings", "conditions"),
    [
        ({}, ("latents",)),
        ({"use_cached_latents": False}, ()),
        ({"stored_conditions": True}, ("spatext", "latents")),
        (
            {"conditioning_mode": "zeo_depth_masked", "use_extra_mask": True},
            ("masked_depth", "mask", "latents"),
        ),
        ({"conditioning_mode": "sam_hq_mask", "use_extra_mask": True}, ("mask", "latents")),
    ],
)
def test_conditions_that_a_manifest_must_have(
    tmp_path: Path, settings: dict[str, Any], conditions: tuple[str, ...]
) -> None:
    assert read_training_config(write(tmp_path / "a.yaml", **settings)).conditions == conditions
