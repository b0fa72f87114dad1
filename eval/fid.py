"""Frechet inception distance: features -> statistics -> value.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017. Everything
after the features is float64.

Legend: N images, F features.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval.images import Images
from eval.inception import BATCH_SIZE, REMEDY, Crop, Inception, Resize, load_inception
from spctrl.errors import ExpectedError
from spctrl.io.arrays import read_arrays

Floats = NDArray[np.float64]


class FeaturesError(ExpectedError, ValueError):
    """Features or statistics that no distance can be computed of."""


class TooFewImagesWarning(UserWarning):
    """FID of so few images that a covariance is not of full rank: too high, and the more so the fewer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Gaussian fitted to the features of N images.

    Attributes:
        mean: (F,) float64.
        covariance: (F, F) float64, symmetric, normalised by N - 1.
        num_images: N.
        root: (F, N) float64 whose product with its transpose is the covariance, where that is not of full rank.
    """

    mean: Floats
    covariance: Floats
    num_images: int
    root: Floats | None = None

    @property
    def too_few(self) -> str | None:
        """Why FID from these is too high, in a sentence; None where there are images enough."""
        F = len(self.mean)
        if self.num_images > F:
            return None
        return (
            f"{self.num_images:,} images cannot give a covariance of {F:,} features full rank (that takes "
            f"{F + 1:,}): FID comes out too high. Compare it only with values from as many images"
        )


def fid(
    real: Images | Statistics | ArrayLike,
    fake: Images | Statistics | ArrayLike,
    *,
    weights: Path | str | None = None,
    resize: Resize = "legacy",
    crop: Crop = "none",
    batch_size: int = BATCH_SIZE,
    device: str = "auto",
) -> float:
    """Frechet inception distance of two sets of images; warns loudly where either has too few.

    Args:
        real, fake: each a folder, files, 8-bit RGB arrays, (N, F) features, or ``Statistics`` (also an ``.npz`` file
            of ``save_statistics``).
        weights: torch-fidelity's file of Inception weights; needed where there are images.
        resize, crop: see ``eval.inception.Inception``; what features are given must have been made the same way.
        batch_size: changes nothing but the time.
        device: ``auto``, ``cpu`` or ``cuda:N``.

    Raises:
        ImageError: an image is missing or broken.
        FeaturesError: features are not finite, or of another number than the other side's.
        ExpectedError: there are no such weights.
    """
    network: Inception | None = None
    both: list[Statistics] = []
    for side in (real, fake):
        if is_images(side):
            network = network or _network(weights, resize, crop, device)
            both.append(statistics(network.features(side, batch_size=batch_size)))
        elif isinstance(side, Path | str):
            both.append(load_statistics(Path(side)))
        else:
            both.append(side if isinstance(side, Statistics) else statistics(np.asarray(side)))
    for name, these in zip(("real", "generated"), both, strict=True):
        if these.too_few:
            warnings.warn(f"{name}: {these.too_few}", TooFewImagesWarning, stacklevel=2)
    return frechet_distance(*both)


def is_images(side: Images | Statistics | ArrayLike) -> TypeGuard[Images]:
    """Whether these are images, not features or statistics."""
    if isinstance(side, Path | str):
        return Path(side).suffix.lower() != ".npz"
    if isinstance(side, np.ndarray):
        return side.ndim == 4
    return isinstance(side, Sequence)  # of files or arrays


def _network(weights: Path | str | None, resize: Resize, crop: Crop, device: str) -> Inception:
    if weights is None:
        raise ExpectedError(f"expected weights for the features of images, found none. {REMEDY}")
    return load_inception(weights, resize=resize, crop=crop, device=device)


def checked_features(features: ArrayLike) -> Floats:
    """(N, F) float64.

    Raises:
        FeaturesError: another shape, fewer than two images, or numbers that are not finite.
    """
    values = np.asarray(features, np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise FeaturesError(f"expected features (N, F) of at least 2 images, found shape {values.shape}")
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise FeaturesError(
            f"expected finite features, found NaN or infinite ones for {len(bad)} of {len(values)} images, the first "
            f"number {bad[0]} (from 0). The network's weights are broken, or it overflowed."
        )
    return values


def statistics(features: ArrayLike) -> Statistics:
    """Mean and covariance of (N, F) features.

    Raises:
        FeaturesError: see ``checked_features``.
    """
    values = checked_features(features)
    N, F = values.shape
    mean = values.mean(axis=0)
    root = (values - mean).T / np.sqrt(N - 1)
    return Statistics(mean=mean, covariance=root @ root.T, num_images=N, root=root if N <= F else None)


def save_statistics(path: Path, these: Statistics) -> None:
    """Write an ``.npz`` file, to measure against the same real images again."""
    root = np.empty(0) if these.root is None else these.root
    with path.open("wb") as file:
        np.savez(file, mean=these.mean, covariance=these.covariance, num_images=these.num_images, root=root)


def load_statistics(path: Path) -> Statistics:
    """
    Raises:
        FeaturesError: no such file, or not one of ``save_statistics``.
    """
    try:
        found = read_arrays(path)
        return Statistics(
            mean=found["mean"],
            covariance=found["covariance"],
            num_images=int(found["num_images"]),
            root=found["root"] if found["root"].size else None,
        )
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise FeaturesError(
            f"{path}: expected statistics of features, as written by this project: {error}"
        ) from error


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians (Dowson and Landau, 1982).

    The trace of the square root of the product of both covariances needs no matrix square root. With a factor L of one
    (L Lᵀ) it is the sum of the square roots of the eigenvalues of the symmetric Lᵀ S L, where S is the other; with
    factors L and M of both, that of the singular values of Lᵀ M.

    Raises:
        FeaturesError: not as many features of one as of the other, or numbers that are not finite.
    """
    if first.mean.shape != second.mean.shape:
        raise FeaturesError(
            f"expected as many features of both, found {len(first.mean)} and {len(second.mean)}"
        )
    if not all(
        np.isfinite(each).all() for each in (first.mean, first.covariance, second.mean, second.covariance)
    ):
        raise FeaturesError("expected finite statistics, found NaN or infinite ones")
    offset = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(offset @ offset + traces - 2 * _root_trace(first, second))


def _root_trace(first: Statistics, second: Statistics) -> float:
    if first.root is not None and second.root is not None:
        return float(np.linalg.svd(first.root.T @ second.root, compute_uv=False).sum())
    if second.root is not None:
        first, second = second, first
    factor = _factor(first.covariance) if first.root is None else first.root
    eigenvalues = np.linalg.eigvalsh(factor.T @ second.covariance @ factor)
    return float(np.sqrt(np.maximum(eigenvalues, 0)).sum())


def _factor(covariance: Floats) -> Floats:
    """L with L Lᵀ = the covariance: Cholesky's, or from its eigenvectors where rank is lacking after all."""
    try:
        return np.asarray(np.linalg.cholesky(covariance), np.float64)
    except np.linalg.LinAlgError:
        eigenvalues, vectors = np.linalg.eigh(covariance)
        used = eigenvalues > 0
        return np.asarray(vectors[:, used] * np.sqrt(eigenvalues[used]))
