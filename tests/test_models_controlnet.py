"""The SP-Ctrl ControlNet and its attention maps, on small random models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spctrl.errors import ExpectedError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file  # noqa: E402

from spctrl.losses import keypoint_concept_loss  # noqa: E402
from spctrl.models import SpCtrlControlNetModel  # noqa: E402
from spctrl.models.attention import capture_attention  # noqa: E402

WEIGHTS = "diffusion_pytorch_model.safetensors"
TOKENS, TEXT_WIDTH, HEADS = 77, 16, 2
LATENT_HW = (12, 9)
KEPT_HW = {"down_blocks.0": (12, 9), "down_blocks.1": (6, 5), "down_blocks.2": (3, 3), "mid_block": (2, 2)}
STEM = {"conditioning_embedding_out_channels": (2, 2, 4, 4)}


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)  # made before the seed of the first test that asks for it
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=4,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=HEADS,
    ).eval()


@pytest.fixture
def controlnet(unet: Any) -> Any:
    """One whose zero convolutions are not zero, so that all of it matters."""
    made = SpCtrlControlNetModel.from_unet(unet, **STEM)
    for each in made.parameters():
        if each.requires_grad and not each.any():
            torch.nn.init.normal_(each, std=0.1)
    return made.eval()


@pytest.fixture
def inputs() -> dict[str, Any]:
    h, w = LATENT_HW
    return {
        "sample": torch.randn(2, 4, h, w),
        "timestep": torch.tensor([300, 400]),
        "encoder_hidden_states": torch.randn(2, TOKENS, TEXT_WIDTH),
        "controlnet_cond": torch.randint(0, 70, (2, 1, 8 * h, 8 * w)).float(),
    }


def residuals(controlnet: Any, inputs: dict[str, Any]) -> list[Any]:
    down, mid = controlnet(**inputs, return_dict=False)
    return [*down, mid]


def energy(controlnet: Any, inputs: dict[str, Any]) -> Any:
    return sum(each.square().mean() for each in residuals(controlnet, inputs))


def gradients(controlnet: Any) -> dict[str, Any]:
    found = {name: each.grad for name, each in controlnet.named_parameters() if each.grad is not None}
    controlnet.zero_grad()
    return found


# The model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"skeleton_type": "interp_kpt", "learn_keypoints": True, "detach_links": True},
        {"skeleton_type": "zero", "learn_skeleton": True, "layer_version": "sigmoid_version"},
        {"conditioning_channels": 5, "link_table": "humanart", "extra_channels": 1},
    ],
    ids=["default", "interpolated", "sigmoid", "humanart"],
)
def test_what_is_saved_loads_again(
    unet: Any, options: dict[str, Any], inputs: dict[str, Any], tmp_path: Path
) -> None:
    saved = SpCtrlControlNetModel.from_unet(unet, **options, **STEM).eval()
    torch.nn.init.normal_(saved.controlnet_mid_block.weight)
    saved.save_pretrained(tmp_path)
    loaded = SpCtrlControlNetModel.from_pretrained(tmp_path).eval()
    trained = {name: each.requires_grad for name, each in saved.named_parameters()}
    assert {name: each.requires_grad for name, each in loaded.named_parameters()} == trained
    extra = options.get("extra_channels", 0)
    inputs["controlnet_cond"] = inputs["controlnet_cond"].repeat(1, 1 + extra, 1, 1)
    assert loaded.spatext_embedding(inputs["controlnet_cond"][:, :1]).any()
    for each, other in zip(residuals(saved, inputs), residuals(loaded, inputs), strict=True):
        torch.testing.assert_close(each, other)


def test_a_path_in_a_released_config_is_not_read(controlnet: Any, tmp_path: Path) -> None:
    controlnet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "spatext_init_emb": "/somewhere/else.pt"}))
    loaded = SpCtrlControlNetModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.spatext_embedding.keypoint_emb, controlnet.spatext_embedding.keypoint_emb)


def test_initial_embeddings_are_taken_and_no_path_is_kept(unet: Any, tmp_path: Path) -> None:
    initial = torch.randn(17, 768)
    torch.save(initial, tmp_path / "keypoints.pt")
    made = SpCtrlControlNetModel.from_unet(unet, keypoint_init=tmp_path / "keypoints.pt")
    assert torch.equal(made.spatext_embedding.keypoint_emb, initial)
    assert "keypoints.pt" not in made.to_json_string()


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_a_folder_with_other_weights_is_refused(controlnet: Any, change: str, tmp_path: Path) -> None:
    controlnet.save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    name = "spatext_embedding.linear_out.weight"
    if change == "unexpected":
        weights["surplus"] = torch.zeros(1)
    else:
        found = weights.pop(name)
        if change == "mismatched":
            weights[name] = found[:, :-1].contiguous()
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ExpectedError, match="surplus" if change == "unexpected" else name):
        SpCtrlControlNetModel.from_pretrained(tmp_path)


def test_extra_channels_pass_by_the_embedding(unet: Any, inputs: dict[str, Any]) -> None:
    controlnet = SpCtrlControlNetModel.from_unet(unet, extra_channels=1, **STEM).eval()
    torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight)
    torch.nn.init.normal_(controlnet.controlnet_mid_block.weight)
    index_map = inputs.pop("controlnet_cond")
    masks = [torch.zeros_like(index_map), torch.ones_like(index_map)]
    without, within = (
        residuals(controlnet, {**inputs, "controlnet_cond": torch.cat([index_map, mask], 1)})[-1]
        for mask in masks
    )
    assert not torch.equal(without, within)


def test_other_numbers_of_channels_are_refused(controlnet: Any, inputs: dict[str, Any]) -> None:
    inputs["controlnet_cond"] = inputs["controlnet_cond"].repeat(1, 3, 1, 1)
    with pytest.raises(ValueError, match=r"expected controlnet_cond of shape \(B, 1, H, W\)"):
        controlnet(**inputs)


def test_every_trained_parameter_gets_a_gradient_and_no_frozen_one_changes(
    controlnet: Any, inputs: dict[str, Any]
) -> None:
    frozen = {name: each.clone() for name, each in controlnet.named_parameters() if not each.requires_grad}
    assert frozen.keys() == {"spatext_embedding.keypoint_emb", "spatext_embedding.skeleton_emb"}
    before = {name: each.clone() for name, each in controlnet.named_parameters()}
    energy(controlnet, inputs).backward()
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=1e-3, weight_decay=0)
    optimizer.step()
    for name, each in controlnet.named_parameters():
        assert torch.equal(each, before[name]) is (name in frozen), name


# Attention maps


@pytest.mark.parametrize("detach_query", [False, True])
def test_maps_are_probabilities_of_the_chosen_layers(
    controlnet: Any, inputs: dict[str, Any], detach_query: bool
) -> None:
    expected = residuals(controlnet, inputs)
    with capture_attention(controlnet, detach_query=detach_query) as attention:
        found = residuals(controlnet, inputs)
        maps = attention.maps()
    assert len(maps) == 7
    for name, each in maps.items():
        (hw,) = (hw for part, hw in KEPT_HW.items() if name.startswith(part))
        assert each.shape == (2, 1, TOKENS, *hw), name
        torch.testing.assert_close(each.sum(dim=2), torch.ones(2, 1, *hw))
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-4, atol=1e-5)
    with capture_attention(controlnet, "down_blocks.2") as attention:
        residuals(controlnet, inputs)
        chosen = attention.maps()
    assert chosen.keys() == {name for name in maps if name.startswith("down_blocks.2")}
    for name, each in chosen.items():
        torch.testing.assert_close(each, maps[name], rtol=1e-4, atol=1e-6)


def test_maps_equal_a_computation_from_query_and_key(controlnet: Any, inputs: dict[str, Any]) -> None:
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    layer = controlnet.get_submodule(name)
    seen: dict[str, Any] = {}
    hooks = [
        getattr(layer, each).register_forward_hook(lambda _, __, out, each=each: seen.update({each: out}))
        for each in ("to_q", "to_k")
    ]
    with torch.no_grad(), capture_attention(controlnet, name) as attention:
        residuals(controlnet, inputs)
    for hook in hooks:
        hook.remove()
    query, key = (seen[each].unflatten(-1, (layer.heads, -1)).transpose(1, 2) for each in ("to_q", "to_k"))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    expected = scores.softmax(-1).mean(1).transpose(1, 2).unflatten(-1, KEPT_HW["down_blocks.1"])
    torch.testing.assert_close(attention.maps()[name][:, 0], expected)


def test_everything_is_as_before_afterwards(controlnet: Any, inputs: dict[str, Any]) -> None:
    processors = dict(controlnet.attn_processors)
    with (
        pytest.raises(KeyError),
        capture_attention(controlnet, "down_blocks.1") as attention,
        capture_attention(controlnet, "mid_block"),
    ):
        changed = [name for name, each in controlnet.attn_processors.items() if each is not processors[name]]
        assert len(changed) == 3
        raise KeyError
    assert controlnet.attn_processors == processors
    residuals(controlnet, inputs)
    assert attention.maps() == {}


def test_a_layer_that_does_not_exist_is_refused_with_those_that_do(controlnet: Any) -> None:
    with (
        pytest.raises(ExpectedError, match=r"'up_blocks'; there are down_blocks.0"),
        capture_attention(controlnet, "up_blocks"),
    ):
        pass


def map_loss(maps: dict[str, Any]) -> Any:
    """Some function of the maps, of another gradient in each cell."""
    return sum((each * torch.linspace(-1, 1, each.numel()).view_as(each)).sum() for each in maps.values())


def test_a_detached_query_gets_the_gradient_of_the_output_alone(
    controlnet: Any, inputs: dict[str, Any]
) -> None:
    """The gradient is what two computations of the attention would give, one of them with a detached query."""
    layers = "down_blocks.2"

    def found(detach_query: bool, of_output: float, of_maps: float) -> dict[str, Any]:
        with capture_attention(controlnet, layers, detach_query=detach_query) as attention:
            loss = of_output * energy(controlnet, inputs) + of_maps * map_loss(attention.maps())
            loss.backward()
        return gradients(controlnet)

    output, maps = found(True, 1, 0), found(True, 0, 1)
    both, full = found(True, 1, 1), found(False, 0, 1)
    reached = {name for name, each in maps.items() if each.any()}
    text_layers = [
        name for name, _ in controlnet.named_modules() if layers in name and name.endswith("attn2")
    ]
    # With the text embeddings fixed, the maps of a layer train its keys and nothing else.
    assert reached == {f"{name}.to_k.weight" for name in text_layers}
    assert len({name for name, each in full.items() if each.any()}) > 50
    for name, each in both.items():
        torch.testing.assert_close(each, output[name] + maps[name], rtol=1e-4, atol=1e-7, msg=name)
    for name in reached:
        # The last layer's queries are the same either way; the earlier one's keys also reach it through the image.
        torch.testing.assert_close(
            (maps[name] * full[name]).sum() / (maps[name].norm() * full[name].norm()),
            torch.tensor(1.0),
            rtol=0,
            atol=0.05,
        )


@pytest.mark.parametrize("detach_query", [False, True])
def test_gradients_are_the_same_with_gradient_checkpointing(
    controlnet: Any, inputs: dict[str, Any], detach_query: bool
) -> None:
    def found() -> tuple[dict[str, Any], dict[str, Any]]:
        with capture_attention(controlnet, "down_blocks", detach_query=detach_query) as attention:
            loss = energy(controlnet, inputs)
            maps = attention.maps()
            (loss + map_loss(maps)).backward()
            # Blocks were computed again, and that is not a forward pass.
            assert all(attention.maps()[name] is each for name, each in maps.items())
        return maps, gradients(controlnet)

    controlnet.train()
    torch.manual_seed(1)
    expected_maps, expected = found()
    controlnet.enable_gradient_checkpointing()
    torch.manual_seed(1)
    maps, checkpointed = found()
    for name, each in expected_maps.items():
        torch.testing.assert_close(maps[name], each)
    assert checkpointed.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("detach_query", [False, True])
def test_mixed_precision_gives_the_same_maps_and_gradients_about(
    controlnet: Any, inputs: dict[str, Any], detach_query: bool
) -> None:
    def found(enabled: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        with capture_attention(controlnet, "down_blocks.0", detach_query=detach_query) as attention:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                residuals(controlnet, inputs)
                maps = attention.maps()
            sum(each.float().square().sum() for each in maps.values()).backward()
        return maps, gradients(controlnet)

    (expected_maps, expected), (maps, low) = found(False), found(True)
    for name, each in maps.items():
        torch.testing.assert_close(each.float(), expected_maps[name], rtol=0.1, atol=1e-3)
    keys = [name for name in expected if "down_blocks.0" in name and "attn2.to_k" in name]
    assert len(keys) == 2
    for name in keys:
        assert torch.cosine_similarity(low[name].flatten(), expected[name].flatten(), dim=0) > 0.98


def test_maps_of_a_unet(unet: Any, inputs: dict[str, Any]) -> None:
    del inputs["controlnet_cond"]
    with torch.no_grad(), capture_attention(unet) as attention:
        unet(**inputs)
    assert len(attention.maps()) == 16
    assert {each.shape[-2:] for each in attention.maps().values()} == set(KEPT_HW.values())


# Learning


@pytest.mark.slow
def test_the_keypoint_concept_loss_moves_attention_onto_the_keypoints(
    controlnet: Any, inputs: dict[str, Any]
) -> None:
    """Alone, and through what it is meant to train: keys and text embeddings."""
    columns, rows = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="xy")
    heatmaps = torch.zeros(2, 17, 64, 64)
    for image, k, x, y in ((0, 0, 15, 20), (0, 3, 45, 40), (1, 5, 30, 10), (1, 16, 20, 55)):
        heatmaps[image, k] = torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 200)
    keypoint_mask = heatmaps.amax(dim=(2, 3)) > 0
    token_mask = torch.zeros(2, TOKENS, dtype=torch.bool)
    token_mask[:, [4, 6]] = True
    text = torch.nn.Parameter(inputs["encoder_hidden_states"])
    keys = [each for name, each in controlnet.named_parameters() if "attn2.to_k" in name]
    optimizer = torch.optim.Adam([text, *keys], lr=0.05)
    losses = []
    with capture_attention(controlnet, "down_blocks.0", detach_query=True) as attention:
        for _ in range(60):
            controlnet(**{**inputs, "encoder_hidden_states": text})
            loss = keypoint_concept_loss(
                attention.maps(), heatmaps, token_mask, keypoint_mask, inputs["timestep"], start=250, end=500
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]  # at half or less with most seeds
