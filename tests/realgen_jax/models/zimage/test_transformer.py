"""The Z-Image transformer against recorded outputs and gradients, and against diffusers."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realgen_jax.models.zimage.tables import DIFFUSERS
from realgen_jax.models.zimage.transformer import ZImageConfig, ZImageTransformer
from realgen_jax.nn.convert import abstract
from realgen_jax.nn.export import to_torch
from tests.helpers.compiling import QUICK
from tests.helpers.goldens import golden
from tests.helpers.zimage import captions, diffusers_velocity, latents, load_zimage, tokens


def assert_close(actual, expected, tolerance=1e-5):
    """Within `tolerance` of the largest entry: gradients here reach 70, outputs 5."""
    actual = np.asarray(actual)
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


@cache
def compiled(config, height, width):
    """(params, x, sigma, cond) -> velocity, in tokens."""
    graph, _ = abstract(ZImageTransformer, config)

    def run(params, x, sigma, cond):
        return nnx.merge(graph, params)(x, sigma, cond, height, width)

    return jax.jit(run, compiler_options=QUICK)


@pytest.mark.parametrize(
    ("case", "height", "width", "remat"),
    [
        ("padded", 3, 5, "full"),
        pytest.param("whole", 4, 8, "dots", marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients_match_the_goldens(case, height, width, remat):
    arrays = golden(f"13_zimage/io_{case}.npz")
    config, params = load_zimage(remat=remat)
    graph, _ = abstract(ZImageTransformer, config)

    def loss(params, x, caption):
        network = nnx.merge(graph, params)
        cond = captions(caption, arrays["cap_lens"])
        output = -latents(network(tokens(x), 1 - arrays["t"], cond, height, width), height, width)
        return (output * arrays["cotangent"]).sum(), output

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    gradient = jax.jit(gradient, compiler_options=QUICK)
    (_, output), (of_params, of_x, of_caption) = gradient(params, arrays["x"], arrays["cap_feats"])

    assert_close(output, arrays["output"])
    assert_close(of_x, arrays["grad_x"])
    assert_close(of_caption, arrays["grad_cap_feats"])

    # The recording holds the gradients of twelve parameters; tokens that nothing attends to leave
    # no infinities in the others.
    of_params = dict(to_torch(of_params, DIFFUSERS))
    recorded = [key for key in arrays if key.startswith("grad_param/")]
    assert len(recorded) == 12
    for key in recorded:
        assert_close(of_params[key.removeprefix("grad_param/")], arrays[key])
    assert all(np.isfinite(array).all() for array in of_params.values())


@pytest.mark.parametrize(
    ("height", "width", "lengths", "layers", "refiners"),
    [
        (2, 2, (33, 1, 64), 1, 2),
        pytest.param(3, 11, (7, 7, 7), 2, 1, marks=pytest.mark.slow),
        pytest.param(8, 4, (32, 31, 20), 3, 2, marks=pytest.mark.slow),
        pytest.param(9, 2, (64, 96, 95), 1, 1, marks=pytest.mark.slow),
    ],
)
def test_agrees_with_diffusers_on_random_weights(
    tmp_path, height, width, lengths, layers, refiners
):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(height * width)

    theirs = diffusers.ZImageTransformer2DModel(
        dim=60,
        n_layers=layers,
        n_refiner_layers=refiners,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=20,
        axes_dims=[4, 6, 10],
        axes_lens=[128, 16, 16],
    )
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, 0.1, 0.2)
    theirs.eval().save_pretrained(tmp_path)

    x = torch.randn(3, 16, 2 * height, 2 * width)
    caption = torch.randn(3, max(lengths), 20)
    sigma = torch.tensor([1.0, 0.37, 0.02])
    expected = diffusers_velocity(theirs, x, sigma, caption, lengths)

    config, params = load_zimage(tmp_path)
    cond = captions(caption, lengths)
    actual = compiled(config, height, width)(params, tokens(x), jnp.asarray(sigma), cond)
    assert_close(latents(actual, height, width), expected)


def test_what_follows_a_caption_is_not_read():
    """Neither how far the batch is padded, nor what the caption's array holds after its length."""
    arrays = golden("13_zimage/io_padded.npz")
    config, params = load_zimage()
    run = compiled(config, 3, 5)
    inputs = tokens(arrays["x"]), 1 - arrays["t"]
    length = arrays["cap_lens"]

    # The recording has 41 tokens and zeros after the captions.
    caption = np.full((3, 96, 24), 100, np.float32)
    for row, end in enumerate(length):
        caption[row, :end] = arrays["cap_feats"][row, :end]

    actual = run(params, *inputs, captions(caption, length))
    assert_close(-latents(actual, 3, 5), arrays["output"])
    other = run(params, *inputs, captions(caption, length + 1))
    assert np.abs(other - actual).max() > 1e-2


@pytest.mark.slow
def test_bfloat16_stays_close_to_float32():
    arrays = golden("13_zimage/io_padded.npz")
    config, params = load_zimage(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    cond = captions(arrays["cap_feats"].astype(jnp.bfloat16), arrays["cap_lens"])
    actual = compiled(config, 3, 5)(params, tokens(arrays["x"]), 1 - arrays["t"], cond)
    assert actual.dtype == jnp.float32
    error = -np.asarray(latents(actual, 3, 5)) - arrays["output"]
    assert np.sqrt((error**2).mean()) < 0.03


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_kv_heads": 6}, "n_kv_heads is 6; expected n_heads, 30"),
        ({"axes_dims": (64, 64), "axes_lens": (8, 8)}, "must have three numbers each"),
        ({"axes_dims": (16, 16, 16)}, "add up to 48, but .* dim 3840 / n_heads 30"),
        ({"remat": "all"}, "remat is 'all'; choose one of full, attention, dots"),
    ],
)
def test_bad_sizes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        ZImageConfig(**sizes)


def test_inputs_that_do_not_fit_are_named():
    config, params = load_zimage()
    network = nnx.merge(abstract(ZImageTransformer, config)[0], params)

    def run(image_tokens, caption_tokens, height, width):
        cond = captions(np.ones((1, caption_tokens, 24)), [1])
        network(jnp.ones((1, image_tokens, 64)), jnp.ones(1), cond, height, width)

    with pytest.raises(ValueError, match="x has 5 tokens, but height 2 times width 2 is 4"):
        run(5, 3, 2, 2)
    with pytest.raises(ValueError, match=r"caption of 128 tokens .* need \(130, 2, 2\) positions"):
        run(4, 97, 2, 2)
    with pytest.raises(ValueError, match=r"picture of 1 x 33 tokens .* axes_lens are \(128, 32"):
        run(33, 3, 1, 33)
