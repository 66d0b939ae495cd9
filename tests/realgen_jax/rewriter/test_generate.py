"""The sampler: recorded greedy continuations, its distribution, and what a row depends on."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realgen_jax.rewriter.generate import chosen_log_probs, generate, token_noise
from realgen_jax.sharding import make_mesh
from tests.helpers.compiling import QUICK
from tests.helpers.goldens import golden
from tests.helpers.language import (
    SMALL,
    TIED,
    UNTIED,
    golden_language,
    on_rows,
    prompts,
    random_adapters,
    random_language,
    row_keys,
)

LENGTHS = (8, 3, 5, 1, 8, 2, 7, 4)
ENDS = tuple(range(1, 16))


def sampler(**changes):
    fixed = {"steps": 24, "ends": ENDS, "pad": 0, "temperature": 1.0, **changes}
    return jax.jit(partial(generate, **fixed), compiler_options=QUICK)


SAMPLE = sampler()


@pytest.fixture(scope="module")
def drawn():
    """A call of eight rows with adapters: the model, the call's arguments, and what it drew."""
    model = random_language(SMALL)
    adapters = random_adapters(model)
    ids, mask = prompts(SMALL.vocab_size, LENGTHS, 8)
    arguments = (adapters, ids, mask, row_keys(8))
    tokens, finite = SAMPLE(model, *arguments)
    assert finite
    return model, arguments, tokens


@pytest.mark.parametrize(
    ("name", "folder"), [("tied", TIED), pytest.param("untied", UNTIED, marks=pytest.mark.slow)]
)
def test_greedy_continuations_match_the_golden(name, folder):
    case = golden("15_rewriter/greedy.npz")
    model = golden_language(folder)
    ids = jnp.asarray(case[f"{name}_prompts"], jnp.int32)
    mask = jnp.asarray(case[f"{name}_prompt_mask"].astype(bool))
    ends = tuple(np.atleast_1d(case[f"{name}_eos"]).tolist())
    run = sampler(steps=20, ends=ends, temperature=0.0)
    tokens, finite = run(model, None, ids, mask, row_keys(4))
    valid = case[f"{name}_valid"].astype(bool)
    assert finite
    np.testing.assert_array_equal(tokens.new_ids, case[f"{name}_tokens"])
    np.testing.assert_array_equal(tokens.completion, valid)
    assert not valid.all()
    assert valid.any(axis=1).all()

    # The logits of every choice, and so its log-prob.
    expected = chosen_log_probs(jnp.asarray(case[f"{name}_logits"]), tokens.new_ids)
    np.testing.assert_allclose(tokens.logp, np.where(valid, expected, 0), atol=1e-4)


def test_every_place_of_a_row_is_accounted_for(drawn):
    _, (_, ids, mask, _), tokens = drawn
    new_ids, completion = np.asarray(tokens.new_ids), np.asarray(tokens.completion)
    np.testing.assert_array_equal(tokens.ids[:, :8], ids)
    np.testing.assert_array_equal(tokens.mask, np.concatenate([mask, completion], axis=1))
    lengths = completion.sum(axis=1)
    assert len(set(lengths)) > 2
    for row, length in enumerate(lengths):
        assert completion[row, :length].all()
        assert not np.isin(new_ids[row, : length - 1], ENDS).any()
        assert length == 24 or new_ids[row, length - 1] in ENDS
        assert not new_ids[row, length:].any()
    logp = np.asarray(tokens.logp)
    assert (logp[completion] < 0).all()
    assert not logp[~completion].any()


def test_log_probs_are_those_of_the_whole_text(drawn):
    model, (adapters, *_), tokens = drawn
    logits = jax.jit(
        lambda m, t, x: m.logits(t, m.hidden(t, x.ids, x.mask)), compiler_options=QUICK
    )
    scores = logits(model, adapters, tokens)[:, 7:-1]
    replayed = np.where(tokens.completion, chosen_log_probs(scores, tokens.new_ids), 0)
    np.testing.assert_allclose(tokens.logp, replayed, atol=3e-5)
    base = logits(model, None, tokens)[:, 7:-1]
    base = np.where(tokens.completion, chosen_log_probs(base, tokens.new_ids), 0)
    assert np.abs(base - replayed).max() > 0.1

    # Each token is the likeliest one under the noise of its row and number.
    noise = np.stack([token_noise(row_keys(8), i, SMALL.vocab_size) for i in range(24)], axis=1)
    again = np.argmax(np.asarray(scores) + noise, axis=-1)
    completion = np.asarray(tokens.completion)
    np.testing.assert_array_equal(again[completion], np.asarray(tokens.new_ids)[completion])


