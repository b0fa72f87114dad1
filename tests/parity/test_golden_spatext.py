"""The spatial-text embedding against files computed with the released code, where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from spctrl.models.embedding import SpatextEmbedding  # noqa: E402

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden" / "spatext_embedding"
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-3
HALF_PRECISION = {"output_fp16": (torch.float16, 2e-3), "output_bf16": (torch.bfloat16, 2e-2)}
"""A few units in the last place of values around 1."""

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"needs the golden files in {GOLDEN}")


@pytest.fixture(params=["one", "interp_kpt"])
def golden(request: pytest.FixtureRequest) -> dict[str, Any]:
    path = GOLDEN / f"SpaTextEmbedding_{request.param}_c3.pt"
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def embedding(golden: dict[str, Any], **options: Any) -> SpatextEmbedding:
    made = SpatextEmbedding(golden["out_channels"], golden["skeleton_type"], **options)
    made.load_state_dict(golden["state_dict"], strict=True)
    return made.eval()


def gradients(module: SpatextEmbedding, golden: dict[str, Any]) -> dict[str, Any]:
    module(golden["input_int"].float()).square().mean().backward()
    return {name: each.grad for name, each in module.named_parameters() if each.grad is not None}


def assert_same_direction_and_size(found: Any, expected: Any) -> None:
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 1 - GRADIENT_TOLERANCE
    torch.testing.assert_close(found.norm(), expected.norm(), rtol=GRADIENT_TOLERANCE, atol=0)


def test_output_and_rows(golden: dict[str, Any]) -> None:
    module = embedding(golden)
    torch.testing.assert_close(
        module.keypoint_rows(), golden["text_emb_presigmoid"], rtol=0, atol=OUTPUT_TOLERANCE
    )
    for index_map in (golden["input_int"].float(), golden["input_int"], golden["input_int"].byte()):
        torch.testing.assert_close(module(index_map), golden["output"], rtol=0, atol=OUTPUT_TOLERANCE)


def test_output_in_training_mode_has_the_same_dropout(golden: dict[str, Any]) -> None:
    module = embedding(golden).train()
    torch.manual_seed(4321)
    found = module(golden["input_int"].float())
    # Dropout scales up what it keeps, and with it the rounding of other processors: 1.01e-6 without AVX-512.
    torch.testing.assert_close(found, golden["output_train_seed4321"], rtol=0, atol=2 * OUTPUT_TOLERANCE)


@pytest.mark.parametrize("name", HALF_PRECISION)
def test_output_in_half_precision(golden: dict[str, Any], name: str) -> None:
    dtype, tolerance = HALF_PRECISION[name]
    found = embedding(golden).to(dtype)(golden["input_int"].to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), golden[name], rtol=0, atol=tolerance)


def test_gradients(golden: dict[str, Any]) -> None:
    cases = {"": False, "_detach_kpt_from_sks": True}
    checked = [suffix for suffix in cases if f"grad{suffix}" in golden]
    assert len(checked) == (2 if golden["skeleton_type"] == "interp_kpt" else 1)
    for suffix in checked:
        found = gradients(embedding(golden, detach_links=cases[suffix]), golden)
        norms = golden[f"grad_norms{suffix}"]
        assert found.keys() == norms.keys()
        for name, norm in norms.items():
            assert found[name].norm().item() == pytest.approx(norm, rel=GRADIENT_TOLERANCE), name
        for name, expected in golden[f"grad{suffix}"].items():
            assert_same_direction_and_size(found[name], expected)


def test_gradients_of_learnable_parts(golden: dict[str, Any]) -> None:
    found = gradients(embedding(golden, learn_keypoints=True, learn_skeleton=True), golden)
    expected = golden["grad_learn_kpt_sks"]
    assert found.keys() - golden["grad_norms"].keys() == expected.keys()
    for name, gradient in expected.items():
        assert_same_direction_and_size(found[name], gradient)


def test_what_is_trained(golden: dict[str, Any]) -> None:
    trained = {name: each.requires_grad for name, each in embedding(golden).named_parameters()}
    assert trained == golden["requires_grad"]


def test_a_seed_gives_the_released_initial_weights(golden: dict[str, Any]) -> None:
    torch.manual_seed(golden["init_seed"])
    found = SpatextEmbedding(golden["out_channels"], golden["skeleton_type"]).state_dict()
    assert found.keys() == golden["state_dict"].keys()
    for name, expected in golden["state_dict"].items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0, msg=name)
