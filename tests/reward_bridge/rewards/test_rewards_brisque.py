"""brisque: features and scores of the package brisque 0.2.0, and what it says about distortions."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from reward_bridge.rewards import make_reward
from reward_bridge.rewards.brisque import SupportVectors, fit, scale_features
from tests.helpers.goldens import golden
from tests.helpers.pictures import as_pil, photographs


@pytest.fixture(scope="module")
def case():
    return golden("10_rewards/brisque.npz")


@pytest.fixture
def model(case, tmp_path):
    """A machine with three support vectors, as a file of LIBSVM."""
    file = tmp_path / "allmodel"
    file.write_text(str(case["svm"]))
    return file


def test_features_are_those_of_the_package(case):
    """Up to the edges: the package leaves them out of products, the release goes around them.

    The package finds shapes between the grid's.
    """
    for grey, expected in zip(case["grey"], case["features"], strict=True):
        features = scale_features(torch.from_numpy(grey).double())
        np.testing.assert_allclose(features, expected, rtol=0.03, atol=0.016)
        shape, variance = features[:2]  # without products
        np.testing.assert_allclose(shape, expected[0], rtol=0, atol=5.1e-4)
        np.testing.assert_allclose(variance, expected[1], rtol=1e-10)


def test_the_machine_is_that_of_the_package(case, model):
    machine = SupportVectors(model)
    for features, expected in zip(case["features"], case["score"], strict=True):
        score = machine(np.concatenate([features, 1.1 * features]))
        assert score == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0])
def test_a_fit_finds_the_distribution(shape):
    """Of |x| = (gamma variate)^(1 / shape), twice as wide above 0 as below."""
    rng = np.random.default_rng(0)
    size = rng.gamma(1 / shape, size=400_000) ** (1 / shape)
    above = rng.random(400_000) < 2 / 3
    found, left, right = fit(torch.from_numpy(np.where(above, 2 * size, -size)))
    assert found == pytest.approx(shape, rel=0.02)
    assert right / left == pytest.approx(2, rel=0.02)


def test_scores_of_pictures(model):
    """The order of two scales; a score is that of the features of the picture and of its half."""
    reward = make_reward("brisque", "cpu", {"path": str(model.parent)})
    images = photographs(64, 64)[:2]
    scores = reward(images, ["", ""])
    assert scores.dtype == torch.float32
    grey = np.round(np.einsum("chw,c->hw", images[1], [0.2989, 0.587, 0.114]))
    half = np.asarray(
        Image.fromarray(grey.astype(np.float32)).resize((32, 32), Image.Resampling.BICUBIC)
    ).copy()
    parts = [scale_features(torch.from_numpy(part).double()) for part in (grey, half)]
    expected = -SupportVectors(model)(np.concatenate(parts))
    assert scores[1].item() == pytest.approx(expected, rel=1e-4)


def test_blur_noise_and_compression_move_the_features():
    """Blur makes neighbours alike (wider products above 0), noise makes them independent."""

    def features(picture):
        return scale_features(torch.tensor(np.asarray(picture.convert("L"))).double())

    for picture in as_pil(photographs(64, 64)[:4]):
        plain = features(picture)
        blurred = features(picture.filter(ImageFilter.GaussianBlur(1.5)))
        noise = np.random.default_rng(0).normal(0, 30, np.asarray(picture).shape)
        noisy = features(
            Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype("uint8"))
        )
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=5)
        blocks = features(Image.open(file))
        assert blurred[5] / blurred[4] > plain[5] / plain[4] > noisy[5] / noisy[4]
        assert noisy[1] > plain[1] > blurred[1]
        assert blocks[0] < plain[0]


def test_what_cannot_be_scored_is_an_error(model):
    reward = make_reward("brisque", "cpu", {"path": str(model)})
    with pytest.raises(ValueError, match="picture of one colour"):
        reward(torch.full((1, 3, 32, 32), 7, dtype=torch.uint8), [""])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epsilon_svr", "c_svc", r"ValueError: a machine of the kind \('c_svc', 'rbf'\)"),
        ("total_sv 3", "total_sv 9", "ValueError: 3 support vectors instead of 9"),
        ("rho", "rhu", "KeyError: 'rho'"),
        ("36:", "37:", "IndexError"),
    ],
)
def test_other_files_are_refused(model, old, new, message):
    model.write_text(model.read_text().replace(old, new))
    with pytest.raises(ValueError, match=rf"allmodel is not BRISQUE's model \({message}"):
        make_reward("brisque", "cpu", {"path": str(model)})
