import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realgen_jax.models.flux.transformer import Cond, FluxConfig, FluxTransformer
from realgen_jax.nn.convert import abstract, load_transformer, to_torch
from realgen_jax.nn.tokens import pack, unpack
from tests.helpers.goldens import GOLDENS, golden

F32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}
SMALL = FluxConfig(
    num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
    pooled_projection_dim=8, axes_dims_rope=(4, 6, 6), **F32,
)  # fmt: skip


def close(got, want, tolerance=1e-4):
    """Within `tolerance` of the largest entry: gradients here reach 30, outputs 5."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * max(1.0, np.abs(want).max())


@pytest.mark.parametrize(
    ("case", "height", "width"), [("g0_L2S3_h32", 5, 3), ("g1_L1S2_h64", 4, 4)]
)
def test_outputs_and_gradients_match_the_goldens(case, height, width):
    io = golden(f"01_flux_transformer/{case}/io.npz")
    config, params = load_transformer(GOLDENS / "01_flux_transformer" / case / "model", **F32)
    graph, _ = abstract(FluxTransformer, config)
    guidance = io.get("guidance", np.zeros_like(io["timestep"]))

    def loss(params, x, t5, clip):
        out = nnx.merge(graph, params)(x, io["timestep"], Cond(t5, clip, guidance), height, width)
        return (out * io["cotangent"]).sum(), out

    inputs = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (_, out), (of_params, *of_inputs) = grad(params, *(io[name] for name in inputs))
    close(out, io["output"])
    for name, got in zip(inputs, of_inputs, strict=True):
        close(got, io[f"grad_{name}"])
    of_params = dict(to_torch(of_params))
    named = [key.removeprefix("grad_param/") for key in io if key.startswith("grad_param/")]
    assert len(named) == 5
    for key in named:
        close(of_params[key], io[f"grad_param/{key}"])


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize(
    ("height", "width", "tokens", "layers", "singles"),
    [(2, 2, 5, 1, 1), (3, 7, 1, 2, 1), (8, 4, 16, 1, 3)],
)
def test_agrees_with_diffusers_on_random_weights(
    tmp_path, guidance, height, width, tokens, layers, singles
):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(height * width + guidance)
    theirs = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=layers, num_single_layers=singles, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=24, pooled_projection_dim=12, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    x, t5, clip = torch.randn(3, height * width, 16), torch.randn(3, tokens, 24), torch.randn(3, 12)
    sigma, scale = torch.tensor([1.0, 0.37, 0.02]), torch.tensor([3.5, 1.0, 7.0])
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    with torch.no_grad():
        want = theirs(
            hidden_states=x, encoder_hidden_states=t5, pooled_projections=clip, timestep=sigma,
            guidance=scale if guidance else None, img_ids=ids, txt_ids=torch.zeros(tokens, 3), return_dict=False,
        )[0]  # fmt: skip
    config, params = load_transformer(tmp_path, **F32)
    model = nnx.merge(abstract(FluxTransformer, config)[0], params)
    cond = Cond(jnp.asarray(t5), jnp.asarray(clip), jnp.asarray(scale))
    close(model(jnp.asarray(x), jnp.asarray(sigma), cond, height, width), want)


def test_packing_is_that_of_diffusers():
    arrays = golden("03_schedule/packing.npz")
    for case in "012":
        latents, packed = arrays[f"{case}/latents"].transpose(0, 2, 3, 1), arrays[f"{case}/packed"]
        _, h, w, _ = latents.shape
        np.testing.assert_array_equal(pack(latents), packed)
        np.testing.assert_array_equal(unpack(packed, h // 2, w // 2), latents)


def test_every_rematerialisation_gives_the_same_gradient():
    cond = Cond(jnp.ones((2, 3, 24)), jnp.ones((2, 8)), jnp.full(2, 3.5))
    x = jax.random.normal(jax.random.key(1), (2, 4, 64))

    def grads(remat):
        graph, params = nnx.split(
            FluxTransformer(FluxConfig(**{**vars(SMALL), "remat": remat}), nnx.Rngs(0))
        )
        return jax.jit(
            jax.grad(lambda p: nnx.merge(graph, p)(x, jnp.full(2, 0.5), cond, 2, 2).sum())
        )(params)

    full = grads("full")
    for other in ("dots", "none"):
        for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(grads(other)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match=r"add up to 48.*attention_head_dim 64"):
        FluxConfig(attention_head_dim=64, axes_dims_rope=(16, 16, 16))
    with pytest.raises(ValueError, match="remat is 'all'; choose one of full"):
        FluxConfig(remat="all")
    model = FluxTransformer(SMALL, nnx.Rngs(0))
    cond = Cond(jnp.ones((1, 3, 24)), jnp.ones((1, 8)), jnp.ones(1))
    with pytest.raises(ValueError, match="x has 5 tokens, but height 2 times width 2 is 4"):
        model(jnp.ones((1, 5, 64)), jnp.ones(1), cond, 2, 2)
