"""No configuration makes a network that is larger than its weights, or a schedule or tokenizer of any size."""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from memory import MIB, memory_of

torch = pytest.importorskip("torch", reason="the models extra is not installed")

from spctrl.errors import ExpectedError  # noqa: E402
from spctrl.image_models import depth, sam_networks  # noqa: E402
from spctrl.io.network_size import (  # noqa: E402
    MAX_NUMBER,
    NetworkSizeError,
    check_numbers,
    check_tokenizer,
    parameters_within,
    tensor_shapes,
)
from spctrl.models import stable_diffusion, tiny  # noqa: E402
from spctrl.weights import TorchFileError, read_torch_file  # noqa: E402

MOST_MEMORY = 128 * MIB


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny weights of all kinds."""
    import eval.tiny
    import eval.vitpose.tiny

    folder = tmp_path_factory.mktemp("weights")
    tiny.build_stable_diffusion(folder / "sd")
    tiny.build_spctrl(folder / "spctrl", folder / "sd", "ap10k")
    tiny.build_t2i_adapter(folder / "t2i")
    depth.build_tiny(folder / "depth")
    eval.tiny.build_clip(folder / "clip")
    eval.vitpose.tiny.build_transformers(folder / "vitpose")
    (folder / "sam").mkdir()
    sam_networks.build_tiny("sam", "vit_b", folder / "sam" / "b.pth")
    return folder


def network(kind: Any) -> Callable[[Path], Any]:
    from spctrl.inference.pipeline import load_network

    return lambda folder: load_network(kind, folder)


def loaders() -> dict[str, Callable[[Path], Any]]:
    from eval.clip_score import load_clip_scorer
    from eval.vitpose.checkpoints import load_vitpose
    from spctrl.image_models.latents import load_latent_encoder
    from spctrl.inference.pipeline import unipc
    from spctrl.models.controlnet import SpCtrlControlNetModel

    return {
        "unet": stable_diffusion.load_unet,
        "vae": stable_diffusion.load_vae,
        "latents": lambda folder: load_latent_encoder(weights=folder / "vae", resolution=64, device="cpu"),
        "scale": stable_diffusion.latent_scale,
        "text encoder": stable_diffusion.load_text_encoder,
        "tokenizer": stable_diffusion.load_tokenizer,
        "training's schedule": stable_diffusion.noise_schedule,
        "sampler's schedule": unipc,
        "spctrl": network("spctrl"),
        "spctrl with info": lambda folder: SpCtrlControlNetModel.from_pretrained(
            folder / "controlnet", output_loading_info=True
        ),
        "spctrl itself": lambda folder: SpCtrlControlNetModel.from_pretrained(folder / "controlnet"),
        "t2i": network("t2i_adapter"),
        "depth": lambda folder: depth.load_depth_estimator(weights=folder, device="cpu"),
        "clip": lambda folder: load_clip_scorer(folder, device="cpu"),
        "vitpose": load_vitpose,
        "sam": lambda folder: sam_networks.load_network("sam", "vit_b", folder / "b.pth"),
    }


CONFIG, INPUT, SCHEDULE = "config.json", "preprocessor_config.json", "scheduler/scheduler_config.json"
UNET, VAE, CONTROLNET = "unet/config.json", "vae/config.json", "controlnet/config.json"
FOUND = "found one of"
ATTACKS: dict[str, tuple[str, str, str, dict[str, Any], str]] = {
    "unet, wide": ("unet", "sd", UNET, {"block_out_channels": [8000] * 4}, r"found one of .* Linear\.weight"),
    "unet, deep": ("unet", "sd", UNET, {"layers_per_block": 50_000}, r"found one of .* tensors"),
    "unet, deeper": ("unet", "sd", UNET, {"layers_per_block": 10**9}, r"layers_per_block = 1000000000"),
    "vae, wide": ("vae", "sd", VAE, {"block_out_channels": [5000] * 4}, r"found one of .* Conv2d\.weight"),
    "latents": ("latents", "sd", VAE, {"layers_per_block": 40_000}, r"found one of .* tensors"),
    "vocabulary": ("text encoder", "sd", "text_encoder/config.json", {"vocab_size": 10**8}, "vocab_size = 100000000"),
    "labels": ("text encoder", "sd", "text_encoder/config.json", {"num_labels": 10**8}, "num_labels = 100000000"),
    "text, wide": ("text encoder", "sd", "text_encoder/config.json", {"hidden_size": 60_000}, r"Embedding\.weight"),
    "text, deep": ("text encoder", "sd", "text_encoder/config.json", {"num_hidden_layers": 50_000}, FOUND),
    "ids": ("tokenizer", "sd", "tokenizer/vocab.json", {"zzz</w>": 10**9}, r"vocab\.json: .* zzz</w> = 1000000000"),
    "length": ("tokenizer", "sd", "tokenizer/tokenizer_config.json", {"max_length": 10**9}, "max_length"),
    "negative id": ("tokenizer", "sd", "tokenizer/vocab.json", {"a": -5}, r"vocab\.json: .* found a = -5"),
    "text as id": ("tokenizer", "sd", "tokenizer/vocab.json", {"model_max_length": "7"}, "ids of tokens"),
    "list as id": ("tokenizer", "sd", "tokenizer/vocab.json", {"c": [1]}, "ids of tokens"),
    "text as layers": (
        "text encoder", "sd", "text_encoder/config.json", {"num_hidden_layers": "9"}, "config.json .*num_hidden"
    ),
    "unknown type": ("text encoder", "sd", "text_encoder/config.json", {"dtype": "float3"}, "config.json .*float3"),
    "quantized": ("unet", "sd", UNET, {"quantization_config": [1]}, "config.json: expected no quantization_config"),
    "other weights": ("clip", "clip", CONFIG, {"transformers_weights": "a.bin"}, "expected no transformers_weights"),
    "text as rescaling": (
        "training's schedule", "sd", SCHEDULE, {"rescale_betas_zero_snr": "x", "num_train_timesteps": 0}, "fault"
    ),
    "no noise": ("sampler's schedule", "sd", SCHEDULE, {"trained_betas": []}, "fault"),
    "too few noises": ("training's schedule", "sd", SCHEDULE, {"trained_betas": [0.1] * 3}, "num_train_timesteps"),
    "NaN as noise": ("training's schedule", "sd", SCHEDULE, {"beta_start": math.nan}, "beta_start = nan"),
    "too much noise": ("training's schedule", "sd", SCHEDULE, {"beta_end": 9.0}, "alphas_cumprod"),
    "infinite scale": ("vae", "sd", VAE, {"scaling_factor": math.inf}, "scaling_factor = inf"),
    "infinite scale of latents": ("scale", "sd", VAE, {"scaling_factor": math.inf}, "scaling_factor .* 'inf'"),
    "text as scale": ("vae", "sd", VAE, {"scaling_factor": "NaN"}, "scaling_factor .* 'NaN'"),
    "no scale": ("vae", "sd", VAE, {"scaling_factor": 0}, "scaling_factor .* '0'"),
    "NaN as norm": (
        "text encoder", "sd", "text_encoder/config.json", {"layer_norm_eps": math.nan}, "layer_norm_eps = nan"
    ),
    "added ids": (
        "tokenizer", "sd", "tokenizer/tokenizer_config.json", {"added_tokens_decoder": {"999999999": {}}}, "999999999"
    ),
    "schedule": ("training's schedule", "sd", SCHEDULE, {"num_train_timesteps": 10**12}, "10000"),
    "steps below 0": ("training's schedule", "sd", SCHEDULE, {"num_train_timesteps": -5}, "fault"),
    "sampler": ("sampler's schedule", "sd", SCHEDULE, {"num_train_timesteps": 10**9}, "10000"),
    "spctrl": ("spctrl", "spctrl", CONTROLNET, {"block_out_channels": [9000] * 4}, FOUND),
    "spctrl itself": ("spctrl itself", "spctrl", CONTROLNET, {"layers_per_block": 50_000}, FOUND),
    "spctrl with info": ("spctrl with info", "spctrl", CONTROLNET, {"layers_per_block": 50_000}, FOUND),
    "adapter": ("t2i", "t2i", CONFIG, {"num_res_blocks": 50_000}, FOUND),
    "depth": ("depth", "depth", CONFIG, {"fusion_hidden_size": 40_000}, FOUND),
    "depth's input": ("depth", "depth", INPUT, {"size": {"height": 10**6, "width": 64}}, "1000000"),
    "clip": ("clip", "clip", CONFIG, {"projection_dim": 60_000_000}, "projection_dim = 60000000"),
    "clip's input": ("clip", "clip", INPUT, {"crop_size": {"height": 10**9, "width": 1}}, "crop_size"),
    "vitpose": ("vitpose", "vitpose", CONFIG, {"backbone_config": {"num_hidden_layers": 50_000}}, FOUND),
    "sam": ("sam", "sam", "b.pth.json", {"encoder": {"depth": 50_000}}, FOUND),
    "deep JSON": ("unet", "sd", UNET, {"a": json.loads("[" * 90 + "]" * 90)}, "levels of nesting"),
    "large JSON": ("unet", "sd", UNET, {"a": "x" * 2**20}, "expected at most 1,048,576 bytes"),
}  # fmt: skip


def updated(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    nested = {
        key: updated(config[key], each) for key, each in changes.items() if isinstance(config.get(key), dict)
    }
    return {**config, **changes, **nested}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_configuration_takes_little_memory_and_is_one_sentence(
    attack: str, weights: Path, tmp_path: Path
) -> None:
    loader, source, name, changes, message = ATTACKS[attack]
    shutil.copytree(weights / source, tmp_path / source)
    path = tmp_path / source / name
    path.write_text(json.dumps(updated(json.loads(path.read_text()), changes)))
    load = loaders()[loader]

    def refuse() -> None:
        torch.set_num_threads(1)  # the threads of the process that was forked are not in this one
        with pytest.raises(ExpectedError, match=message) as caught:
            load(tmp_path / source)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)

    assert memory_of(refuse) < MOST_MEMORY


@pytest.mark.parametrize(("layers", "rows"), [(10**8, 1), (10**30, 3), (10**30, 1)])
def test_a_checkpoint_has_no_more_layers_than_tensors(layers: int, rows: int, tmp_path: Path) -> None:
    from eval.vitpose.checkpoints import load_vitpose

    state = {
        "backbone.layers.0.attn.qkv.weight": torch.zeros(rows),
        "backbone.pos_embed": torch.zeros(1, 193, 64),
        "backbone.layers.0.ffn.layers.0.0.weight": torch.zeros(64, 64),
        "head.final_layer.weight": torch.zeros(17, 1),
        f"backbone.layers.{layers}.ln1.weight": torch.zeros(1),
    }
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(ExpectedError, match=r"a\.pth: expected .*(as many layers|but|of a ViTPose)"):
        load_vitpose(tmp_path / "a.pth")


def test_numbers_are_bounded_wherever_they_stand() -> None:
    check_numbers(
        {"a": [MAX_NUMBER, -MAX_NUMBER], "b": {"c": 1e300, "d": True}, "model_max_length": 10**30}, MAX_NUMBER
    )
    check_numbers({"model_max_length": 10**6, "x": [{"model_max_length": 10**30}]}, MAX_NUMBER)
    with pytest.raises(NetworkSizeError, match=r"finite numbers, found b\.c = -inf"):
        check_numbers({"b": {"c": [1, -math.inf]}}, MAX_NUMBER)
    with pytest.raises(NetworkSizeError, match=r"found x\.model_max_length"):
        check_numbers({"x.model_max_length": MAX_NUMBER + 1}, MAX_NUMBER)
    with pytest.raises(NetworkSizeError, match=r"at most 65,536, found b\.c = -65537"):
        check_numbers({"b": {"c": [1, -MAX_NUMBER - 1]}}, MAX_NUMBER)


def test_a_tokenizer_has_files_of_the_size_that_tokenizers_have(tmp_path: Path) -> None:
    with (tmp_path / "merges.txt").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(NetworkSizeError, match=r"merges\.txt: expected a file of at most"):
        check_tokenizer(tmp_path)


def test_what_a_header_says_of_its_file_is_not_believed(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(())}, path)
    assert tensor_shapes(tmp_path) == {"a": (2, 3), "b": ()}
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}).encode()
    twice = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}
    gap = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}
    for data in (
        *(
            len(each).to_bytes(8, "little") + each + bytes(16)
            for each in (json.dumps(h).encode() for h in (twice, gap))
        ),
        len(header).to_bytes(8, "little") + header + bytes(4),
        (2**40).to_bytes(8, "little") + header,
        b"\x07",
        (2).to_bytes(8, "little") + b"[]",
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"model\.safetensors: expected"):
            tensor_shapes(tmp_path)


def test_the_network_of_the_weights_may_be_made_and_loaded_again() -> None:
    layers = [torch.nn.Linear(1000, 1000) for _ in range(3)]
    shapes = {name: tuple(each.shape) for name, each in torch.nn.ModuleList(layers).state_dict().items()}
    with parameters_within(shapes, "config.json"):
        made = torch.nn.ModuleList([torch.nn.Linear(1000, 1000) for _ in range(3)])
        for _ in range(5):  # values that are loaded into it
            made[0].weight = torch.nn.Parameter(torch.zeros(1000, 1000))
    with (
        pytest.raises(
            NetworkSizeError,
            match=r"\(6 tensors, 3,003,000 numbers\).*Linear\.weight of shape \(9000, 9000\)",
        ),
        parameters_within(shapes, "config.json"),
    ):
        torch.nn.Linear(9000, 9000)
    torch.nn.Linear(9000, 1000)  # afterwards all is as before


@pytest.mark.parametrize("mapped", [False, True])
def test_members_of_a_torch_file_may_not_be_compressed(mapped: bool, tmp_path: Path) -> None:
    from spctrl.weights import mapped_torch_file

    torch.save({"a": torch.zeros(10**7)}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as source,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert (tmp_path / "bomb.pth").stat().st_size < MIB

    def refuse() -> None:
        with pytest.raises(TorchFileError, match="not compressed"):
            (mapped_torch_file if mapped else read_torch_file)(tmp_path / "bomb.pth")

    assert memory_of(refuse) < 8 * MIB
