"""The autoencoder against recorded images and latents, and against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realgen_jax.nn import vae as vae_module
from realgen_jax.nn.convert import abstract
from realgen_jax.nn.tiles import decode_tiled
from realgen_jax.nn.tokens import pack
from realgen_jax.nn.vae import (
    Autoencoder,
    VaeConfig,
    decode_tokens,
    decoded_at_once,
    to_uint8,
)
from realgen_jax.nn.vae_files import load_vae
from tests.helpers.compiling import QUICK
from tests.helpers.goldens import GOLDENS, golden


def channels_last(x):
    return np.asarray(x).transpose(0, 2, 3, 1)


def load(folder):
    config, params = load_vae(folder, folder)
    return nnx.merge(abstract(Autoencoder, config)[0], params)


def quick(f):
    return jax.jit(f, compiler_options=QUICK)


@pytest.fixture(scope="module")
def small():
    """Levels of 8 and 16 channels."""
    return load(GOLDENS / "02_vae" / "c8_16_l1" / "model")


@pytest.mark.parametrize("case", ["c8_16_l1", "c16_l1_rect"])
def test_matches_the_goldens(case):
    arrays = golden(f"02_vae/{case}/io.npz")
    vae = load(GOLDENS / "02_vae" / case / "model")

    decoded = quick(vae.decode)(channels_last(arrays["latents"]))
    np.testing.assert_allclose(decoded, channels_last(arrays["decoded"]), atol=1e-4)

    # The recorded image, as our own may differ from it where a value is halfway between two bytes.
    quantised = to_uint8(jnp.asarray(channels_last(arrays["decoded"])))
    expected = np.round(255 * arrays["image01"]).astype(np.uint8)
    np.testing.assert_array_equal(quantised, expected)

    mean, logvar = quick(vae.encode)(channels_last(arrays["pixels"]))
    np.testing.assert_allclose(mean, channels_last(arrays["encode_mean"]), atol=1e-4)
    np.testing.assert_allclose(logvar, channels_last(arrays["encode_logvar"]), atol=1e-4)
    scaled = channels_last(arrays["encode_latents_scaled"])
    np.testing.assert_allclose(vae.normalise(mean), scaled, atol=1e-4)


def test_decodes_packed_tokens_a_few_at_a_time(small, monkeypatch):
    """In rounds of two of six images: the same as all at once, up to rounding of the last bit."""
    config = small.config
    latents = np.random.default_rng(0).standard_normal((6, 4, 6, config.latent_channels))
    latents = latents.astype(np.float32)

    # Room for the largest feature maps of two images: 16 channels at full size, in float32.
    factor = 2 ** (len(config.block_out_channels) - 1)
    full_size = 4 * factor * 6 * factor
    monkeypatch.setattr(vae_module, "DECODE_BYTES", 2 * full_size * 16 * 4)
    assert decoded_at_once(config, 6, len(latents)) == 2

    images = quick(lambda tokens: decode_tokens(small, tokens, 2, 3))(pack(latents))
    assert images.shape == (6, 3, 4 * factor, 6 * factor)
    assert images.dtype == jnp.uint8
    expected = to_uint8(quick(small.decode)(latents))
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)


def test_as_many_images_are_decoded_at_once_as_fit_the_limit():
    """A divisor of the batch that keeps the largest feature map within 8 MiB."""
    config = VaeConfig((16, 32, 64, 128))  # 32 channels at full size: 0.5 MiB for 64 x 64 pixels
    assert decoded_at_once(config, 16, 64) == 16
    assert decoded_at_once(config, 16, 15) == 15
    assert decoded_at_once(config, 16, 34) == 2
    assert decoded_at_once(VaeConfig(), 4096, 21) == 1  # 1 GiB for 1024 x 1024 pixels


@pytest.mark.parametrize(
    ("widths", "layers", "height", "width"), [((8, 16, 16, 24), 2, 32, 48), ((8, 8), 1, 16, 8)]
)
def test_agrees_with_diffusers_on_random_weights(tmp_path, widths, layers, height, width):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)

    theirs = diffusers.AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=layers,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    theirs.eval().save_pretrained(tmp_path)
    ours = load(tmp_path)

    pixels = torch.randn(2, 3, height, width)
    with torch.no_grad():
        posterior = theirs.encode(pixels).latent_dist
        decoded = theirs.decode(posterior.mean).sample

    mean, logvar = quick(ours.encode)(channels_last(pixels))
    np.testing.assert_allclose(mean, channels_last(posterior.mean), atol=1e-4)
    np.testing.assert_allclose(logvar, channels_last(posterior.logvar), atol=1e-4)
    images = quick(ours.decode)(ours.normalise(mean))
    np.testing.assert_allclose(images, channels_last(decoded), atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(16, 28), (20, 8)])
def test_tiles_are_those_of_diffusers(tmp_path, height, width):
    """Tiles of 8 latents that start every 6; those at the ends have 2 to 8."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    theirs.eval().save_pretrained(tmp_path)
    theirs.enable_tiling()
    assert (theirs.tile_latent_min_size, theirs.tile_sample_min_size) == (8, 16)
    latents = torch.randn(2, 4, height, width)
    with torch.no_grad():
        expected = theirs.decode(latents).sample

    config, params = load_vae(tmp_path, tmp_path, tile=16)
    vae = nnx.merge(abstract(Autoencoder, config)[0], params)
    scaled = vae.normalise(jnp.asarray(channels_last(latents)))
    images = quick(lambda latents: decode_tiled(vae.decode, latents, 16, 2))(scaled)
    np.testing.assert_allclose(images, channels_last(expected), atol=1e-4)
    assert np.abs(images - quick(vae.decode)(scaled)).max() > 1e-2

    # The tiles are what decode_tokens decodes.
    pictures = quick(lambda tokens: decode_tokens(vae, tokens, height // 2, width // 2))(
        pack(scaled)
    )
    np.testing.assert_allclose(pictures.astype(int), to_uint8(images).astype(int), atol=1)


def test_a_tile_is_a_whole_number_of_latents_with_a_quarter():
    with pytest.raises(ValueError, match=r"vae_tile is 80; expected a multiple of 32 pixels, or 0"):
        VaeConfig(tile=80)
