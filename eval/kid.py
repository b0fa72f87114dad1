"""Kernel inception distance.

Binkowski et al., "Demystifying MMD GANs", ICLR 2018: squared maximum mean discrepancy of Inception features under the
kernel (x·y / F + 1)³, by the unbiased estimator, so that it can be a little below zero. Unlike FID's, its mean does not
depend on the number of images. **Scale**: values are as the formula gives them, like torch-fidelity's; papers often
print them times 1,000 (``PRINTED_SCALE``), some times 100.

Two estimators, which differ in the pairs of a real and a generated image that they compare:

- ``PairedKid`` is for sets in which image i of both is of the same pose, as in every benchmark here. It leaves out the
  pair (i, i): these two images are more alike than two of different poses.
- ``kid`` compares all pairs, as torch-fidelity does, and assumes that the sets are independent. Of paired sets of n
  images it is off by -2/n (E k(x_i, y_i) - E k(x_i, y_j)), whatever the subsets: too low.

Legend: N and M images, F features.
"""

from __future__ import annotations

import math
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
    """KID of two independent sets over random subsets, the same as torch-fidelity's ``kid_features_to_metric`` takes.

    For sets in which image i of both is of the same pose use ``PairedKid``: of these, this value is too low.

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
        distances.append(_discrepancy(_kernel(x, x), _kernel(x, y), _kernel(y, y)))
    return Kid(float(np.mean(distances)), float(np.std(distances)))


class PairedKid:
    """KID of paired sets for any weighting of the pairs: the statistic for ``eval.bootstrap``.

    It is the U-statistic of Gretton et al., "A Kernel Two-Sample Test", JMLR 13, 2012, lemma 6: the mean over all i and
    j that are different of k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i). It has no bias if the pairs
    (x_i, y_i) are independent of each other. Several copies of a pair in a resample are not different pairs, and do
    not count as such: otherwise the values of resamples would be off.
    """

    def __init__(self, real: ArrayLike, fake: ArrayLike) -> None:
        first, second = checked_features(real), checked_features(fake)
        if first.shape != second.shape:
            raise FeaturesError(
                f"expected features of as many real as generated images, found {first.shape}, {second.shape}"
            )
        cross = _kernel(first, second)
        self._terms = _kernel(first, first) + _kernel(second, second) - cross - cross.T
        np.fill_diagonal(self._terms, 0)

    @property
    def value(self) -> float:
        """KID of all images."""
        return float(self._terms.sum() / (len(self._terms) * (len(self._terms) - 1)))

    def corrected(self, samples: Floats) -> Floats:
        """Values of resamples (R,), moved towards the value of all images so that their variance is right.

        The variance of a U-statistic has a part of single images and one of pairs. Resamples have the latter three
        times: the means over an image's pairs, which stand for single images, hold the chance of these pairs too. That
        matters where KID is no larger than its noise. NaN with fewer than 4 images.
        """
        N = len(self._terms)
        if N < 4:
            return np.full_like(samples, np.nan)
        of_images = self._terms.sum(axis=1) / (N - 1)
        of_pairs = self._terms - of_images[:, None] - of_images + self.value
        np.fill_diagonal(of_pairs, 0)
        pair_variance = 2 * (of_pairs**2).sum() / (N * (N - 1) * N * (N - 3))
        variance = float(np.nanvar(samples, ddof=1))
        if not variance:
            return samples
        factor = math.sqrt(max(variance - 2 * pair_variance, pair_variance) / variance)
        return np.asarray(self.value + (samples - self.value) * min(factor, 1.0))

    def __call__(self, weights: NDArray[Any]) -> Floats:
        """(...) KID with pair i counted ``weights[..., i]`` times; NaN where only one pair has a weight."""
        w = np.asarray(weights, np.float64)
        pairs = w.sum(axis=-1) ** 2 - (w**2).sum(axis=-1)
        total = ((w @ self._terms) * w).sum(axis=-1)
        return np.asarray(np.divide(total, pairs, out=np.full_like(total, np.nan), where=pairs > 0))


def _kernel(x: Floats, y: Floats) -> Floats:
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def _discrepancy(xx: Floats, xy: Floats, yy: Floats) -> float:
    """Unbiased squared maximum mean discrepancy of two independent sets of N images, from their kernels (N, N)."""
    N = len(xx)
    within = sum((kernel.sum() - np.trace(kernel)) / (N * (N - 1)) for kernel in (xx, yy))
    return float(within - 2 * xy.mean())
