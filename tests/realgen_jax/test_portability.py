"""What runs where: attention by platform, and the full-size recipe lowered for hardware that is not
here.
"""

import re
from collections import Counter
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realgen_configs.flux_grpo import get_config
from realgen_jax import sharding
from realgen_jax.nn import attention as attention_module
from realgen_jax.nn.stack import REMAT_POLICIES
from realgen_jax.sharding import make_mesh
from tests.helpers.goldens import ROOT

KERNEL = "tpu_custom_call"  # what a Pallas kernel is called in a TPU's program
xla = partial(jax.nn.dot_product_attention, implementation="xla")


@pytest.fixture
def for_tpu(monkeypatch):
    """Trace as for a TPU, on any machine."""
    monkeypatch.setattr(sharding, "target", lambda mesh: SimpleNamespace(platform="tpu"))


def test_the_full_size_recipe_lowers_for_tpus(for_tpu):
    """RealGen's recipe, rollout (with the VAE) and update, on 7 devices, with no weights in memory.
    With "dots" the update runs splash's forward kernel for the policy and for the reference, and
    not again in the backward pass. (Double and single blocks call the same function.)
    """
    from realgen_jax.preflight.report import make_report, sample_arguments, update_arguments
    from realgen_jax.training.programs import make_programs

    report = make_report(get_config("flux_dev_8xh200"), 7)
    recipe, model = report.recipe, report.model
    programs = make_programs(recipe, model)
    rollout = programs.sample.trace(*sample_arguments(recipe, model))
    pictures, trajectory, _ = rollout.out_info
    assert (pictures.shape, trajectory.latents.shape) == ((21, 3, 1024, 1024), (8, 21, 4096, 64))
    update = programs.update.trace(*update_arguments(recipe, model, programs))
    for traced, expected in (
        (rollout, {"splash_mha_fwd": 3}),
        (update, {"splash_mha_fwd": 2, "splash_mha_dkv": 1}),
    ):
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        kernels = Counter(re.findall(r"splash_mha_(?:fwd|dq|dkv)", text))
        assert kernels == Counter(expected)
        assert len(text) < 2**27  # 57 MB of rotary tables; captured weights would be 48 GB
    assert sum(a.nbytes for a in jax.live_arrays()) < 2**31
    assert sum(a.size for a in jax.tree.leaves(model.params)) > 11e9


def value_and_gradients(attend, q, k, v, cotangent):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(cotangent.reshape(out.shape))


def operands(tokens, heads, channels):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (2, tokens, heads, channels)) for key in keys]


@pytest.mark.parametrize("mesh", [None, (1, 2, 1), (1, 1, 2)])
def test_the_tpu_kernel_computes_attention(mesh):
    """Interpreted, against XLA's: value and gradients, on one device and split over rows and over
    heads.
    """
    mesh = None if mesh is None else make_mesh(*mesh, jax.devices())
    q, k, v, cotangent = operands(256, 2, 128)
    want = jax.jit(partial(value_and_gradients, xla))(q, k, v, cotangent)
    splash = partial(attention_module.splash_attention, mesh=mesh, interpret=True)
    got = jax.jit(partial(value_and_gradients, splash))(q, k, v, cotangent)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "channels", "kernel"),
    [(4608, 128, True), (256, 128, True), (250, 128, False), (256, 32, False)],
)
def test_sizes_that_do_not_fill_the_kernels_tiles_take_xla(for_tpu, tokens, channels, kernel):
    shape = jax.ShapeDtypeStruct((2, tokens, 2, channels), jnp.bfloat16)
    traced = jax.jit(attention_module.attention).trace(shape, shape, shape)
    assert (KERNEL in traced.lower(lowering_platforms=("tpu",)).as_text()) == kernel


def mesh_of(capability, platform="gpu"):
    """As much of a mesh as attention asks: its first device."""
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    return SimpleNamespace(devices=np.array([device], object), size=1)


@pytest.mark.parametrize(
    ("capability", "dtype", "channels", "taken"),
    [
        ("9.0", jnp.bfloat16, 128, True),
        ("9.0", jnp.float16, 256, True),
        ("8.9", jnp.bfloat16, 128, True),
        ("8.9", jnp.bfloat16, 256, False),  # before Hopper, cuDNN takes up to 128
        ("9.0", jnp.bfloat16, 100, False),  # no multiple of 8
        ("9.0", jnp.float32, 128, False),
        ("gfx942", jnp.bfloat16, 128, False),  # an AMD GPU
    ],
)
def test_cudnn_is_asked_for_where_it_takes_the_inputs(
    monkeypatch, capability, dtype, channels, taken
):
    asked = []
    monkeypatch.setattr(attention_module, "cudnn_attention", lambda q, *_: asked.append(1) or q)
    q = jnp.zeros((1, 4, 1, channels), dtype)
    attention_module.attention(q, q, q, mesh_of(capability))
    assert bool(asked) == taken
    assert not attention_module.takes_cudnn(q, mesh_of("", "tpu"))
    assert not attention_module.takes_splash(q, q, mesh_of(capability))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_plain_attention_is_jaxs(dtype, tolerance):
    """Value and gradients, with scores far enough apart that the largest must be taken off before
    exp.
    """
    q, k, v, cotangent = (a.astype(dtype) for a in operands(37, 2, 8))
    q = 20 * q
    got, want = (
        jax.tree.map(jnp.float32, value_and_gradients(f, q, k, v, cotangent))
        for f in (attention_module.plain_attention, xla)
    )
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_nothing_of_the_other_platforms_is_left_in_a_cpu_program(remat):
    """Attention in a rematerialised scan, with gradients: the same bits, memory and operations as
    XLA's alone.
    """
    q, k, v, _ = operands(128, 1, 128)

    def loss(attend, q, k, v):
        block = jax.checkpoint(
            lambda x: x + attend(x, k, v).reshape(x.shape),
            policy=REMAT_POLICIES[remat],
            prevent_cse=False,
        )
        return jnp.sum(jax.lax.scan(lambda x, _: (block(x), None), q, None, length=3)[0] ** 2)

    def build(attend):
        return (
            jax.jit(jax.value_and_grad(partial(loss, attend), argnums=(0, 1, 2)))
            .lower(q, k, v)
            .compile()
        )

    ours, plain = build(attention_module.attention), build(attention_module.plain_attention)
    for a, b in zip(jax.tree.leaves(ours(q, k, v)), jax.tree.leaves(plain(q, k, v)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert ours.memory_analysis().temp_size_in_bytes == plain.memory_analysis().temp_size_in_bytes
    heavy = [
        Counter(re.findall(r" (dot|convolution|while|conditional|custom-call)\(", c.as_text()))
        for c in (ours, plain)
    ]
    assert heavy[0] == heavy[1]


def test_only_these_ask_what_the_platform_is():
    words = re.compile(r"default_backend|\.platform\b|platform_dependent|get_backend|device_kind")
    found = {}
    for file in sorted((ROOT / "realgen_jax").rglob("*.py")):
        if hits := words.findall(file.read_text()):
            found[str(file.relative_to(ROOT))] = sorted(hits)
    assert found == {
        "realgen_jax/nn/attention.py": [".platform"],
        "realgen_jax/rollout.py": [".platform"],
        "realgen_jax/sharding.py": [".platform", ".platform"],
    }
