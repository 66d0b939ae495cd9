"""The distance of a picture to the others of its prompt."""

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from reward_bridge.rewards import make_reward
from reward_bridge.rewards.diversity import nearest_distance
from tests.helpers.goldens import golden


def pictures(n, side):
    draw = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=draw)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A small Dinov2Model folder, and the model."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = Dinov2Model(config).eval()
    model.save_pretrained(folder)
    return folder, model


def test_the_distance_matches_the_golden():
    """Its groups differ in size, so each is a call of its own."""
    case = golden("14_objectives/gardo.npz")
    for group in np.unique(case["group"]):
        rows = case["group"] == group
        got = nearest_distance(torch.from_numpy(case["features"][rows]), int(rows.sum()))
        np.testing.assert_allclose(got, case["diversity"][rows], rtol=1e-4, atol=1e-5)


def test_groups_are_not_compared_with_each_other():
    features = torch.eye(3).repeat(2, 1)
    assert nearest_distance(features, 3).tolist() == [1.0] * 6
    assert nearest_distance(features, 6).tolist() == [0.0] * 6


def test_a_copy_has_no_diversity():
    images = pictures(4, 64)
    images[1] = images[0]
    scores = make_reward("diversity", "cpu", {}).score_groups(images, ["a"] * 4, 4)
    assert scores.dtype == torch.float32
    assert (scores[:2] < 1e-6).all()
    assert (scores[2:] > 0.1).all()


def test_the_distance_shrinks_with_the_differences():
    """Pictures that are mixed with one of them."""
    images = pictures(4, 64).float()
    reward = make_reward("diversity", "cpu", {})
    means = []
    for share in (1.0, 0.5, 0.1):
        mixed = images[:1] + share * (images - images[:1])
        means.append(reward.score_groups(mixed.round().byte(), ["a"] * 4, 4).mean().item())
    assert means[0] > 1.5 * means[1] > 6 * means[2] > 0


def test_dinov2_gives_its_class_token(dino):
    folder, model = dino
    images = pictures(4, 28)
    reward = make_reward("diversity", "cpu", {"path": str(folder), "size": 28})
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    with torch.inference_mode():
        want = model((images / 255 - mean) / std).pooler_output
        torch.testing.assert_close(reward.features(images), want, rtol=1e-4, atol=1e-5)
        scores = reward.score_groups(images, ["a", "a", "b", "b"], 2)
    cosine = torch.nn.functional.cosine_similarity(want[::2], want[1::2])
    np.testing.assert_allclose(scores, np.repeat(1 - cosine.numpy(), 2), rtol=1e-3, atol=1e-5)


def test_pictures_must_be_whole_patches(dino):
    with pytest.raises(ValueError, match=r"diversity.size 30; expected a multiple of the patch"):
        make_reward("diversity", "cpu", {"path": str(dino[0]), "size": 30})
