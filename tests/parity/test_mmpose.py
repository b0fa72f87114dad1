"""Poses and their AP against mmpose 1.3.2 itself, by constants that make_mmpose_constants.py wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmpose_cases import CELL_STEP, CONSTANTS, Case, perturbed_predictions, real_case, sample_case, settings
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from conftest import REAL_DATA  # noqa: E402

from eval.pose_ap import evaluate  # noqa: E402
from eval.pose_estimator import PoseEstimator  # noqa: E402
from eval.vitpose import tiny  # noqa: E402
from eval.vitpose.decoding import decode  # noqa: E402

MAX_CELL, MAX_PX, MAX_AP = 1e-4, 0.05, 1e-6
NOISE, MAX_MOVED_CELLS = 1e-6, 1e-3
AP_NAMES = {"AP": "AP", "AP50": "AP .5", "AP75": "AP .75", "AP-M": "AP (M)", "AP-L": "AP (L)", "AR": "AR"}


@pytest.fixture(scope="module")
def constants() -> dict[str, Any]:
    with np.load(CONSTANTS) as file:
        return dict(file)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    tiny.build_mmpose(path)
    return path


@pytest.fixture(scope="module", params=["real", "ap10k", "humanart"])
def case(
    request: pytest.FixtureRequest, constants: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Case]:
    name = request.param
    if name == "real":
        if (found := real_case()) is None:
            pytest.skip(f"no real images in {REAL_DATA / 'ap10k'}")
        return name, found
    ends = np.cumsum(constants[f"{name}_sizes"])
    parts = np.split(constants[f"{name}_files"], ends[:-1])
    boxes = np.split(constants[f"{name}_boxes"], np.cumsum(constants[f"{name}_counts"])[:-1])
    files = {f"{number}.jpg": part.tobytes() for number, part in enumerate(parts)}
    return name, sample_case(tmp_path_factory.mktemp(name), name, files, [each.tolist() for each in boxes])


@pytest.mark.parametrize(("setting", "codec", "flip_test", "shift"), settings())
def test_poses_equal_mmpose(
    setting: str,
    codec: str,
    flip_test: bool,
    shift: bool,
    case: tuple[str, Case],
    weights: Path,
    constants: dict[str, Any],
) -> None:
    name, inputs = case
    estimator = PoseEstimator.from_weights(
        weights, inputs.dataset, codec=codec, flip_test=flip_test, shift_heatmap=shift, device="cpu"
    )
    found = estimator.predict(inputs.images, inputs.bboxes_xywh)
    assert found.heatmaps is not None
    cells = found.heatmaps.reshape(*found.scores.shape, -1)[..., ::CELL_STEP]
    key = f"{name}_{setting}"
    np.testing.assert_allclose(cells, constants[f"{key}_cells"], rtol=0, atol=MAX_CELL)
    np.testing.assert_allclose(found.scores, constants[f"{key}_scores"], rtol=0, atol=MAX_CELL)
    compared = well_conditioned(found.heatmaps, codec)
    assert compared.mean() > 0.9
    expected = constants[f"{key}_keypoints"]
    np.testing.assert_allclose(found.keypoints[compared], expected[compared], rtol=0, atol=MAX_PX)


def well_conditioned(heatmaps: NDArray[np.float32], codec: Any) -> NDArray[np.bool_]:
    """(N, K) keypoints that noise as large as the networks' own differences does not move."""
    noise = NOISE * np.random.default_rng(0).standard_normal(heatmaps.shape).astype(np.float32)
    first, second = (decode(torch.from_numpy(each), codec)[0] for each in (heatmaps, heatmaps + noise))
    return (first - second).abs().amax(dim=-1).numpy() < MAX_MOVED_CELLS


def test_ap_equals_coco_metric(constants: dict[str, Any]) -> None:
    annotations = REAL_DATA / "ap10k" / "annotations" / "ap10k-val-split1.json"
    if not annotations.exists():
        pytest.skip(f"no {annotations}")
    found = evaluate(perturbed_predictions(annotations), annotations, "ap10k").scores
    reported = {
        str(name).removeprefix("coco/"): value
        for name, value in zip(constants["ap_names"], constants["ap_values"], strict=True)
    }
    assert found == pytest.approx({ours: reported[theirs] for ours, theirs in AP_NAMES.items()}, abs=MAX_AP)
