"""The SD3 transformer against recorded outputs and gradients, and against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realgen_jax.models.sd3.family import SD3
from realgen_jax.models.sd3.transformer import Cond, SD3Config, SD3Transformer
from realgen_jax.nn.convert import abstract
from realgen_jax.nn.export import to_torch
from realgen_jax.nn.stack import modulation_of_layers
from tests.helpers.compiling import QUICK
from tests.helpers.goldens import GOLDENS, golden
from tests.helpers.sd3 import diffusers_velocity, load_sd3
from tests.helpers.zimage import latents, tokens

RECORDED = GOLDENS / "12_sd3"
# Case, its model, height and width in tokens, recorded gradients of parameters.
CASES = [
    ("sd3_m_L2", "transformer/sd3_m_L2/model", 3, 5, 10),
    ("sd35_l_L2", "transformer/sd35_l_L2/model", 5, 2, 11),
    ("sd35_m_L4_dual2", "pipeline/transformer", 5, 3, 13),
]


def assert_close(actual, expected, tolerance=2e-6):
    """Within `tolerance` of the largest entry, or of 1: gradients here reach 50."""
    actual = np.asarray(actual)
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def inputs(arrays):
    """Noise level, text and pooled text of a recording."""
    sigma = arrays["timestep"] / np.float32(1000)
    return sigma, arrays["encoder_hidden_states"], arrays["pooled_projections"]


@pytest.mark.parametrize(
    ("case", "model", "height", "width", "recorded"),
    [CASES[0], pytest.param(*CASES[1], marks=pytest.mark.slow), CASES[2]],
)
def test_outputs_and_gradients_match_the_goldens(case, model, height, width, recorded):
    arrays = golden(f"12_sd3/transformer/{case}/io.npz")
    config, params = load_sd3(RECORDED / model, height, width)
    graph, _ = abstract(SD3Transformer, config)
    sigma, text, pooled = inputs(arrays)

    def loss(params, x, text, pooled):
        network = nnx.merge(graph, params)
        output = network(tokens(x), sigma, Cond(text, pooled), height, width)
        output = latents(output, height, width)
        return (output * arrays["cotangent"]).sum(), output

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    gradient = jax.jit(gradient, compiler_options=QUICK)
    (_, output), (of_params, *of_inputs) = gradient(params, arrays["hidden_states"], text, pooled)

    assert_close(output, arrays["output"], 5e-6)
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    for name, actual in zip(names, of_inputs, strict=True):
        assert_close(actual, arrays[f"grad_{name}"])

    # The last block's text queries have no gradient at all.
    of_params = dict(to_torch(of_params, SD3.table(config)))
    keys = [key for key in arrays if key.startswith("grad_param/")]
    assert len(keys) == recorded
    for key in keys:
        assert_close(of_params[key.removeprefix("grad_param/")], arrays[key])
    name = f"transformer_blocks.{config.num_layers - 1}.attn.add_q_proj.weight"
    assert not of_params[name].any()
    assert not arrays[f"grad_param/{name}"].any()


@pytest.mark.parametrize(("case", "model", "height", "width", "recorded"), CASES)
def test_the_first_block_matches_the_goldens(case, model, height, width, recorded):
    arrays = golden(f"12_sd3/transformer/{case}/io.npz")
    config, params = load_sd3(RECORDED / model, height, width)
    sigma, text, pooled = inputs(arrays)

    def first_block(params, x):
        network = nnx.merge(abstract(SD3Transformer, config)[0], params)
        vector = network._vector(jnp.asarray(sigma), Cond(text, pooled), None)
        img = network.img_in(tokens(x)) + network.pos[...]
        stack = "dual" if config.dual_layers else "joint"
        projections = (getattr(network, f"{stack}_{part}_mod") for part in ("img", "txt"))
        mods = [modulation_of_layers(project, vector, None)[0] for project in projections]
        graph, weights = nnx.split(getattr(network, stack))
        block = nnx.merge(graph, jax.tree.map(lambda array: array[0], weights))
        return vector, img, *block(img, network.txt_in(text), *mods, None)

    run = jax.jit(first_block, compiler_options=QUICK)
    vector, tokens_in, img, txt = run(params, arrays["hidden_states"])
    assert_close(vector, jax.nn.silu(arrays["debug/temb"]))
    assert_close(tokens_in, arrays["debug/tokens_in"])
    assert_close(img, arrays["debug/block0_image"])
    assert_close(txt, arrays["debug/block0_text"])


@pytest.mark.parametrize(
    ("height", "width", "text", "layers", "dual", "norm", "side"),
    [
        (4, 1, 3, 1, 0, None, 7),
        (3, 6, 9, 3, 2, "rms_norm", 6),
        pytest.param(2, 2, 5, 2, 1, None, 4, marks=pytest.mark.slow),
        pytest.param(5, 3, 1, 4, 1, "rms_norm", 8, marks=pytest.mark.slow),
    ],
)
def test_agrees_with_diffusers_on_random_weights(
    tmp_path, height, width, text, layers, dual, norm, side
):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(height * width)
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=10,
        num_layers=layers,
        attention_head_dim=12,
        num_attention_heads=3,
        joint_attention_dim=20,
        caption_projection_dim=36,
        pooled_projection_dim=8,
        pos_embed_max_size=side,
        dual_attention_layers=tuple(range(dual)),
        qk_norm=norm,
    )
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, 0.05, 0.15)
    theirs.eval().save_pretrained(tmp_path)

    x = torch.randn(3, 16, 2 * height, 2 * width)
    states = torch.randn(3, text, 20)
    pooled = torch.randn(3, 8)
    sigma = torch.tensor([1.0, 0.37, 0.02])
    expected = diffusers_velocity(theirs, x, sigma, states, pooled)

    config, params = load_sd3(tmp_path, height, width)

    def run(params, x, sigma, cond):
        network = nnx.merge(abstract(SD3Transformer, config)[0], params)
        return network(x, sigma, cond, height, width)

    cond = Cond(states.numpy(), pooled.numpy())
    run = jax.jit(run, compiler_options=QUICK)
    actual = run(params, tokens(x), sigma.numpy(), cond)
    assert_close(latents(actual, height, width), expected, 5e-6)


@pytest.mark.slow
def test_bfloat16_stays_close_to_float32():
    arrays = golden("12_sd3/transformer/sd3_m_L2/io.npz")
    config, params = load_sd3(
        RECORDED / "transformer/sd3_m_L2/model", 3, 5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
    )
    sigma, text, pooled = inputs(arrays)
    cond = Cond(text.astype(jnp.bfloat16), pooled.astype(jnp.bfloat16))

    def run(params, x, sigma, cond):
        network = nnx.merge(abstract(SD3Transformer, config)[0], params)
        return network(x, sigma, cond, 3, 5)

    run = jax.jit(run, compiler_options=QUICK)
    actual = run(params, tokens(arrays["hidden_states"]), sigma, cond)
    assert actual.dtype == jnp.float32
    error = np.asarray(latents(actual, 3, 5)) - arrays["output"]
    assert np.sqrt((error**2).mean()) < 0.03


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"in_channels": 32},
            "in_channels 32 and out_channels 16 does not make pictures from text",
        ),
        ({"out_channels": 32}, "in_channels 16 and out_channels 32 .*; expected 16 and 16"),
        ({"caption_projection_dim": 2048}, "caption_projection_dim is 2048; expected .*, 1536"),
        ({"dual_attention_layers": (0, 2)}, r"\(0, 2\); expected the first layers"),
        ({"dual_attention_layers": (1, 2)}, r"\(1, 2\); expected the first layers"),
        ({"dual_attention_layers": (0, 1), "num_layers": 2}, "the last of the num_layers 2 has no"),
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'; expected null or 'rms_norm'"),
        ({"image_size": (64, 193)}, "64 x 193 tokens are larger .* pos_embed_max_size 192"),
        ({"remat": "all"}, "remat is 'all'; choose one of full, attention, dots"),
    ],
)
def test_bad_sizes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message) as error:
        SD3Config(**sizes)
    assert "\n" not in str(error.value)


def test_pictures_of_another_size_are_named():
    config, params = load_sd3(RECORDED / "transformer/sd3_m_L2/model", 3, 5)
    network = nnx.merge(abstract(SD3Transformer, config)[0], params)
    cond = Cond(jnp.ones((1, 2, 24)), jnp.ones((1, 20)))
    for image_tokens, height, width in ((15, 5, 3), (14, 3, 5)):
        with pytest.raises(ValueError, match=r"positions are those of a picture of \(3, 5\)"):
            network(jnp.ones((1, image_tokens, 64)), jnp.ones(1), cond, height, width)
