"""One step of the recommended objective against what the released code computes, where that is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from spctrl.losses import denoising_loss, keypoint_concept_loss  # noqa: E402
from spctrl.models.attention import capture_attention  # noqa: E402
from spctrl.models.controlnet import SpCtrlControlNetModel  # noqa: E402

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden"
RUN = "recommended_eval_g8"
LOSS_TOLERANCE, GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-3, 1e-6
NO_GRADIENT = 1e-7
"""Norms below this are rounding errors."""

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"needs the golden files in {GOLDEN}")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found: dict[str, Any] = torch.load(GOLDEN / "train_step" / "train_step.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def step(golden: dict[str, Any]) -> dict[str, Any]:
    """What one step gives: losses, gradients by name, weights by name after it."""
    batch, run = golden["batch"], golden["runs"][RUN]
    unet = diffusers.UNet2DConditionModel.from_pretrained(GOLDEN / "controlnet_tiny" / "unet").eval()
    unet.requires_grad_(False)
    controlnet = SpCtrlControlNetModel.from_pretrained(GOLDEN / "controlnet_tiny" / "controlnet").eval()
    noisy = diffusers.DDPMScheduler(**golden["scheduler"]).add_noise(
        batch["latents"], batch["noise"], batch["timesteps"]
    )
    options = run["kwargs"]
    layers, text = options["select_layer_type"], batch["encoder_hidden_states"]
    with capture_attention(controlnet, layers, detach_query=run["detach_query"]) as attention:
        down, mid = controlnet(
            noisy,
            batch["timesteps"],
            encoder_hidden_states=text,
            controlnet_cond=batch["spatext_map"],
            return_dict=False,
        )
        noise_pred = unet(
            noisy,
            batch["timesteps"],
            encoder_hidden_states=text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample
        denoise = denoising_loss(noise_pred, batch["noise"])
        concept = keypoint_concept_loss(
            attention.maps(),
            batch["heatmap"],
            batch["token_placeholder_mask"],
            batch["keypoint_prompt_vis_mask"],
            batch["timesteps"],
            kind=options["attn_target_type"],
            loss=options["loss_type"],
            start=options["loss_start_timestep"],
            end=options["loss_end_timestep"],
        )
        loss = denoise + run["weight"] * concept
        loss.backward()
    settings = golden["optimizer"]
    trained = [each for each in controlnet.parameters() if each.requires_grad]
    gradients = {
        name: each.grad.clone() for name, each in controlnet.named_parameters() if each.requires_grad
    }
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, settings["max_grad_norm"])
    torch.optim.AdamW(
        trained,
        lr=run["lr"],
        betas=settings["betas"],
        weight_decay=settings["weight_decay"],
        eps=settings["eps"],
    ).step()
    return {
        "losses": {
            "loss": loss.item(),
            "denoise": denoise.item(),
            "attn": concept.item(),
        },
        "grad_norm": grad_norm.item(),
        "noise_pred": noise_pred.detach(),
        "noisy": noisy,
        "gradients": gradients,
        "weights": {name: each.detach() for name, each in controlnet.named_parameters()},
    }


def test_losses(golden: dict[str, Any], step: dict[str, Any]) -> None:
    expected = golden["runs"][RUN]["log"][0]
    for name, found in step["losses"].items():
        assert found == pytest.approx(expected[name], rel=LOSS_TOLERANCE), name
    assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=GRADIENT_TOLERANCE)


def test_prediction(golden: dict[str, Any], step: dict[str, Any]) -> None:
    expected = golden["runs"][RUN]
    torch.testing.assert_close(step["noisy"], expected["noisy_latents"], rtol=0, atol=1e-6)
    torch.testing.assert_close(step["noise_pred"], expected["model_pred"], rtol=0, atol=1e-5)


def test_gradient_of_each_parameter(golden: dict[str, Any], step: dict[str, Any]) -> None:
    expected = golden["runs"][RUN]["grad_norms"]
    assert step["gradients"].keys() == expected.keys()
    assert step["weights"].keys() - expected.keys() == set(golden["runs"][RUN]["params_without_grad"])
    for name, norm in expected.items():
        found = step["gradients"][name].norm().item()
        assert found == pytest.approx(norm, rel=GRADIENT_TOLERANCE, abs=NO_GRADIENT), name


def test_weights_after_the_step(golden: dict[str, Any], step: dict[str, Any]) -> None:
    expected = golden["runs"][RUN]["checksum_after_step1"]["per_param"]
    assert step["weights"].keys() == expected.keys()
    for name, weight in step["weights"].items():
        close = WEIGHT_TOLERANCE * math.sqrt(weight.numel())
        found = weight.double()
        assert found.norm().item() == pytest.approx(expected[name]["l2"], abs=close), name
        assert found.sum().item() == pytest.approx(expected[name]["sum"], abs=close * 10), name
