"""Attention to the first keys of each row only. What runs on which platform: test_portability."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from realgen_jax.nn import attention as attention_module
from realgen_jax.nn.attention import LANES, attention, plain_attention, splash_attention
from realgen_jax.sharding import make_mesh
from tests.helpers.compiling import QUICK

LENGTHS = np.array([200, 256], np.int32)


def masked_softmax(q, k, v, lengths):
    """The definition, with the padding keys cut off row by row."""
    rows = []
    for row, length in enumerate(lengths.tolist()):
        scores = jnp.einsum("thd,shd->hts", q[row], k[row, :length]) / np.sqrt(q.shape[-1])
        weights = jax.nn.softmax(scores, axis=-1)
        rows.append(jnp.einsum("hts,shd->thd", weights, v[row, :length]))
    return jnp.stack(rows)


def value_and_gradients(attend, q, k, v):
    """The outputs of valid tokens and the gradients of q, k and v, all [n, t, h, d]."""
    valid = jnp.arange(q.shape[1]) < LENGTHS[:, None]

    def loss(q, k, v):
        out = attend(q, k, v).reshape(q.shape)
        out = jnp.where(valid[..., None, None], out, 0)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    return jax.jit(gradient, compiler_options=QUICK)(q, k, v)


@pytest.fixture(scope="module")
def operands():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (2, 256, 2, LANES)) for key in keys]


@pytest.fixture(scope="module")
def expected(operands):
    return value_and_gradients(partial(masked_softmax, lengths=LENGTHS), *operands)


KERNELS = {
    "attention": attention,
    "plain": plain_attention,
    "splash": partial(splash_attention, interpret=True),
}


@pytest.mark.parametrize(
    ("kernel", "mesh"),
    [("attention", None), ("plain", None), ("splash", None), ("splash", (1, 2, 2))],
)
def test_padding_keys_are_not_attended_to(kernel, mesh, operands, expected):
    """Value and gradients. Padding keys and values get no gradient at all."""
    attend = partial(KERNELS[kernel], lengths=LENGTHS)
    if mesh is not None:
        attend = partial(attend, mesh=make_mesh(*mesh, jax.devices()))
    actual = value_and_gradients(attend, *operands)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)

    (_, of_k, of_v), _ = actual
    assert not np.any(of_k[0, 200:])
    assert not np.any(of_v[0, 200:])


def test_full_lengths_are_no_lengths(operands):
    full = np.full(2, 256, np.int32)
    np.testing.assert_array_equal(
        plain_attention(*operands, lengths=full), plain_attention(*operands)
    )


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_cudnn_is_given_the_lengths(monkeypatch, operands, lengths):
    calls = []

    def dot_product_attention(q, k, v, **options):
        calls.append(options)
        return q, None

    monkeypatch.setattr(attention_module, "takes_cudnn", lambda *_: True)
    monkeypatch.setattr(attention_module.jax.nn, "dot_product_attention", dot_product_attention)
    attention(*(a.astype(jnp.bfloat16) for a in operands), lengths=lengths)
    options = {"implementation": "cudnn", "return_residual": True}
    assert calls == [{"key_value_seq_lengths": lengths, **options}]


ODD = 37


@pytest.mark.parametrize("lengths", [None, np.array([ODD, 12], np.int32)])
def test_an_odd_number_of_tokens_changes_nothing(monkeypatch, operands, lengths):
    """cuDNN's path with XLA's attention in its place: outputs and gradients."""
    inputs = tuple(a[:, :ODD] for a in operands)
    standard = jax.nn.dot_product_attention

    def on_xla(*args, implementation, **options):
        return standard(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)

    def run(attend):
        weight = jnp.cos(jnp.arange(inputs[0].size)).reshape(inputs[0].shape)
        score = jax.value_and_grad(lambda qkv: jnp.sum(weight * attend(*qkv, lengths=lengths)))
        return score(inputs)

    assert attention_module.cudnn_attention(*inputs, lengths=lengths).shape == inputs[0].shape
    for ours, plain in zip(
        jax.tree.leaves(run(attention_module.cudnn_attention)),
        jax.tree.leaves(run(plain_attention)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


def test_an_odd_number_of_tokens_has_a_gradient_for_cuda(monkeypatch):
    """jax refuses it at first: SD3 at 512 pixels has 1357 tokens."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    shape = jax.ShapeDtypeStruct((2, 1357, 24, 64), jnp.bfloat16)

    def lower(attend):
        gradient = jax.grad(lambda *qkv: attend(*qkv).astype(jnp.float32).sum(), (0, 1, 2))
        traced = jax.jit(gradient).trace(shape, shape, shape)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    with pytest.raises(NotImplementedError, match="sequence length Q 1357"):
        lower(partial(jax.nn.dot_product_attention, implementation="cudnn"))
    text = lower(attention_module.cudnn_attention)
    assert "fmhaSoftmaxBackward" in text
    assert "1358" in text


def test_jax_masks_the_same_keys(operands, expected):
    """What cuDNN is asked for means the same, by XLA's implementation of it."""
    attend = partial(
        jax.nn.dot_product_attention, key_value_seq_lengths=LENGTHS, implementation="xla"
    )
    actual = value_and_gradients(attend, *operands)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
