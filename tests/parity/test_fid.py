"""FID and KID against torch-fidelity: the same features of the same images, the same numbers of the same features."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("torch_fidelity")
torch = pytest.importorskip("torch")

from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric  # noqa: E402
from torch_fidelity.metric_kid import kid_features_to_metric  # noqa: E402

from eval.fid import (  # noqa: E402
    FeaturesError,
    Statistics,
    TooFewImagesWarning,
    fid,
    frechet_distance,
    load_statistics,
    save_statistics,
    statistics,
)
from eval.fid_subsets import PairedFid  # noqa: E402
from eval.images import ImageError  # noqa: E402
from eval.inception import Inception, centre_square, load_inception, resize_clean  # noqa: E402
from eval.kid import PairedKid, kid  # noqa: E402
from eval.tiny import build_inception  # noqa: E402
from spctrl.errors import ExpectedError  # noqa: E402

Features = NDArray[np.float64]
F = 48


def features(count: int, seed: int, shift: float = 0.0) -> Features:
    """Correlated and all positive, like Inception's."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(7).normal(size=(F, F)) / math.sqrt(F)
    return np.abs(rng.normal(size=(count, F)) @ mix + shift)


def their_fid(real: Features, fake: Features) -> float:
    these = [fid_features_to_statistics(torch.from_numpy(each)) for each in (real, fake)]
    return float(fid_statistics_to_metric(*these, verbose=False)["frechet_inception_distance"])


def their_kid(real: Features, fake: Features, **settings: Any) -> dict[str, float]:
    found: dict[str, float] = kid_features_to_metric(
        torch.from_numpy(real), torch.from_numpy(fake), verbose=False, rng_seed=2020, **settings
    )
    return found


# The same numbers of the same features


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_fid_of_the_same_features(shift: float) -> None:
    real, fake = features(200, 0), features(150, 1, shift)
    assert fid(real, fake) == pytest.approx(their_fid(real, fake), rel=1e-8)
    assert fid(real, fake) == pytest.approx(fid(fake, real), rel=1e-10)
    assert fid(real, real) == pytest.approx(0, abs=1e-9)


def test_fid_of_known_gaussians() -> None:
    """With commuting covariances: |difference of means|² + sum of (difference of standard deviations)²."""
    one = Statistics(mean=np.zeros(3), covariance=np.diag([1.0, 4.0, 9.0]), num_images=100)
    other = Statistics(mean=np.array([1.0, 2.0, 2.0]), covariance=np.diag([4.0, 4.0, 1.0]), num_images=100)
    assert frechet_distance(one, other) == pytest.approx(9 + 1 + 0 + 4)


def test_fid_of_fewer_images_than_features() -> None:
    """No full rank on either side; torch-fidelity's eigenvalues lose digits there, the singular values do not."""
    real, fake = features(30, 0), features(25, 1, 0.3)
    with pytest.warns(TooFewImagesWarning) as caught:
        found = fid(real, fake)
    assert [str(each.message)[:60] for each in caught] == [
        "real: 30 images cannot give a covariance of 48 features full",
        "generated: 25 images cannot give a covariance of 48 features",
    ]
    assert found == pytest.approx(their_fid(real, fake), rel=1e-5)
    centred = [(each - each.mean(axis=0)) / math.sqrt(len(each) - 1) for each in (real, fake)]
    exact = (
        ((real.mean(axis=0) - fake.mean(axis=0)) ** 2).sum()
        + sum((each**2).sum() for each in centred)
        - 2 * np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    )
    assert found == pytest.approx(exact, rel=1e-10)
    many = features(200, 2)
    with pytest.warns(TooFewImagesWarning):
        mixed = fid(real, many), fid(many, real)
    assert mixed == pytest.approx((their_fid(real, many),) * 2, rel=1e-5)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kid_of_the_same_features(shift: float) -> None:
    real, fake = features(200, 0), features(150, 1, shift)
    expected = their_kid(real, fake, kid_subsets=20, kid_subset_size=60)
    found = kid(real, fake, subsets=20, subset_size=60)
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)


def test_kid_needs_as_many_images_as_a_subset_has() -> None:
    with pytest.raises(
        FeaturesError, match=r"from 2 to the number of images, 150, found 1,000\. Choose a smaller"
    ):
        kid(features(200, 0), features(150, 1))


