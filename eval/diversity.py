"""Diversity: how different the images are that a method makes of one pose.

Legend: N images, F features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from eval.fid import FeaturesError, checked_features


def diversity(features: ArrayLike, poses: ArrayLike) -> dict[int, float]:
    """Mean Euclidean distance between the features of two images of a pose, for each pose.

    Args:
        features: (N, F), such as Inception's.
        poses: (N,) int, the pose (its image id) that each image was made of.

    Returns:
        By pose, ascending; the mean over poses is a method's diversity.

    Raises:
        FeaturesError: features are not finite, or a pose has a single image.
    """
    values, owners = checked_features(features), np.asarray(poses)
    if owners.shape != (len(values),):
        raise FeaturesError(f"expected the pose of each of {len(values)} images, found shape {owners.shape}")
    found = {}
    for pose in np.unique(owners):
        group = values[owners == pose]
        if len(group) < 2:
            raise FeaturesError(
                f"diversity needs at least 2 images of each pose, found 1 of pose {pose}. Generate more of each."
            )
        first, second = np.triu_indices(len(group), k=1)
        found[int(pose)] = float(np.linalg.norm(group[first] - group[second], axis=1).mean())
    return found
