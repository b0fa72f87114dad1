"""The keypoint-concept loss against values computed with the released code, where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from spctrl.losses import keypoint_concept_loss  # noqa: E402

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden" / "keypoint_concept_loss" / "loss.pt"
TOLERANCE = 1e-5

pytestmark = pytest.mark.skipif(not GOLDEN.is_file(), reason=f"needs the golden file {GOLDEN}")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found: dict[str, Any] = torch.load(GOLDEN, weights_only=True)
    return found


def test_partition(golden: dict[str, Any]) -> None:
    inputs = golden["inputs"]
    assert golden["losses"]
    for name, case in golden["losses"].items():
        options = case["kwargs"]
        found = keypoint_concept_loss(
            golden["attn_maps"],
            inputs[case["heatmap"]],
            inputs["token_placeholder_mask"],
            inputs["keypoint_prompt_vis_mask"],
            inputs["timesteps"],
            kind=options["attn_target_type"],
            loss=options["loss_type"],
            start=options["loss_start_timestep"],
            end=options["loss_end_timestep"],
            layers=options["select_layer_type"],
        )
        assert found.item() == pytest.approx(case["loss"], rel=TOLERANCE), name


@pytest.mark.parametrize("heatmap", ["heatmap_01", "heatmap_255"])
def test_the_released_target_is_the_8_bit_heatmap(golden: dict[str, Any], heatmap: str) -> None:
    inputs = golden["inputs"]
    found = keypoint_concept_loss(
        golden["attn_maps"],
        inputs[heatmap],
        inputs["token_placeholder_mask"],
        inputs["keypoint_prompt_vis_mask"],
        inputs["timesteps"],
        start=250,
        end=500,
        layers="down_blocks.2",
        target="released",
    )
    expected = golden["losses"]["partition/mse/window=250-500/select=down_blocks.2/heatmap=255"]["loss"]
    assert found.item() == pytest.approx(expected, rel=TOLERANCE)


def test_whole(golden: dict[str, Any]) -> None:
    inputs = golden["inputs"]
    found = keypoint_concept_loss(
        golden["attn_maps"],
        inputs["heatmap_whole"],
        inputs["token_placeholder_mask_whole"],
        None,
        inputs["timesteps"],
        kind="whole",
        loss="bce",
    )
    expected = golden["losses_whole"]["whole/bce/window=none/select=None"]
    assert found.item() == pytest.approx(expected, rel=TOLERANCE)
