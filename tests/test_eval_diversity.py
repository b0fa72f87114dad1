"""Diversity of several images of one pose."""

from __future__ import annotations

import numpy as np
import pytest

from eval.diversity import diversity
from eval.fid import FeaturesError


def test_the_mean_distance_within_each_pose() -> None:
    features = np.array([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0], [0.0, 8.0], [10.0, 0.0]])
    found = diversity(features, [7, 7, 3, 7, 3])
    assert found == {3: 0.0, 7: pytest.approx((5 + 8 + 5) / 3)}
    assert list(found) == [3, 7]


def test_single_images_and_broken_features_are_refused() -> None:
    with pytest.raises(FeaturesError, match="at least 2 images of each pose, found 1 of pose 5"):
        diversity(np.zeros((3, 2)), [4, 4, 5])
    with pytest.raises(FeaturesError, match="expected the pose of each of 3 images"):
        diversity(np.zeros((3, 2)), [4, 4])
    with pytest.raises(FeaturesError, match="for 1 of 2 images"):
        diversity([[0.0], [np.nan]], [1, 1])
