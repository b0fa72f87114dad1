"""Keypoints in special heatmaps against mmpose 1.3.2, by constants that make_decoding_constants.py wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")

from eval.vitpose.decoding import decode  # noqa: E402

with np.load(Path(__file__).with_name("decoding.npz")) as file:
    CONSTANTS = dict(file)
KINDS = [name.removesuffix("_levels") for name in CONSTANTS if name.endswith("_levels")]
MAX_CELLS = 0.01


def heatmaps_of(kind: str) -> NDArray[np.float32]:
    return CONSTANTS[f"{kind}_levels"].astype(np.float32) / 64


@pytest.mark.parametrize("codec", ["msra", "udp"])
@pytest.mark.parametrize("kind", KINDS)
def test_keypoints_and_scores_equal_mmpose(kind: str, codec: Any) -> None:
    expected = CONSTANTS[f"{kind}_{codec}"]
    found, scores = (each.numpy() for each in decode(torch.from_numpy(heatmaps_of(kind)), codec))
    compared = ~np.isnan(expected)
    assert np.abs(found - expected)[compared].max(initial=0) < MAX_CELLS
    np.testing.assert_array_equal(scores, CONSTANTS[f"{kind}_scores"])
    assert np.isfinite(found).all()


def test_heatmaps_without_a_positive_maximum_are_compared_also_where_they_are_refined() -> None:
    for kind in ("negative", "negative_constant"):
        expected = CONSTANTS[f"{kind}_udp"][CONSTANTS[f"{kind}_scores"] <= 0]
        compared = expected[~np.isnan(expected).any(axis=-1)]
        assert len(compared) > 20
        assert (compared != -1).any(axis=-1).sum() >= 3


def test_memory_layout_does_not_matter() -> None:
    maps = torch.from_numpy(heatmaps_of("negative"))
    expected, _ = decode(maps, "udp")
    for some in (
        maps.contiguous(memory_format=torch.channels_last),
        maps[:1].to(memory_format=torch.channels_last),
    ):
        torch.testing.assert_close(decode(some, "udp")[0], expected[: len(some)], rtol=0, atol=0)
    assert decode(maps[:0], "udp")[0].shape == (0, *expected.shape[1:])