# What is refused


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    real, fake = features(60, 0), features(60, 1)
    fake[[5, 9], 3] = bad
    for metric in (fid, kid, PairedFid, PairedKid):
        with pytest.raises(FeaturesError, match="for 2 of 60 images, the first number 5"):
            metric(real, fake)


def test_features_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(FeaturesError, match="as many features of both, found 48 and 40"):
        fid(features(60, 0), features(60, 1)[:, :40])
    with pytest.raises(FeaturesError, match="as many features of both, found 48 and 40"):
        kid(features(60, 0), features(60, 1)[:, :40])
    with pytest.raises(FeaturesError, match=r"at least 2 images, found shape \(1, 48\)"):
        fid(features(60, 0), features(1, 0))
    for paired in (PairedFid, PairedKid):
        with pytest.raises(FeaturesError, match=r"found \(60, 48\), \(50, 48\)"):
            paired(features(60, 0), features(50, 1))


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    real, fake = features(60, 0), features(60, 1)
    path = tmp_path / "real.npz"
    save_statistics(path, statistics(real))
    assert load_statistics(path).num_images == 60
    assert fid(path, fake) == fid(statistics(real), fake) == fid(real, fake)
    assert fid(path.rename(tmp_path / "REAL.NPZ"), fake) == fid(real, fake)
    (tmp_path / "REAL.NPZ").rename(path)
    few = statistics(real[:20])
    save_statistics(tmp_path / "few.npz", few)
    assert frechet_distance(load_statistics(tmp_path / "few.npz"), few) == pytest.approx(0, abs=1e-9)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FeaturesError, match=r"real\.npz: expected statistics of features"):
        fid(path, fake)
    with pytest.raises(FeaturesError, match="expected finite statistics"):
        frechet_distance(
            statistics(real), Statistics(mean=np.full(F, np.nan), covariance=np.eye(F), num_images=9)
        )


# The same features of the same images


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    build_inception(path)
    return path


@pytest.fixture(scope="module")
def inception(weights: Path) -> Inception:
    return load_inception(weights, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blurred noise, larger and smaller than the network's input, in a folder of folders."""
    folder = tmp_path_factory.mktemp("photos")
    for number, size_wh in enumerate([(320, 240), (64, 96), (299, 299), (410, 300)]):
        rng = np.random.default_rng(number)
        image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize(
            size_wh, Image.Resampling.BICUBIC
        )
        (folder / f"{number % 2}").mkdir(exist_ok=True)
        image.save(folder / f"{number % 2}/{number}.png")
    return folder


def test_features_are_those_of_torch_fidelity(inception: Inception, weights: Path, photos: Path) -> None:
    network = FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(weights))
    paths = sorted(photos.rglob("*.png"))
    theirs = []
    for path in paths:
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
        with torch.inference_mode():
            theirs.append(network(pixels)[0].numpy())
    expected = np.concatenate(theirs)
    assert (
        expected.shape == (4, 2048) and expected.std(axis=0).mean() > 0.05 * expected.mean()
    )  # they tell images apart
    for batch_size in (1, 3):
        np.testing.assert_allclose(
            inception.features(photos, batch_size=batch_size), expected, rtol=1e-4, atol=1e-5
        )


def test_clean_resizing_is_pils_and_is_antialiased(inception: Inception, weights: Path) -> None:
    """A fine chequerboard becomes grey, where the legacy way makes a coarse pattern of it."""
    board = np.indices((1196, 1196)).sum(axis=0) % 2 * 255
    pixels = np.repeat(board[..., None], 3, axis=-1).astype(np.uint8)
    clean = resize_clean(pixels)
    assert clean.shape == (3, 299, 299) and clean.dtype == np.float32
    assert np.abs(clean - 127.5).max() < 1
    smooth = np.array(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 5, 3), np.uint8)).resize((500, 400))
    )
    rounded = np.asarray(Image.fromarray(smooth).resize((299, 299), Image.Resampling.BICUBIC))
    assert np.abs(np.moveaxis(resize_clean(smooth), 0, -1) - rounded).max() < 1.5
    legacy_features = inception.features([pixels])
    clean_features = load_inception(weights, resize="clean", device="cpu").features([pixels])
    assert np.abs(legacy_features - clean_features).max() > 0.1 * np.abs(legacy_features).max()


