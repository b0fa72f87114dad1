"""The SP-Ctrl ControlNet against a folder saved, and outputs computed, with the released code, where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from safetensors.torch import load_file  # noqa: E402

from spctrl.models.controlnet import SpCtrlControlNetModel  # noqa: E402

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden" / "controlnet_tiny"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TOLERANCE = 1e-4

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"needs the golden files in {GOLDEN}")


@pytest.fixture(scope="module")
def io() -> dict[str, Any]:
    found: dict[str, Any] = torch.load(GOLDEN / "io.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def unet() -> Any:
    return diffusers.UNet2DConditionModel.from_pretrained(GOLDEN / "unet").eval()


@pytest.fixture(scope="module")
def controlnet() -> Any:
    return SpCtrlControlNetModel.from_pretrained(GOLDEN / "controlnet").eval()


def residuals(controlnet: Any, inputs: dict[str, Any]) -> list[Any]:
    with torch.no_grad():
        down, mid = controlnet(
            inputs["noisy_latents"],
            inputs["timesteps"],
            encoder_hidden_states=inputs["encoder_hidden_states"],
            controlnet_cond=inputs["spatext_map"],
            return_dict=False,
        )
    return [*down, mid]


def assert_close(found: Any, expected: Any) -> None:
    assert (found - expected).norm() <= TOLERANCE * expected.norm()


def test_residuals(controlnet: Any, io: dict[str, Any]) -> None:
    expected = [*io["outputs"]["down"], io["outputs"]["mid"]]
    for each, other in zip(residuals(controlnet, io["inputs"]), expected, strict=True):
        assert_close(each, other)


def test_residuals_steer_the_unet(controlnet: Any, unet: Any, io: dict[str, Any]) -> None:
    inputs = io["inputs"]
    *down, mid = residuals(controlnet, inputs)
    with torch.no_grad():
        found = unet(
            inputs["noisy_latents"],
            inputs["timesteps"],
            encoder_hidden_states=inputs["encoder_hidden_states"],
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample
    assert_close(found, io["unet_sample_with_residuals"])


def test_a_saved_folder_has_the_released_names(controlnet: Any, unet: Any, tmp_path: Path) -> None:
    """Of the released model, saved again, and of one that starts here."""
    expected_config = json.loads((GOLDEN / "controlnet" / "config.json").read_bytes())
    expected = load_file(GOLDEN / "controlnet" / WEIGHTS)
    for name, model in {"again": controlnet, "new": SpCtrlControlNetModel.from_unet(unet)}.items():
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_bytes())
        assert config.keys() - {"_name_or_path"} == expected_config.keys()
        differing = {key for key in expected_config if config[key] != expected_config[key]}
        assert differing <= {"_diffusers_version"}
        saved = load_file(tmp_path / name / WEIGHTS)
        assert {key: each.shape for key, each in saved.items()} == {
            key: each.shape for key, each in expected.items()
        }
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert all(torch.equal(again[key], expected[key]) for key in expected)


def test_it_starts_from_the_unet(unet: Any, io: dict[str, Any]) -> None:
    """With the UNet's encoder, and zero residuals."""
    controlnet = SpCtrlControlNetModel.from_unet(unet).eval()
    of_unet, found = unet.state_dict(), controlnet.state_dict()
    shared = [
        key for key in found if key.startswith(("conv_in.", "time_embedding.", "down_blocks.", "mid_block."))
    ]
    assert len(shared) > 200
    assert all(torch.equal(found[key], of_unet[key]) for key in shared)
    assert not any(each.any() for each in residuals(controlnet, io["inputs"]))
