"""Kernel inception distance.

Binkowski et al., "Demystifying MMD GANs", ICLR 2018: squared maximum mean discrepancy of Inception features under the
kernel (x·y / F + 1)³, by the unbiased estimator, so that it can be a little below zero. Unlike FID's, its mean does not
depend on the number of images. **Scale**: values are as the formula gives them, like torch-fidelity's; papers often
print them times 1,000 (``PRINTED_SCALE``), some times 100.

Legend: N and M images, F features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval.fid import FeaturesError, Floats, checked_features

SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020
"""torch-fidelity's."""
PRINTED_SCALE = 1000


class Kid(NamedTuple):
    """Mean and standard deviation over subsets, not scaled."""

    mean: float
    std: float


def kid(
    real: ArrayLike,
    fake: ArrayLike,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
) -> Kid:
    """KID over random subsets, the same ones as torch-fidelity's ``kid_features_to_metric`` draws.

    Args:
        real, fake: (N, F) and (M, F) features.
        subsets: how many are drawn.
        subset_size: images in each; AP-10K's validation split (995) needs less than the default. With N = M images in
            each subset all subsets are alike, and the deviation is 0.
        seed: of the draws.

    Raises:
        FeaturesError: features are not finite, not as many of one as of the other, or fewer than ``subset_size``.
    """
    first, second = checked_features(real), checked_features(fake)
    if first.shape[1] != second.shape[1]:
        raise FeaturesError(
            f"expected as many features of both, found {first.shape[1]} and {second.shape[1]}"
        )
    if min(len(first), len(second)) < subset_size or subset_size < 2:
        raise FeaturesError(
            f"KID: expected a subset size from 2 to the number of images, {min(len(first), len(second)):,}, found "
            f"{subset_size:,}. Choose a smaller one, and the same one for all methods."
        )
    random = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        x = first[random.choice(len(first), subset_size, replace=False)]
        y = second[random.choice(len(second), subset_size, replace=False)]
        ones = np.ones(subset_size)
        distances.append(_discrepancy(_kernel(x, x), _kernel(x, y), _kernel(y, y), ones))
    return Kid(float(np.mean(distances)), float(np.std(distances)))


class ResampledKid:
    """KID of all images for any weighting of them: the statistic for ``eval.bootstrap``.

    Image i of one set and image i of the other are drawn together. Two draws of one image are no pair of different
    images, and do not count: otherwise the values of resamples would be too high.
    """

    def __init__(self, real: ArrayLike, fake: ArrayLike) -> None:
        first, second = checked_features(real), checked_features(fake)
        if first.shape != second.shape:
            raise FeaturesError(
                f"expected features of as many real as generated images, found {first.shape}, {second.shape}"
            )
        self.kernels = _kernel(first, first), _kernel(first, second), _kernel(second, second)

    def __call__(self, weights: NDArray[Any]) -> float:
        """KID with image i of both sets counted ``weights[i]`` times; with all weights 1, that of all images."""
        return _discrepancy(*self.kernels, np.asarray(weights, np.float64))


def _kernel(x: Floats, y: Floats) -> Floats:
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def _discrepancy(xx: Floats, xy: Floats, yy: Floats, weights: Floats) -> float:
    """Unbiased squared maximum mean discrepancy, row i of both sets counted ``weights[i]`` times."""
    total, squares = weights.sum(), weights**2
    pairs = total**2 - squares.sum()
    within = sum(weights @ kernel @ weights - squares @ np.diag(kernel) for kernel in (xx, yy))
    return float(within / pairs - 2 * (weights @ xy @ weights) / total**2)