def test_a_call_repeats_to_the_bit(drawn):
    model, arguments, tokens = drawn
    again, _ = SAMPLE(model, *arguments)
    for a, b in zip(jax.tree.leaves(tokens), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_row_depends_on_its_own_prompt_and_key_alone(drawn):
    """Not on its place in the call, the other rows, or how many columns pad it."""
    model, (adapters, ids, mask, keys), tokens = drawn
    rows = np.array([6, 1, 3, 4])
    wider = ((0, 0), (3, 0))
    few, _ = SAMPLE(
        model, adapters, np.pad(ids, wider)[rows], np.pad(mask, wider)[rows], keys[rows]
    )
    np.testing.assert_array_equal(few.new_ids, np.asarray(tokens.new_ids)[rows])
    np.testing.assert_allclose(few.logp, np.asarray(tokens.logp)[rows], atol=2e-5)
    other, _ = SAMPLE(model, adapters, ids, mask, row_keys(8, seed=1))
    assert (np.asarray(other.new_ids)[:, 0] != np.asarray(tokens.new_ids)[:, 0]).any()


@pytest.mark.slow
def test_a_mesh_draws_the_same(drawn):
    _, (_, ids, mask, keys), tokens = drawn
    mesh = make_mesh(2, 2, 2, jax.devices())
    model = random_language(SMALL, mesh)
    arguments = (random_adapters(model), *on_rows((ids, mask, keys), mesh))
    many, finite = SAMPLE(model, *arguments)
    assert finite
    np.testing.assert_array_equal(many.new_ids, tokens.new_ids)
    assert many.ids.sharding.spec == on_rows(ids, mesh).sharding.spec


def test_one_new_token_and_rows_that_end_at_once():
    model = golden_language()
    ids, mask = prompts(96, (3, 4), 4)
    everything = tuple(range(96))
    tokens, _ = sampler(steps=5, ends=everything)(model, None, ids, mask, row_keys(2))
    np.testing.assert_array_equal(tokens.completion.sum(axis=1), 1)
    tokens, _ = sampler(steps=1, ends=())(model, None, ids, mask, row_keys(2))
    assert tokens.completion.shape == (2, 1)
    assert tokens.completion.all()


def test_logits_that_are_not_finite_are_reported():
    model = golden_language()
    broken = jax.tree.map(lambda leaf: leaf.at[..., 0].set(jnp.nan), model.params)
    ids, mask = prompts(96, (3, 4), 4)
    run = sampler(steps=3)
    assert not run(replace(model, params=broken), None, ids, mask, row_keys(2))[1]
    assert run(model, None, ids, mask, row_keys(2))[1]


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.6)])
def test_tokens_have_the_distribution_that_was_asked_for(temperature, top_p):
    """The first token of 4,000 rows with one prompt."""
    n = 4000
    model = golden_language()
    ids, mask = prompts(96, (4,), 4)
    logits = model.logits(None, model.hidden(None, ids, mask))[0, -1]
    p = np.asarray(jax.nn.softmax(logits / temperature), np.float64)
    if top_p < 1:
        order = np.argsort(-p)
        kept = order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1]
        p = np.where(np.isin(np.arange(96), kept), p, 0)
    p = p / p.sum()
    run = sampler(steps=1, temperature=temperature, top_p=top_p)
    many = (jnp.broadcast_to(ids, (n, 4)), jnp.broadcast_to(mask, (n, 4)))
    tokens, _ = run(model, None, *many, row_keys(n))
    drawn = np.asarray(tokens.new_ids)[:, 0]
    np.testing.assert_allclose(np.asarray(tokens.logp)[:, 0], np.log(p[drawn]), atol=1e-4)
    shares = np.bincount(drawn, minlength=96) / n
    assert np.abs(shares - p).max() < 4 * np.sqrt(p * (1 - p) / n).max()
