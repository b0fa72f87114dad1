"""The objective's terms: the formulas by hand, and what must not matter."""

from __future__ import annotations

from typing import Any

import pytest

from spctrl.errors import ExpectedError

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

from spctrl.losses import denoising_loss, keypoint_concept_loss  # noqa: E402
from spctrl.losses.denoising import geodiffusion_weights, humansd_weights  # noqa: E402
from spctrl.losses.keypoint_concept import normalise, pair_in_order  # noqa: E402

TOKENS, KEYPOINTS, GRID = 77, 17, 64


@pytest.fixture
def batch() -> dict[str, Any]:
    """Three images with 3, 2 and 0 placeholders, in two layers."""
    generator = torch.Generator().manual_seed(0)
    scores = {
        "down_blocks.1.attn2": torch.randn(3, 4, TOKENS, 8, 6, generator=generator),
        "mid_block.attn2": torch.randn(3, 4, TOKENS, 2, 2, generator=generator),
    }
    token_mask, keypoint_mask = torch.zeros(3, TOKENS), torch.zeros(3, KEYPOINTS)
    for image, (tokens, keypoints) in enumerate((([5, 7, 9], [0, 8, 16]), ([4, 30], [2, 3]), ([], []))):
        token_mask[image, tokens], keypoint_mask[image, keypoints] = 1, 1
    return {
        "attention_maps": {name: each.softmax(dim=2) for name, each in scores.items()},
        "heatmaps": torch.rand(3, KEYPOINTS, 40, 40, generator=generator),
        "token_mask": token_mask,
        "keypoint_mask": keypoint_mask,
        "timesteps": torch.tensor([300, 700, 400]),
    }


def by_hand(batch: dict[str, Any], measure: Any, layers: str = "", inside: Any = (0, 1, 2)) -> Any:
    """The loss as its text reads, with loops."""

    def grid(maps: Any) -> Any:
        return F.interpolate(maps, (GRID, GRID), mode="bilinear", align_corners=True)

    chosen = [grid(each.mean(1)) for name, each in batch["attention_maps"].items() if layers in name]
    maps = sum(chosen) / len(chosen)
    entries = []
    for image in range(len(maps)):
        x = (maps[image] - maps[image].min()) / (maps[image].max() - maps[image].min())
        predicted = x[batch["token_mask"][image].bool()]
        expected = grid(batch["heatmaps"][image : image + 1]).clamp(0, 1)[0]
        expected = expected[batch["keypoint_mask"][image].bool()]
        entries.append(measure(predicted, expected, reduction="none") * (image in inside))
    return torch.cat(entries).mean()


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("layers", [None, "mid_block"])
def test_the_keypoint_concept_loss_by_hand(batch: dict[str, Any], loss: str, layers: str | None) -> None:
    measure = {"mse": F.mse_loss, "bce": F.binary_cross_entropy}[loss]
    found = keypoint_concept_loss(**batch, loss=loss, layers=layers)
    torch.testing.assert_close(found, by_hand(batch, measure, layers or ""))


def test_timesteps_outside_the_window_add_zeros_to_the_mean(batch: dict[str, Any]) -> None:
    found = keypoint_concept_loss(**batch, start=250, end=500)
    torch.testing.assert_close(found, by_hand(batch, F.mse_loss, inside=(0,)))
    for bounds in ({"start": 300}, {"end": 300}):  # strictly inside
        batch["timesteps"] = torch.tensor([300, 300, 300])
        assert keypoint_concept_loss(**batch, **bounds) == 0


def test_whole_takes_channel_0_and_the_class_token(batch: dict[str, Any]) -> None:
    batch["token_mask"].zero_()[:, 3] = 1
    found = keypoint_concept_loss(**{**batch, "keypoint_mask": None}, kind="whole")
    batch["keypoint_mask"].zero_()[:, 0] = 1
    torch.testing.assert_close(found, by_hand(batch, F.mse_loss))


