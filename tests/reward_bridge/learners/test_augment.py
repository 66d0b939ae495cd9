"""Augmentation, against formulas written out."""

import colorsys
import math

import numpy as np
import pytest
import torch

from reward_bridge.learners import augment
from tests.helpers.pictures import photographs


def test_augmentation_by_hand():
    x = photographs(12, 10)[0].float() / 255
    for pixel, turned in zip(
        x.flatten(1).T[:20], augment.turn_hue(x, 0.3).flatten(1).T, strict=False
    ):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel.tolist())
        np.testing.assert_allclose(
            turned, colorsys.hsv_to_rgb((hue + 0.3) % 1, saturation, value), atol=1e-5
        )
    np.testing.assert_allclose(
        augment.turn_hue(torch.full((3, 2, 2), 0.4), 0.3), torch.full((3, 2, 2), 0.4)
    )

    point = torch.zeros(1, 7, 7)
    point[0, 3, 3] = 1
    g = [math.exp(-(i**2) / (2 * 0.8**2)) for i in range(-2, 3)]
    spread = augment.blur(point, 5, 0.8)[0]
    np.testing.assert_allclose(spread[1:6, 1:6], np.outer(g, g) / sum(g) ** 2, rtol=1e-5)
    assert spread.sum().item() == pytest.approx(1)
    np.testing.assert_allclose(
        augment.blur(torch.ones(3, 4, 4), 3, 2.0), torch.ones(3, 4, 4), rtol=1e-6
    )

    np.testing.assert_allclose(
        augment.grey(torch.eye(3)[:, :, None])[0, :, 0], [0.299, 0.587, 0.114], rtol=1e-6
    )
    np.testing.assert_allclose(augment.jitter(x, 0, 0, 0, 0), x, atol=1e-6)
    torch.manual_seed(0)
    for _ in range(20):  # of one even grey only the brightness can change, by 10 % at most
        value = augment.jitter(torch.full((3, 2, 2), 0.5), 0.1, 0.1, 0.1, 0.05)
        assert 0.45 - 1e-6 <= value.min() <= value.max() <= 0.55 + 1e-6
        assert value.max() - value.min() < 1e-6


def test_pictures_are_augmented_each_for_itself():
    picture = photographs(16, 16)[:1]
    torch.manual_seed(0)
    many = augment.augment(picture.expand(64, -1, -1, -1))
    assert many.dtype == torch.float32
    assert many.max() > 1  # still in 0..255
    same = sum(
        torch.allclose(x, y, atol=1e-3)
        for x in many
        for y in (picture[0].float(), picture[0].flip(-1).float())
    )
    assert 5 < same < 30  # a quarter of 64 is neither blurred nor recoloured
    assert 40 < len({x.numpy().tobytes() for x in many}) < 64
    moved = augment.mirror_and_shift(picture.expand(64, -1, -1, -1), 2)
    assert moved.dtype == torch.uint8
    assert moved.shape == (64, 3, 16, 16)
    inside = picture[0, :, 2:14, 2:14]
    found = {
        (top, left, flip)
        for x in moved
        for top in range(5)
        for left in range(5)
        for flip in (0, 1)
        if torch.equal((x.flip(-1) if flip else x)[:, top : top + 12, left : left + 12], inside)
    }
    assert len(found) > 25
    assert {flip for *_, flip in found} == {0, 1}
