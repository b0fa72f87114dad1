"""FID of subsets of the images: for its interval, and for its extrapolation to any number of images.

FID depends on the number of different images: the fewer, the higher it is. A bootstrap resample repeats images, and so
has fewer different ones: where there are fewer images than features, the spread of its FID is two to three times too
wide. Subsamples without repetition, which leave out a tenth of the images, do not have that fault
(``eval.bootstrap.subsamples``, ``eval.bootstrap.rescaled``).

Legend: N images, F features, R subsets, D images that a subset leaves out.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from eval.fid import FeaturesError, Floats, checked_features, frechet_distance, statistics

Integers = NDArray[np.int64]

_LOG_T = np.arange(-10.4, 9.2, 1.3)
"""Logarithms of t in ``nuclear_norms_without``, relative to the largest singular value."""
_BLOCK_ENTRIES = 2**18
_MATRICES, _MAX_BYTES = 5, 4 * 2**30
"""Matrices (N, N) that a thread has in memory, and bytes of all threads."""
PRODUCTS_UP_TO = 4
"""Images for each feature, up to which inner products of images are faster than covariances of features."""


class PairedFid:
    """FID of any subset of the images, where image i of both sets is of the same pose.

    With up to ``PRODUCTS_UP_TO`` images for each feature it comes from the images' inner products alone: the trace of
    the root of the product of covariances is the nuclear norm of the matrix of inner products between both sets'
    centred features (for S = Xᵀ X and T = Yᵀ Y it is that of X Yᵀ).
    """

    def __init__(self, real: ArrayLike, fake: ArrayLike) -> None:
        first, second = checked_features(real), checked_features(fake)
        if first.shape != second.shape:
            raise FeaturesError(
                f"expected features of as many real as generated images, found {first.shape}, {second.shape}"
            )
        self.num_images = len(first)
        self._features = first, second
        self._products: tuple[Floats, Floats] | None = None
        if len(first) <= PRODUCTS_UP_TO * first.shape[1]:
            centre = first.mean(axis=0)  # any point will do; near the data less is lost to rounding
            first, second = first - centre, second - centre
            cross = first @ second.T
            self._products = first @ first.T + second @ second.T, cross

    def of(self, images: Integers) -> float:
        """FID of the images with these indices (K,), each different, at least 2."""
        if self._products is None:
            first, second = (each[images] for each in self._features)
            return frechet_distance(statistics(first), statistics(second))
        same, cross = (each[np.ix_(images, images)] for each in self._products)
        centred = _centred(cross)
        # The roots of the eigenvalues of Aᵀ A are exact to 1e-8 of the largest, and take half the time of an SVD.
        eigenvalues = np.linalg.eigvalsh(centred.T @ centred)
        norm = np.sqrt(np.maximum(eigenvalues, 0)).sum()
        K = len(images)
        return float(_moments(same.sum(), np.trace(same), cross.sum(), K) - 2 * norm / (K - 1))

    def without(self, left_out: Integers) -> Floats:
        """(R,) FID of the images that are not among those with the indices (R, D)."""
        N, (R, D) = self.num_images, left_out.shape
        if self._products is None:
            return np.array([self.of(np.delete(np.arange(N), each)) for each in left_out])
        same, cross = self._products
        kept = np.ones((R, N))
        np.put_along_axis(kept, left_out, 0, axis=1)
        sums = [((kept @ each) * kept).sum(axis=1) for each in (same, cross)]
        norms = nuclear_norms_without(_centred(cross), left_out)
        moments = _moments(sums[0], kept @ np.diag(same), sums[1], N - D)
        return np.asarray(moments - 2 * norms / (N - D - 1))

    def extrapolated(self, images: Integers, value: float, is_first_half: NDArray[np.bool_]) -> float:
        """FID of these images (K,) continued to any number of them: ``value``, theirs, less what grows with 1 / K.

        The slope comes from two halves that complete each other, so that what one has by chance, the other has not.

        Args:
            images: indices, ascending.
            value: FID of all of them.
            is_first_half: (N,) in which half each image is; the same for subsets that are compared.
        """
        K, first = len(images), is_first_half[images]
        of_halves = sum(len(half) / K * self.of(half) for half in (images[first], images[~first]))
        return float(2 * value - of_halves)


def random_half(num_images: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    """(N,) whether an image is in a random half."""
    return np.asarray(generator.permutation(num_images) < num_images // 2)


def _centred(products: Floats) -> Floats:
    """Inner products of two sets (K, K), both less their means."""
    return np.asarray(
        products - products.mean(axis=0) - products.mean(axis=1, keepdims=True) + products.mean()
    )


def _moments(same: Floats, trace: Floats, cross: Floats, K: int) -> Floats:
    """Squared distance of the means, and both traces of covariances, of K images.

    Args:
        same: sum of the inner products of images of one set, of both sets together.
        trace: sum of those of an image with itself.
        cross: sum of the inner products between the sets.
        K: how many images.
    """
    return np.asarray((same - 2 * cross) / K**2 + (trace - same / K) / (K - 1))


def nuclear_norms_without(matrix: Floats, left_out: Integers) -> Floats:
    """(R,) nuclear norms of a matrix after the rows and columns with the indices (R, D) are left out, centred again.

    They come from one decomposition of the whole matrix A, since little is left out. For any matrix, ‖A‖ is the
    integral over t > 0 of log det(I + Aᵀ A / t²) / π. A determinant of what is left is that of the whole times that of
    a block of the inverse, which is small and all that differs between the subsets. The integral becomes a sum over
    log t. What it is off by is much the same for all subsets: their standard deviation is right to 1 %.

    Args:
        matrix: (N, N), rows and columns of mean 0.
        left_out: no index twice in a row.
    """
    N, (R, D) = len(matrix), left_out.shape
    # The constant vector, which centring removes, becomes the first singular vector, and the others span the rest.
    shift = 2 * np.linalg.norm(matrix) + 1
    U, values, Vt = np.linalg.svd(matrix + shift / N)
    U, values, Vt = U[:, 1:], values[1:], Vt[1:]
    scale = values.max(initial=0.0)
    if not scale:
        return np.zeros(R)
    values = values / scale
    whole = 2 * np.log1p(-D / N)
    step = max(1, _BLOCK_ENTRIES // D**2)

    def integrand(log_t: float) -> Floats:
        t = np.exp(log_t)
        weight = t**2 / (values**2 + t**2)
        left, right = (U * weight) @ U.T, (Vt.T * weight) @ Vt
        mixed = (U * (weight * values / t)) @ Vt
        logs = np.empty(R)
        for start in range(0, R, step):
            rows = left_out[start : start + step]
            entries = rows[:, :, None] * N + rows[:, None, :]
            a, b, d = (each.reshape(-1).take(entries) for each in (left, mixed, right))
            upper, lower = np.concatenate([a, b], axis=2), np.concatenate([-np.swapaxes(b, 1, 2), d], axis=2)
            block = np.concatenate([upper, lower], axis=1)
            logs[start : start + step] = np.linalg.slogdet(block)[1]
        return np.asarray(t * (logs - whole))

    threads = max(1, min(len(os.sched_getaffinity(0)), _MAX_BYTES // (_MATRICES * matrix.nbytes)))
    # Libraries share small determinants out between cores, which takes longer than computing them.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        integral = sum(pool.map(integrand, _LOG_T)) * (_LOG_T[1] - _LOG_T[0])
    return np.asarray(scale * (values.sum() + integral / np.pi))
