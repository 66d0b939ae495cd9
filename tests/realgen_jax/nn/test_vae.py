import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realgen_jax.nn.convert import abstract, load_vae
from realgen_jax.nn.tokens import pack
from realgen_jax.nn.vae import Autoencoder, VaeConfig, decode_tokens, decoded_at_once, to_uint8
from tests.helpers.goldens import GOLDENS, golden


def nhwc(x):
    return np.asarray(x).transpose(0, 2, 3, 1)


def load(folder):
    config, params = load_vae(folder)
    return nnx.merge(abstract(Autoencoder, config)[0], params)


@pytest.mark.parametrize("case", ["c8_16_l1", "c16_l1_rect"])
def test_matches_the_goldens(case):
    io = golden(f"02_vae/{case}/io.npz")
    vae = load(GOLDENS / "02_vae" / case / "model")
    decoded = vae.decode(nhwc(io["latents"]))
    np.testing.assert_allclose(decoded, nhwc(io["decoded"]), atol=1e-4)
    np.testing.assert_array_equal(to_uint8(decoded), np.round(255 * io["image01"]).astype(np.uint8))
    mean, logvar = vae.encode(nhwc(io["pixels"]))
    np.testing.assert_allclose(mean, nhwc(io["encode_mean"]), atol=1e-4)
    np.testing.assert_allclose(logvar, nhwc(io["encode_logvar"]), atol=1e-4)
    np.testing.assert_allclose(vae.normalise(mean), nhwc(io["encode_latents_scaled"]), atol=1e-4)


def test_decodes_packed_tokens():
    vae = load(GOLDENS / "02_vae" / "c16_l1_rect" / "model")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = np.random.default_rng(0).standard_normal((2, 4, 6, 16), np.float32)
    images = decode_tokens(vae, pack(latents), 2, 3)
    assert images.shape == (2, 3, 4 * factor, 6 * factor)
    assert images.dtype == jnp.uint8
    np.testing.assert_allclose(
        images, to_uint8(vae.decode(latents)), atol=1
    )  # one picture at a time rounds otherwise


def test_pictures_are_decoded_a_few_at_a_time():
    """As many as keep the largest feature map, 32 channels at full size, below 8 MiB; a divisor of the batch."""
    config = VaeConfig((16, 32, 64, 128))
    assert decoded_at_once(config, 16, 64) == 16  # 0.5 MiB a picture of 64 x 64
    assert decoded_at_once(config, 16, 15) == 15
    assert decoded_at_once(config, 16, 34) == 2
    assert decoded_at_once(VaeConfig(), 4096, 21) == 1  # 1 GiB a picture of 1024 x 1024
    vae = load(GOLDENS / "02_vae" / "c8_16_l1" / "model")
    tokens = np.random.default_rng(0).standard_normal(
        (768, 64, 4 * vae.config.latent_channels), np.float32
    )
    assert decoded_at_once(vae.config, 64, len(tokens)) < len(tokens)
    run = jax.jit(lambda tokens: decode_tokens(vae, tokens, 8, 8))
    alone = jnp.concatenate([run(tokens[i : i + 1]) for i in (0, 500, len(tokens) - 1)])
    np.testing.assert_allclose(
        run(tokens)[np.array([0, 500, -1])].astype(int), alone.astype(int), atol=1
    )


@pytest.mark.parametrize(
    ("widths", "layers", "height", "width"), [((8, 16, 16, 24), 2, 32, 48), ((8, 8), 1, 16, 8)]
)
def test_agrees_with_diffusers_on_random_weights(tmp_path, widths, layers, height, width):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=widths, layers_per_block=layers, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    pixels = torch.randn(2, 3, height, width)
    with torch.no_grad():
        posterior = theirs.encode(pixels).latent_dist
        decoded = theirs.decode(posterior.mean).sample
    mean, logvar = ours.encode(nhwc(pixels))
    np.testing.assert_allclose(mean, nhwc(posterior.mean), atol=1e-4)
    np.testing.assert_allclose(logvar, nhwc(posterior.logvar), atol=1e-4)
    np.testing.assert_allclose(ours.decode(ours.normalise(mean)), nhwc(decoded), atol=1e-4)
