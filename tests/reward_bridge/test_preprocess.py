import numpy as np
import pytest
import torch
from PIL import Image

from reward_bridge.preprocess import CLIP_MEAN, CLIP_STD, normalize, resize, resize_and_crop
from tests.helpers.goldens import golden
from tests.helpers.pictures import pictures

MODES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def noise(n, height, width):
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (n, 3, height, width), np.uint8)
    )


def extremes(n, height, width):
    """Black and white only: bicubic overshoots, and many values lie on a half."""
    return (noise(n, height, width) > 127).to(torch.uint8) * 255


def by_pil(images, size, mode):
    """Rows, then columns, in two calls.

    Pillow 13 begins with the columns if the height shrinks by more.
    """
    height, width = size
    found = [
        Image.fromarray(pixels)
        .resize((width, pixels.shape[0]), MODES[mode])
        .resize((width, height), MODES[mode])
        for pixels in images.permute(0, 2, 3, 1).numpy()
    ]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((160, 160), (80, 80)),
        ((40, 56), (96, 130)),
        ((96, 64), (40, 80)),
        ((64, 80), (64, 37)),
        ((120, 88), (121, 87)),
        ((16, 16), (3, 200)),
    ],
)
@pytest.mark.parametrize("mode", list(MODES))
def test_resize_gives_pils_bits(mode, size, target):
    """Down, up, both at once, one axis alone, by one pixel, and by a lot."""
    for make in (noise, pictures, extremes):
        images = make(2, *size)
        before = images.clone()
        got = resize(images, target, mode)
        assert got.dtype == torch.uint8
        assert got.shape == (2, 3, *target)
        np.testing.assert_array_equal(got, by_pil(images, target, mode))
        np.testing.assert_array_equal(images, before)
        np.testing.assert_array_equal(resize(images[1:], target, mode)[0], got[1])


@pytest.mark.parametrize("mode", list(MODES))
def test_one_call_of_pil_is_the_same_where_both_sides_shrink_alike(mode):
    for size, target in (((512, 512), (224, 224)), ((96, 160), (48, 80)), ((40, 30), (60, 45))):
        images = noise(1, *size)
        pil = Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize(target[::-1], MODES[mode])
        np.testing.assert_array_equal(
            resize(images, target, mode)[0].permute(1, 2, 0), np.asarray(pil)
        )


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [
        ((48, 48), (48, 48), (0, 0)),
        ((96, 160), (48, 80), (0, 16)),
        ((160, 96), (80, 48), (16, 0)),
        ((40, 32), (60, 48), (6, 0)),
        (
            (64, 69),
            (48, 51),
            (0, 2),
        ),  # 51.75, cut to whole pixels; the corner at 1.5, rounded to even: as torchvision
        ((69, 64), (51, 48), (2, 0)),
    ],
)
def test_resize_and_crop_takes_the_middle(size, resized, corner):
    images, (top, left) = noise(2, *size), corner
    want = by_pil(images, resized, "bicubic")[:, :, top : top + 48, left : left + 48]
    np.testing.assert_array_equal(resize_and_crop(images, 48), want)
    want = by_pil(images, resized, "bilinear")[:, :, top : top + 48, left : left + 48]
    np.testing.assert_array_equal(resize_and_crop(images, 48, "bilinear"), want)


@pytest.mark.parametrize("picture", ["a", "b"])
def test_preprocess_goldens(picture):
    """Two pictures as RealGen's OmniAID server and Long-CLIP prepare them (some of the pixels)."""
    arrays = golden("10_rewards/preprocess.npz")
    image = torch.from_numpy(arrays[f"{picture}/image_uint8"]).permute(2, 0, 1)[None]
    omniaid = normalize(
        resize(resize(image, (512, 512), "bilinear"), (336, 336), "bilinear"), CLIP_MEAN, CLIP_STD
    )
    longclip = normalize(resize_and_crop(image, 224), CLIP_MEAN, CLIP_STD)
    np.testing.assert_allclose(
        omniaid[0, :, ::6, ::6], arrays[f"{picture}/omniaid_336"], rtol=0, atol=2e-6
    )
    np.testing.assert_allclose(
        longclip[0, :, ::4, ::4], arrays[f"{picture}/longclip_224"], rtol=0, atol=2e-6
    )


def test_normalize_is_per_channel_and_rounds_once():
    images, mean, std = noise(2, 4, 5), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    want = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    got = normalize(images, mean, std)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, want, atol=1e-6)
    half = normalize(images, mean, std, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.equal(got.bfloat16())