def test_partition_needs_a_mask(batch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected a keypoint_mask"):
        keypoint_concept_loss(**{**batch, "keypoint_mask": None})


def test_a_prompt_that_was_cut_off_loses_its_last_keypoints(batch: dict[str, Any]) -> None:
    batch["token_mask"][0, 9] = 0
    found = keypoint_concept_loss(**batch)
    batch["keypoint_mask"][0, 16] = 0
    torch.testing.assert_close(found, by_hand(batch, F.mse_loss))


def test_without_prompts_there_is_no_loss_and_no_gradient(batch: dict[str, Any]) -> None:
    batch["token_mask"].zero_()
    maps = {name: each.requires_grad_() for name, each in batch["attention_maps"].items()}
    loss = keypoint_concept_loss(**{**batch, "attention_maps": maps})
    loss.backward()
    assert loss == 0
    assert not any(each.grad.any() for each in maps.values())


def test_pairs_are_in_order() -> None:
    token_mask, keypoint_mask = torch.zeros(1, TOKENS), torch.zeros(1, KEYPOINTS)
    token_mask[0, [70, 3, 12]], keypoint_mask[0, [16, 1, 4]] = 1, 1
    tokens, keypoints, paired = pair_in_order(token_mask, keypoint_mask)
    assert tokens[paired].tolist() == [3, 12, 70]
    assert keypoints[paired].tolist() == [1, 4, 16]


def test_heads_may_be_averaged_before(batch: dict[str, Any]) -> None:
    expected = keypoint_concept_loss(**batch)
    maps = {name: each.mean(1, keepdim=True) for name, each in batch["attention_maps"].items()}
    torch.testing.assert_close(keypoint_concept_loss(**{**batch, "attention_maps": maps}), expected)


def test_the_released_target_is_a_disc_of_ones(batch: dict[str, Any]) -> None:
    soft = batch["heatmaps"] = (batch["heatmaps"] - 0.5).clamp(min=0)
    found = keypoint_concept_loss(**batch, target="released")
    binary = keypoint_concept_loss(**{**batch, "heatmaps": (soft * 255).floor()})
    assert found == binary != keypoint_concept_loss(**batch)
    levels = (soft * 255).floor()
    for heatmaps in (levels, levels.byte()):
        assert keypoint_concept_loss(**{**batch, "heatmaps": heatmaps}, target="released") == found
    # Sums of instances above 1 saturate.
    assert torch.equal(
        keypoint_concept_loss(**{**batch, "heatmaps": soft.where(soft < 0.4, 1.7)}, target="released"),
        keypoint_concept_loss(**{**batch, "heatmaps": soft.where(soft < 0.4, 1.0)}, target="released"),
    )


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_gradients_are_finite_where_a_placeholder_has_the_extremes(batch: dict[str, Any], loss: str) -> None:
    maps = batch["attention_maps"]["mid_block.attn2"]
    maps[0, :, 5, 0, 0], maps[0, :, 5, 1, 1], maps[0, :, 7, 0, 0] = 0, 1, 0
    maps.requires_grad_()
    keypoint_concept_loss(**batch, loss=loss, layers="mid_block").backward()
    assert maps.grad.isfinite().all()
    assert 0 < maps.grad.norm() < 1e3


def test_maps_of_one_value_are_zeros() -> None:
    maps = torch.full((1, TOKENS, GRID, GRID), 1 / TOKENS, requires_grad=True)
    found = normalise(maps)
    found.sum().backward()
    assert not found.any()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()


def test_half_precision_maps_under_autocast(batch: dict[str, Any]) -> None:
    expected = keypoint_concept_loss(**batch, loss="bce")
    batch["attention_maps"] = {name: each.bfloat16() for name, each in batch["attention_maps"].items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = keypoint_concept_loss(**batch, loss="bce")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_a_layer_that_does_not_exist_is_refused(batch: dict[str, Any]) -> None:
    with pytest.raises(ExpectedError, match=r"'up_blocks'; there are down_blocks.1"):
        keypoint_concept_loss(**batch, layers="up_blocks")


# Denoising


@pytest.fixture
def noises() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)


@pytest.fixture
def heatmaps() -> Any:
    """Image 0 has keypoints in 3 of 64 cells, image 1 has none."""
    made = torch.zeros(2, KEYPOINTS, 8, 8)
    made[0, 0, 1, 1], made[0, 3, 5, 5], made[0, 4, 5, 5], made[0, 16, 7, 0] = 1.0, 0.25, 0.5, 0.5
    return made


def test_denoising_loss_without_weights(noises: tuple[Any, Any]) -> None:
    assert denoising_loss(*noises) == F.mse_loss(*noises)
    halves = [each.bfloat16() for each in noises]
    assert denoising_loss(*halves).dtype == torch.float32


def test_humansd_weights_the_error_by_the_heatmap(noises: tuple[Any, Any], heatmaps: Any) -> None:
    weights = torch.ones(2, 1, 8, 8)
    weights[0, 0, 1, 1], weights[0, 0, 5, 5], weights[0, 0, 7, 0] = 2, 1.5, 1.5
    torch.testing.assert_close(humansd_weights(heatmaps.amax(1, keepdim=True)), weights)
    noise_pred, noise = noises
    found = denoising_loss(noise_pred, noise, heatmaps, "humansd")
    torch.testing.assert_close(found, (weights * (noise_pred - noise)).square().mean())


def test_geodiffusion_weights_the_foreground_by_its_area(noises: tuple[Any, Any], heatmaps: Any) -> None:
    found = geodiffusion_weights(heatmaps.amax(1, keepdim=True))
    foreground, background = 2 / 3**0.2, 1 / 64**0.2
    assert found[0, 0, 1, 1] / found[0, 0, 0, 0] == pytest.approx(foreground / background)
    torch.testing.assert_close(found.mean(dim=(1, 2, 3)), torch.ones(2))
    torch.testing.assert_close(found[1], torch.ones(1, 8, 8))
    noise_pred, noise = noises
    expected = (found * (noise_pred - noise).square()).mean()
    torch.testing.assert_close(denoising_loss(noise_pred, noise, heatmaps, "geodiffusion"), expected)


def test_heatmaps_of_another_size_are_resized(noises: tuple[Any, Any], heatmaps: Any) -> None:
    large = F.interpolate(heatmaps, (64, 64), mode="bilinear", align_corners=True)
    for reweight in ("humansd", "geodiffusion"):
        assert denoising_loss(*noises, large, reweight).isfinite()


@pytest.mark.parametrize("reweight", ["humansd", "geodiffusion"])
def test_weights_need_heatmaps(noises: tuple[Any, Any], reweight: Any) -> None:
    with pytest.raises(ValueError, match=f"expected heatmaps for the weights of {reweight}"):
        denoising_loss(*noises, None, reweight)
