"""KID and FID of images of the same poses: bias, subsets, and the deviations that their intervals come from."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pytest
from numpy.typing import NDArray

from eval.bootstrap import bootstrap, few_images, rescaled, subsamples, support
from eval.fid import Statistics, fid, frechet_distance, statistics
from eval.fid_subsets import PairedFid, nuclear_norms_without, random_half
from eval.kid import PairedKid, kid
from eval.scores import Features, extrapolated_fid_scores, fid_scores, kid_scores
from eval.settings import Intervals, KidSettings

Floats = NDArray[np.float64]
F = 24


def paired_features(
    n: int, generator: np.random.Generator, *, features: int = F, shift: float = 0.4
) -> tuple[Floats, Floats]:
    """Real and generated images of the same poses: alike."""
    scale = 1 / np.sqrt(1 + np.arange(features))
    pose = generator.normal(size=(n, features))
    fake = 0.8 * pose + 0.6 * generator.normal(size=(n, features))
    return scale * pose, scale * (fake + shift)


@functools.cache
def true_kid() -> float:
    """From sets of different poses."""
    generator = np.random.default_rng(99)
    found = []
    for _ in range(20):
        real, fake = paired_features(1000, generator)[0], paired_features(1000, generator)[1]
        found.append(kid(real, fake, subsets=1, subset_size=1000).mean)
    return float(np.mean(found))


def distances_of(n: int) -> tuple[Features, Features, Floats, Floats]:
    real, fake = paired_features(n, np.random.default_rng(n))
    ids = np.arange(n)
    return Features(ids, real.astype(np.float32)), Features(ids, fake.astype(np.float32)), real, fake


# KID


@pytest.mark.parametrize("n", [20, 124])
def test_kid_of_paired_sets_has_no_bias(n: int) -> None:
    generator = np.random.default_rng(n)
    paired, independent = [], []
    for _ in range(250):
        both = paired_features(n, generator)
        paired.append(PairedKid(*both).value)
        independent.append(kid(*both, subsets=1, subset_size=n).mean)
    truth, error = true_kid(), np.std(paired) / np.sqrt(250)
    assert np.mean(paired) == pytest.approx(truth, abs=4 * error)
    assert np.mean(independent) < truth - 5 * error


def test_kid_compares_no_image_with_that_of_its_pose() -> None:
    real, fake = paired_features(6, np.random.default_rng(0))

    def kernel(x: Floats, y: Floats) -> float:
        return float((x @ y / F + 1) ** 3)

    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    expected = np.mean(
        [
            kernel(real[i], real[j])
            + kernel(fake[i], fake[j])
            - kernel(real[i], fake[j])
            - kernel(real[j], fake[i])
            for i, j in pairs
        ]
    )
    paired = PairedKid(real, fake)
    assert paired.value == pytest.approx(expected)
    assert paired(np.ones(6)) == pytest.approx(expected)
    moved = fake[[1, 2, 3, 4, 5, 0]]
    assert PairedKid(real, moved).value != pytest.approx(expected), "who belongs to whom matters"


def test_copies_of_a_pair_are_no_pair_of_images() -> None:
    real, fake = paired_features(12, np.random.default_rng(0))
    paired = PairedKid(real, fake)
    part = PairedKid(real[:5], fake[:5]).value
    assert paired(np.repeat([1, 0], [5, 7])) == pytest.approx(part)
    assert paired(np.repeat([3, 0], [5, 7])) == pytest.approx(part), "three copies of each are no more images"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = paired(np.stack([np.eye(12, dtype=int)[3] * 12, np.ones(12, int)]))
    assert np.isnan(found[0]) and found[1] == pytest.approx(paired.value)


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("n", [20, 60])
def test_the_deviation_of_kid(n: int, shift: float) -> None:
    """Right where KID is large, and where it is noise, in which resamples alone have 1.7 times the deviation."""
    generator = np.random.default_rng(n)
    values, raw, corrected = [], [], []
    for _ in range(300):
        paired = PairedKid(*paired_features(n, generator, shift=shift))
        samples = bootstrap(paired, n, 200)
        values.append(paired.value)
        raw.append(np.nanstd(samples))
        corrected.append(np.nanstd(paired.corrected(samples)))
    ratio, of_raw = np.mean(corrected) / np.std(values), np.mean(raw) / np.std(values)
    assert 0.85 < ratio < 1.25
    assert of_raw > ratio
    assert shift or of_raw > 1.3


@pytest.mark.parametrize("n", [5, 6, 9])
def test_kid_of_few_images_has_an_interval(n: int) -> None:
    real, fake, *_ = distances_of(n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (row,) = kid_scores(real, fake, Intervals(resamples=500), KidSettings()).rows
    assert row.low < row.value < row.high and row.images == n and row.reason == ""


@pytest.mark.parametrize("n", [2, 3, 4])
def test_numbers_of_fewer_images_say_that_they_have_no_interval(n: int) -> None:
    real, fake, *both = distances_of(n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [
            kid_scores(real, fake, Intervals(resamples=50), KidSettings()),
            fid_scores(real, fake, *(statistics(each) for each in both), Intervals(resamples=50))[0],
        ]
    for scores in found:
        (row,) = scores.rows
        assert np.isfinite(row.value) and np.isnan(row.low) and np.isnan(row.high)
        assert row.reason == "no interval of fewer than 5 images"


def test_kid_for_independent_sets_can_be_printed_too() -> None:
    real, fake, *both = distances_of(40)
    intervals = Intervals(resamples=300)
    settings = KidSettings(estimator="independent", subsets=7, subset_size=30)
    (row,) = kid_scores(real, fake, intervals, settings).rows
    (paired,) = kid_scores(real, fake, intervals, KidSettings()).rows
    assert row.value == pytest.approx(kid(*both, subsets=7, subset_size=30).mean, rel=1e-5)
    assert row.value < paired.value and paired.value == pytest.approx(PairedKid(*both).value, rel=1e-5)
    assert row.low - row.value == pytest.approx(paired.low - paired.value)


# FID


@pytest.mark.parametrize("n", [20, 22, 25, 60])
@pytest.mark.filterwarnings("ignore::eval.fid.TooFewImagesWarning")
def test_fid_of_subsets(n: int) -> None:
    """With fewer images than features, and with more; also with two pairs of images that are the same."""
    real, fake = paired_features(n, np.random.default_rng(n))
    real[3], fake[3] = real[5], fake[5]
    paired = PairedFid(real, fake)
    assert paired.of(np.arange(n)) == pytest.approx(fid(real, fake), rel=1e-6)
    left_out = subsamples(n, 30)
    exact = np.array([fid(np.delete(real, each, 0), np.delete(fake, each, 0)) for each in left_out])
    found = paired.without(left_out)
    # A sum in place of an integral: what it is off by is the same for all.
    assert found == pytest.approx(exact, rel=0.02)
    assert (found - exact).std() < 0.02 * exact.std()
    assert paired.of(np.delete(np.arange(n), left_out[0])) == pytest.approx(exact[0], rel=1e-6)


def test_fid_of_the_same_images_is_zero_in_all_subsets() -> None:
    real, _ = paired_features(15, np.random.default_rng(0))
    found = PairedFid(real, real).without(subsamples(15, 10))
    assert np.abs(found).max() < 0.02 and found.std() < 1e-3


@pytest.mark.parametrize("rank", [0, 1, 5, 29])
def test_nuclear_norms_without_some_rows_and_columns(rank: int) -> None:
    generator = np.random.default_rng(rank)
    matrix = generator.normal(size=(30, rank)) @ generator.normal(size=(rank, 30))
    matrix = matrix - matrix.mean(axis=0)
    matrix -= matrix.mean(axis=1, keepdims=True)
    left_out = subsamples(30, 8)
    found = nuclear_norms_without(matrix, left_out)
    for value, out in zip(found, left_out, strict=True):
        rest = np.delete(np.delete(matrix, out, 0), out, 1)
        rest = rest - rest.mean(axis=0)
        rest -= rest.mean(axis=1, keepdims=True)
        assert value == pytest.approx(np.linalg.svd(rest, compute_uv=False).sum(), rel=2e-3, abs=1e-6)


@pytest.mark.parametrize(("n", "features"), [(40, 96), (120, 24)])
def test_the_deviation_of_fid(n: int, features: int) -> None:
    """With fewer images than features, and with more."""
    generator = np.random.default_rng(n)
    left_out = subsamples(n, 60)
    values, deviations = [], []
    for _ in range(120):
        paired = PairedFid(*paired_features(n, generator, features=features))
        values.append(paired.of(np.arange(n)))
        deviations.append(rescaled(values[-1], paired.without(left_out), n, left_out.shape[1]).std(ddof=1))
    assert 0.88 < np.mean(deviations) / np.std(values, ddof=1) < 1.25


def test_extrapolation_removes_most_of_the_bias_of_fid() -> None:
    generator = np.random.default_rng(0)
    covariance_real = np.diag(1 / (1 + np.arange(F)))
    mean = 0.4 / np.sqrt(1 + np.arange(F))
    both = (
        Statistics(mean=each, covariance=covariance_real, num_images=10**6) for each in (np.zeros(F), mean)
    )
    truth = frechet_distance(*both)
    plain, extrapolated = [], []
    for _ in range(60):
        paired = PairedFid(*paired_features(100, generator))
        every = np.arange(100)
        plain.append(paired.of(every))
        extrapolated.append(paired.extrapolated(every, plain[-1], random_half(100, generator)))
    assert abs(np.mean(extrapolated) - truth) < 0.2 * (np.mean(plain) - truth)


def test_extrapolated_fid_says_when_bias_remains() -> None:
    real, fake, *_ = distances_of(40)
    scores, said = extrapolated_fid_scores(real, fake, Intervals(resamples=40))
    (row,) = scores.rows
    assert row.metric == "FID-infinity" and row.low < row.value < row.high
    assert said == [
        "40 images are fewer than 10 for each of 24 features: a part of FID's bias may remain, and the interval "
        "may not hold the true FID"
    ]
    real, fake, *_ = distances_of(10 * F)
    assert extrapolated_fid_scores(real, fake, Intervals(resamples=40))[1] == []
    real, fake, *_ = distances_of(9)
    (row,) = extrapolated_fid_scores(real, fake, Intervals(resamples=40))[0].rows
    assert np.isnan(row.value) and row.reason == "fewer than 10 images"


def test_the_widening_of_an_interval_is_kept_with_its_number() -> None:
    real, fake, *_ = distances_of(20)
    (row,) = kid_scores(real, fake, Intervals(resamples=50), KidSettings()).rows
    assert (row.spread, row.degrees_of_freedom) == tuple(few_images(support(np.ones(20, bool))))
