"""Effort, against a plain tower with dense weights, one picture at a time."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from reward_bridge.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from reward_bridge.rewards import make_reward
from tests.helpers.pictures import as_pil, photographs
from tests.helpers.random_detectors import HEADS, SIZE, normalized, save
from tests.helpers.random_effort import effort_case


def float_resize(picture, side):
    """Bilinear and antialiased without rounding: PIL resizes single channels of floats so."""
    return np.stack(
        [np.asarray(c.resize((side, side), Image.Resampling.BILINEAR)) for c in channels(picture)],
        -1,
    )


def sample(picture, side):
    """Bilinear between the four pixels around the target's centre, as OpenCV's INTER_LINEAR."""
    step = (picture.width / side, 0, 0, 0, picture.height / side, 0)
    how = ((side, side), Image.Transform.AFFINE, step, Image.Resampling.BILINEAR)
    return np.stack([np.asarray(c.transform(*how)) for c in channels(picture)], -1)


def channels(picture):
    return [Image.fromarray(np.asarray(picture, np.float32)[..., c]) for c in range(3)]


PREPARE = {
    "imagenet": (float_resize, (IMAGENET_MEAN, IMAGENET_STD)),
    "none": (
        lambda picture, side: picture.resize((side, side), Image.Resampling.BILINEAR),
        ((0, 0, 0), (1, 1, 1)),
    ),
    "clip": (sample, (CLIP_MEAN, CLIP_STD)),
}


@pytest.mark.parametrize("normalize", PREPARE)
def test_effort_is_the_dense_model_of_each_picture(normalize, tmp_path):
    (tower, (weight, bias), state), images = effort_case(), photographs(53, 61)
    reward = make_reward(
        "effort", "cpu", {**save(state, tmp_path), **HEADS, "normalize": normalize}
    )
    prepare, statistics = PREPARE[normalize]
    want = []
    with torch.inference_mode():
        for picture in as_pil(images):
            feature = tower(normalized(prepare(picture, SIZE), *statistics)).pooler_output[0]
            want.append(F.softmax(weight @ feature + bias, 0)[0].item())
        got, single = (
            reward(images, [""] * 8),
            [reward(image[None], [""]).item() for image in images],
        )
    assert np.std(want) > 0.005
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(got, single, rtol=1e-5)


def test_effort_reads_files_without_the_main_bases(tmp_path):
    images = photographs(64, 64)
    scores = []
    for bases in (True, False):
        reward = make_reward("effort", "cpu", {**save(effort_case(2, bases)[2], tmp_path), **HEADS})
        scores.append(reward(images, [""] * 8))
    assert torch.equal(*scores)
    with pytest.raises(
        ValueError, match=r"got effort\.normalize 'vit'; expected one of imagenet, clip, none"
    ):
        make_reward("effort", "cpu", {"path": "x", "normalize": "vit"})
