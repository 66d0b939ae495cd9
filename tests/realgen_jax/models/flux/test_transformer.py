"""The FLUX transformer against recorded outputs and gradients, and against diffusers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realgen_jax.models.flux.tables import DIFFUSERS
from realgen_jax.models.flux.transformer import Cond, FluxConfig, FluxTransformer
from realgen_jax.nn.convert import abstract
from realgen_jax.nn.export import to_torch
from tests.helpers.compiling import QUICK
from tests.helpers.goldens import GOLDENS, golden
from tests.helpers.models import load_flux

F32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}
# Two blocks of each kind: XLA unrolls a scan of one.
SMALL = FluxConfig(
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=8,
    axes_dims_rope=(2, 2, 4),
    **F32,
)


def assert_close(actual, expected, tolerance=1e-5):
    """Within `tolerance` of the largest entry: gradients here reach 30, outputs 5."""
    actual = np.asarray(actual)
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize(
    ("case", "height", "width"), [("g0_L2S3_h32", 5, 3), ("g1_L1S2_h64", 4, 4)]
)
def test_outputs_and_gradients_match_the_goldens(case, height, width):
    arrays = golden(f"01_flux_transformer/{case}/io.npz")
    config, params = load_flux(GOLDENS / "01_flux_transformer" / case / "model")
    graph, _ = abstract(FluxTransformer, config)
    guidance = arrays.get("guidance", np.zeros_like(arrays["timestep"]))
    inputs = ("hidden_states", "encoder_hidden_states", "pooled_projections")

    def loss(params, x, t5, clip):
        model = nnx.merge(graph, params)
        output = model(x, arrays["timestep"], Cond(t5, clip, guidance), height, width)
        return (output * arrays["cotangent"]).sum(), output

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    gradient = jax.jit(gradient, compiler_options=QUICK)
    (_, output), (of_params, *of_inputs) = gradient(params, *(arrays[name] for name in inputs))

    assert_close(output, arrays["output"])
    for name, actual in zip(inputs, of_inputs, strict=True):
        assert_close(actual, arrays[f"grad_{name}"])

    # The recording holds the gradients of five parameters.
    of_params = dict(to_torch(of_params, DIFFUSERS))
    recorded = [key for key in arrays if key.startswith("grad_param/")]
    assert len(recorded) == 5
    for key in recorded:
        assert_close(of_params[key.removeprefix("grad_param/")], arrays[key])


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize(
    ("height", "width", "tokens", "layers", "singles"),
    [(2, 2, 5, 1, 1), (3, 7, 1, 2, 1), (8, 4, 16, 1, 3)],
)
def test_agrees_with_diffusers_on_random_weights(
    tmp_path, guidance, height, width, tokens, layers, singles
):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(height * width + guidance)

    theirs = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=layers,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    theirs.eval().save_pretrained(tmp_path)

    x = torch.randn(3, height * width, 16)
    t5 = torch.randn(3, tokens, 24)
    clip = torch.randn(3, 12)
    sigma = torch.tensor([1.0, 0.37, 0.02])
    scale = torch.tensor([3.5, 1.0, 7.0])
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    with torch.no_grad():
        expected = theirs(
            hidden_states=x,
            encoder_hidden_states=t5,
            pooled_projections=clip,
            timestep=sigma,
            guidance=scale if guidance else None,
            img_ids=positions.float(),
            txt_ids=torch.zeros(tokens, 3),
            return_dict=False,
        )[0]

    config, params = load_flux(tmp_path)
    model = nnx.merge(abstract(FluxTransformer, config)[0], params)
    cond = Cond(jnp.asarray(t5), jnp.asarray(clip), jnp.asarray(scale))
    assert_close(model(jnp.asarray(x), jnp.asarray(sigma), cond, height, width), expected)


def gradient_of_all_weights(remat, params):
    """Of the sum of the outputs."""
    graph, _ = abstract(FluxTransformer, replace(SMALL, remat=remat))
    x = jax.random.normal(jax.random.key(1), (2, 4, 64))
    sigma = jnp.full(2, 0.5)
    cond = Cond(jnp.ones((2, 3, 24)), jnp.ones((2, 8)), jnp.full(2, 3.5))

    def loss(params):
        return nnx.merge(graph, params)(x, sigma, cond, 2, 2).sum()

    return jax.jit(jax.grad(loss), compiler_options=QUICK)(params)


@pytest.fixture(scope="module")
def small_params():
    """Random weights of SMALL, from numpy: compiling the initialisation would take longer."""
    random = np.random.default_rng(0)
    _, shapes = abstract(FluxTransformer, SMALL)
    return jax.tree.map(lambda a: random.normal(0, 0.2, a.shape).astype(a.dtype), shapes)


@pytest.fixture(scope="module")
def full_gradient(small_params):
    return gradient_of_all_weights("full", small_params)


# On a CPU "attention" is the same program as "full": there is no flash kernel.
@pytest.mark.parametrize("remat", ["dots", "none"])
def test_every_rematerialisation_gives_the_same_gradient(remat, small_params, full_gradient):
    gradient = gradient_of_all_weights(remat, small_params)
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(full_gradient), strict=True)
    for actual, expected in pairs:
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_bad_sizes_are_named(small_params):
    with pytest.raises(ValueError, match=r"add up to 48.*attention_head_dim 64"):
        FluxConfig(attention_head_dim=64, axes_dims_rope=(16, 16, 16))
    with pytest.raises(ValueError, match="remat is 'all'; choose one of full, attention, dots"):
        FluxConfig(remat="all")

    model = nnx.merge(abstract(FluxTransformer, SMALL)[0], small_params)
    cond = Cond(jnp.ones((1, 3, 24)), jnp.ones((1, 8)), jnp.ones(1))
    with pytest.raises(ValueError, match="x has 5 tokens, but height 2 times width 2 is 4"):
        model(jnp.ones((1, 5, 64)), jnp.ones(1), cond, 2, 2)