def test_the_centre_square() -> None:
    pixels = np.arange(5 * 9 * 3, dtype=np.uint8).reshape(5, 9, 3)
    assert np.array_equal(centre_square(pixels), pixels[:, 2:7])
    assert np.array_equal(centre_square(pixels.transpose(1, 0, 2)), pixels.transpose(1, 0, 2)[2:7])


@pytest.mark.filterwarnings("ignore::eval.fid.TooFewImagesWarning")
def test_fid_of_folders_lists_and_arrays(weights: Path, photos: Path) -> None:
    files = sorted(photos.rglob("*.png"))
    arrays = [np.array(Image.open(path)) for path in files]
    blank = np.zeros((2, 80, 80, 3), np.uint8)
    expected = fid(photos, blank, weights=weights, device="cpu")
    assert expected > 0
    assert fid(files, blank, weights=weights, device="cpu", batch_size=3) == pytest.approx(expected, rel=1e-5)
    assert fid(str(photos), list(blank), weights=weights, device="cpu") == pytest.approx(expected, rel=1e-6)
    assert fid(arrays, blank, weights=weights, device="cpu") == pytest.approx(expected, rel=1e-6)


def test_images_that_cannot_be_measured_are_named(inception: Inception, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes((photos / "0/0.png").read_bytes()[:500])
    (tmp_path / "text.png").write_text("no image")
    for bad, problem in (
        (tmp_path / "none.png", "none.png: expected an image, found no file"),
        (tmp_path / "cut.png", "cut.png: the image cannot be decoded"),
        (tmp_path / "text.png", "text.png: expected an image .*found none"),
        (np.zeros((8, 8), np.uint8), r"expected \(H, W, 3\) uint8, found \(8, 8\) uint8"),
        (np.zeros((8, 8, 3)), r"expected \(H, W, 3\) uint8, found \(8, 8, 3\) float64"),
    ):
        with pytest.raises(ImageError, match=problem):
            inception.features([bad])
    with pytest.raises(ImageError, match=r"0\.png: expected 512 x 512 pixels, found 320 x 240"):
        inception.features(photos, size_wh=(512, 512))
    with pytest.raises(ImageError, match="expected a folder of images, found none at"):
        inception.features(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match=r"expected images .* found none"):
        inception.features(tmp_path / "empty")


def test_weights_that_cannot_be_used_are_named(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ExpectedError, match="expected weights for the features of images, found none"):
        fid(np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ExpectedError, match=r"found no file\. Get weights-inception-2015-12-05"):
        load_inception(tmp_path / "none.pth")
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:1000])
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("cut", "other"):
        with pytest.raises(ExpectedError, match=f"{name}.pth: not the weights of torch-fidelity's Inception"):
            load_inception(tmp_path / f"{name}.pth")
    many = {f"layer{i}.{'x' * 50}": torch.zeros(1) for i in range(100)}
    torch.save(many, tmp_path / "many.pth")
    with pytest.raises(ExpectedError, match=r"Missing key.*\.\.\.\. Get weights") as caught:
        load_inception(tmp_path / "many.pth")
    assert len(str(caught.value)) < 1000, "the keys of a whole network are nothing to read"
    with pytest.raises(ValueError, match="expected resize legacy or clean"):
        load_inception(weights, resize="bilinear")  # type: ignore[arg-type]


def test_weights_that_would_run_code_are_refused(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"Conv2d_1a_3x3.conv.weight": Malicious()}, tmp_path / "malicious.pth")
    with pytest.raises(ExpectedError, match="not the weights of torch-fidelity's Inception"):
        load_inception(tmp_path / "malicious.pth")
    assert not (tmp_path / "ran").exists()


def test_the_tiny_weights_are_small_always_the_same_and_say_that_they_are_random(
    weights: Path, tmp_path: Path
) -> None:
    from spctrl.weights import are_random

    assert are_random(weights)
    assert weights.stat().st_size < 6e6
    build_inception(tmp_path / "again.pth")
    one, other = (torch.load(path, weights_only=True) for path in (weights, tmp_path / "again.pth"))
    assert all(torch.equal(one[name], other[name]) for name in one)
