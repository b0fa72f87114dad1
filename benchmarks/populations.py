"""Populations of poses and of Inception features whose true values are known, for ``benchmarks.coverage``."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval.fid import Statistics, frechet_distance
from eval.instances import GroundTruth, Poses
from eval.kid import kid
from eval.pose_ap import evaluate, oks_sigmas

Floats = NDArray[np.float64]
SPECIES_IMAGES = (3, 5, 6, 7, 8, 8, 9, 9, 14, 16, 17, 18, 18, *[20] * 32, 25, 25, 27, 40, 100)
"""Images of each species in AP-10K's validation split."""
TRUE_IMAGES = 100_000
"""That true pose AP comes from, the same number of each species."""
SCALE_SPREAD = 0.3
KID_SETS, KID_SET_IMAGES = 40, 2000
"""Independent sets that true KID comes from."""


class PosePopulation(NamedTuple):
    """Images of animals, with the poses that methods' images have.

    Attributes:
        shares: (C,) of the images, for each species.
        difficulty: (C,) logarithm of how far poses are off.
        size: (C,) logarithm of an instance's relative size.
    """

    shares: Floats
    difficulty: Floats
    size: Floats

    def sample(
        self, species_of: NDArray[np.int64], methods: int, generator: np.random.Generator
    ) -> tuple[GroundTruth, list[Poses]]:
        """Images of these species (n,): their annotations, and each method's poses. Some images have several."""
        n, K, sigmas = len(species_of), 17, oks_sigmas("ap10k")
        counts = 1 + np.minimum(generator.poisson(0.3, n), 4)
        image_of = np.repeat(np.arange(n), counts)
        G = len(image_of)
        category_of = species_of[image_of]
        side = np.exp(generator.normal(4.9 + self.size[category_of], 0.6))
        offset = generator.uniform(0, 400, (G, 1, 2))
        points = offset + generator.uniform(0, 1, (G, K, 2)) * side[:, None, None]
        low, high = points.min(axis=1), points.max(axis=1)
        boxes = np.concatenate([low, high - low], axis=1)
        truth = GroundTruth(
            image_ids=np.arange(n),
            sizes_wh=np.full((n, 2), 1e4),
            scenarios=("",) * n,
            category_ids=np.arange(len(self.shares)),
            category_names=tuple(f"species {i}" for i in range(len(self.shares))),
            image_of=image_of,
            category_of=category_of,
            annotation_ids=np.arange(G),
            keypoints=np.concatenate([points, np.full((G, K, 1), 2.0)], axis=2),
            bboxes_xywh=boxes,
            areas=0.5 * side**2,
            crowd=np.zeros(G, bool),
            ignored=np.zeros(G, bool),
        )
        difficulty = 0.6 * generator.normal(size=n)[image_of] + self.difficulty[category_of] - 0.2
        found = []
        for _ in range(methods):
            errors = np.exp(difficulty + 0.6 * generator.normal(size=G))
            spread = (errors * side * math.sqrt(0.5))[:, None] * sigmas
            scores = np.clip(np.exp(-0.5 * errors) + 0.1 * generator.normal(size=G), 0.25, 1)
            found.append(
                Poses(
                    image_ids=image_of,
                    category_ids=category_of,
                    annotation_ids=np.arange(G),
                    bboxes_xywh=boxes,
                    bbox_scores=np.ones(G),
                    keypoints=points + generator.normal(size=(G, K, 2)) * spread[..., None],
                    keypoint_scores=np.tile(scores[:, None], K),
                )
            )
        return truth, found

    def true_values(self) -> dict[str, float]:
        """Pose AP and its relatives of infinitely many images, nearly."""
        species = np.repeat(np.arange(len(self.shares)), TRUE_IMAGES // len(self.shares))
        truth, (found,) = self.sample(species, 1, np.random.default_rng(2))
        return evaluate(found, truth, "ap10k").scores


@functools.cache
def pose_population(num_species: int) -> PosePopulation:
    generator = np.random.default_rng(num_species)
    shares = np.array(SPECIES_IMAGES if num_species > 1 else (1,), np.float64)
    return PosePopulation(
        shares / shares.sum(),
        0.5 * generator.normal(size=len(shares)),
        0.5 * generator.normal(size=len(shares)),
    )


class FeaturePopulation(NamedTuple):
    """Inception features of real images, and of a method's images of the same poses: normal but for a common scale.

    Attributes:
        real, fake: (F, F) what standard normal values are multiplied with.
        shift: (F,) mean of the generated images; that of the real ones is 0.
    """

    real: Floats
    fake: Floats
    shift: Floats

    def poses(self, n: int, generator: np.random.Generator) -> Floats:
        """(n, 1 + F) what a real image and those generated of its pose have in common."""
        return generator.normal(size=(n, 1 + len(self.real)))

    def real_features(self, poses: Floats) -> Floats:
        """(n, F)"""
        return np.asarray(np.exp(SCALE_SPREAD * poses[:, :1]) * (poses[:, 1:] @ self.real))

    def fake_features(self, poses: Floats, generator: np.random.Generator) -> Floats:
        """(n, F)"""
        values = 0.5 * poses[:, 1:] + math.sqrt(0.75) * generator.normal(size=(len(poses), len(self.fake)))
        return np.asarray(np.exp(SCALE_SPREAD * poses[:, :1]) * (values @ self.fake) + self.shift)

    def true_fid(self) -> float:
        scale = math.exp(2 * SCALE_SPREAD**2)
        covariances = [scale * each.T @ each for each in (self.real, self.fake)]
        both = [
            Statistics(mean=mean, covariance=covariance, num_images=2 * len(mean))
            for mean, covariance in zip((np.zeros_like(self.shift), self.shift), covariances, strict=True)
        ]
        return frechet_distance(*both)

    def true_kid(self) -> tuple[float, float]:
        """From independent sets, and its standard error."""
        generator = np.random.default_rng(1)
        found = []
        for _ in range(KID_SETS):
            real = self.real_features(self.poses(KID_SET_IMAGES, generator))
            fake = self.fake_features(self.poses(KID_SET_IMAGES, generator), generator)
            found.append(kid(real, fake, subsets=1, subset_size=KID_SET_IMAGES).mean)
        return float(np.mean(found)), float(np.std(found, ddof=1) / math.sqrt(KID_SETS))


@functools.cache
def feature_population(F: int) -> FeaturePopulation:
    generator = np.random.default_rng(F)
    spectrum = (1 / np.sqrt(1 + np.arange(F)))[:, None]
    mix = generator.normal(size=(2, F, F)) / math.sqrt(F)
    shift = 0.9 * generator.normal(size=F) / math.sqrt(F)
    return FeaturePopulation(spectrum * mix[0], spectrum * (mix[0] + 0.5 * mix[1]), shift)
