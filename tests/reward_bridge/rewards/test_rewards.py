import io

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from reward_bridge.rewards import REWARDS, make_reward  # noqa: E402


def pictures(n, height, width, seed=0):
    """Smooth random pictures: resampling differs less from PIL's than on noise, as on photographs."""
    small = np.random.default_rng(seed).integers(0, 256, (n, height // 8, width // 8, 3), np.uint8)
    big = [
        np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC))
        for p in small
    ]
    return torch.from_numpy(np.stack(big).transpose(0, 3, 1, 2).copy())


def test_unknown_rewards_are_named():
    with pytest.raises(ValueError, match=r"there is no reward 'beauty'; choose from .*clip_score"):
        make_reward("beauty", "cpu", {})
    for target in REWARDS.values():
        module, _, name = target.partition(":")
        assert hasattr(__import__(module, fromlist=[name]), name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "clip_score",
            {"pth": "x"},
            r"options\.clip_score: .*'path'; ClipScore takes path, scale, dtype",
        ),
        (
            "clip_score",
            {"path": "x", "pth": "x"},
            r"options\.clip_score: got an unexpected keyword argument 'pth'",
        ),
        (
            "jpeg_compressibility",
            {"servers": ["http://a:1"], "quality": 3},
            r"'quality'; RemoteReward takes servers, ",
        ),
    ],
)
def test_wrong_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_reward(name, "cpu", options)


def test_jpeg_compressibility_is_minus_the_files_size():
    images = pictures(3, 64, 96)
    scores = make_reward("jpeg_compressibility", "cpu", {})(images, ["a"] * 3)
    for pixels, score in zip(images, scores, strict=True):
        file = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95)
        assert score == pytest.approx(-len(file.getvalue()) / 500_000)
    flat = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
    assert make_reward("jpeg_compressibility", "cpu", {})(flat, ["a"]) > scores.max()
