"""GRPO on tokens: recorded losses and gradients, the bits of the replay, and its denominators."""

from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from realgen_jax.advantages import group_advantages
from realgen_jax.models.trainable import AllWeights
from realgen_jax.nn.export import to_torch
from realgen_jax.nn.lora import lora_tensors
from realgen_jax.objectives.token_grpo import TokenBatch, TokenGrpo
from realgen_jax.rewriter.generate import Tokens, generate
from realgen_jax.rollout import compiler_options
from realgen_jax.sharding import make_mesh
from realgen_jax.update import EmaConfig, TrainState, make_optimizer, update
from tests.helpers.compiling import QUICK
from tests.helpers.goldens import golden
from tests.helpers.language import (
    ADAPTER,
    LORA,
    RECORDED,
    SMALL,
    TIED,
    golden_language,
    golden_tokens,
    on_rows,
    prompts,
    random_adapters,
    random_language,
    row_keys,
)

STEPS = 16
OPTIMIZER = make_optimizer(1e-3, 0.9, 0.999, 1e-8, 0.0, 1e9)
slow = pytest.mark.slow
PLAIN = {"clip": (0.2, 0.28), "adv_clip_max": 100.0, "logit_chunk": 4}


# -- Recorded losses and gradients

# Variant -> what differs from PLAIN, with or without KL.
VARIANTS = {
    "token": {},
    "token_kl": {"beta": 0.04},
    "token_t07": {"temperature": 0.7},
    "sequence": {"aggregate": "sequence"},
    "sequence_kl": {"aggregate": "sequence", "beta": 0.04},
    "constant": {"aggregate": "constant"},
    "gspo": {"loss": "gspo", "aggregate": "sequence", "clip": (0.01, 0.014)},
}
QUICKER = ("token_kl",)  # the others with the slow tests: each compiles a gradient


def golden_batch(objective):
    """The six rows in one microbatch."""
    case = golden("15_rewriter/grpo.npz")
    old = case["old_logp_t07" if objective.temperature == 0.7 else "old_logp"]
    one = partial(jax.tree.map, lambda leaf: jnp.asarray(leaf)[None])
    return TokenBatch(
        tokens=one(golden_tokens()),
        advantages=one(case["advantages"].astype(np.float32)),
        reference=one(case["ref_logp"].astype(np.float32)) if objective.beta else None,
        old=one(old.astype(np.float32)),
        denominators=objective.denominators(case["completion_mask"].astype(bool)),
    )


def gradient(objective, model, trainable, batch):
    state = TrainState(trainable, trainable, None, jnp.int32(0))
    return jax.jit(objective.gradient, compiler_options=QUICK)(model, state, batch)


def check(metrics, grads, case, name):
    """Losses within 2e-6, the norm within 1e-5 of itself."""
    np.testing.assert_allclose(metrics["loss"], case[f"{name}_loss"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(metrics["policy_loss"], case[f"{name}_policy"], rtol=0, atol=2e-6)
    if f"{name}_kl" in case:
        np.testing.assert_allclose(metrics["kl"], case[f"{name}_kl"], rtol=0, atol=2e-6)
    if f"{name}_clipped" in case:
        share = case[f"{name}_clipped"]
        np.testing.assert_allclose(metrics["clipfrac"], share, rtol=0, atol=1e-6)
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in grads.values()))
    np.testing.assert_allclose(norm, case[f"{name}_grad_norm"], rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICKER else pytest.param(name, marks=slow) for name in VARIANTS],
)
def test_losses_and_gradients_match_the_golden(name):
    case = golden("15_rewriter/grpo.npz")
    objective = TokenGrpo(**{**PLAIN, **VARIANTS[name]})
    model = golden_language(TIED, AllWeights())
    trainable = model.trainable.init(model, jax.random.key(0))
    grads, metrics = gradient(objective, model, trainable, golden_batch(objective))
    ours = dict(to_torch(grads, model.family.table(model.config)))
    check(metrics, ours, case, name)

    recorded = {
        key.removeprefix(f"{name}_grad/"): value
        for key, value in case.items()
        if key.startswith(f"{name}_grad/")
    }
    if name == "token_kl":
        recorded |= load_file(RECORDED / "grpo_token_kl_grads.safetensors")
        assert recorded.keys() == ours.keys()
    assert recorded
    for key, value in recorded.items():
        np.testing.assert_allclose(ours[key], value, rtol=0, atol=5e-6)


def test_the_gradient_of_an_adapter_matches_the_golden():
    case = golden("15_rewriter/grpo.npz")
    objective = TokenGrpo(**{**PLAIN, **VARIANTS["token_kl"]})
    model = golden_language(TIED, LORA)
    adapters = LORA.load(model, ADAPTER, jax.random.key(0))
    grads, metrics = gradient(objective, model, adapters, golden_batch(objective))
    ours = lora_tensors(grads, model.family.table(model.config))
    check(metrics, ours, case, "lora_token_kl")
    recorded = load_file(RECORDED / "grpo_lora_token_kl_grads.safetensors")
    assert len(recorded) == len(ours) == 28
    for key, value in recorded.items():
        name = key.removeprefix("base_model.model.").replace(".default", "")
        np.testing.assert_allclose(ours[name.removesuffix(".weight")], value, rtol=0, atol=1e-5)

    logp = jax.jit(objective.log_probs)(model, adapters, golden_tokens())
    np.testing.assert_allclose(logp, case["lora_logp"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("chunk", [4, 64])
def test_log_probs_match_the_golden(chunk):
    case = golden("15_rewriter/grpo.npz")
    objective = TokenGrpo(logit_chunk=chunk)
    logp = jax.jit(objective.log_probs, compiler_options=QUICK)(
        golden_language(), None, golden_tokens()
    )
    np.testing.assert_allclose(logp, case["logp"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("spread", ["group", "global"])
def test_advantages_match_the_golden(spread):
    """A rewrite's reward is the mean over its pictures; group 2 of `detector` has no spread."""
    case = golden("15_rewriter/advantage.npz")
    names = ("detector", "align", "length")
    scores = {
        name: case[name].mean(axis=2) if case[name].ndim == 3 else case[name] for name in names
    }
    weights = dict(zip(names, case["weights"].tolist(), strict=True))
    ours = group_advantages(scores, weights, global_std=spread == "global")
    np.testing.assert_allclose(ours, case[f"advantage_{spread}_std"], rtol=0, atol=1e-6)


# -- The bits of the replay

LENGTHS = (8, 3, 5, 1, 8, 2, 7, 4, 6, 8, 1, 3, 2, 5, 7, 4)


@cache
def drawn(dtype, sizes):
    """A call of 16 rows on a mesh: model, adapters, tokens, keys."""
    mesh = make_mesh(*sizes, jax.devices())
    config = replace(SMALL, dtype=dtype, param_dtype=dtype)
    model = random_language(config, mesh)
    adapters = random_adapters(model)
    ids, mask = prompts(config.vocab_size, LENGTHS, 8)
    keys = row_keys(16)
    fixed = {"steps": STEPS, "ends": tuple(range(1, 20)), "pad": 0, "temperature": 1.0}
    run = jax.jit(partial(generate, **fixed), compiler_options=QUICK)
    tokens, finite = run(model, adapters, *on_rows((ids, mask, keys), mesh))
    assert finite
    return model, adapters, tokens, keys


def batch_of(tokens, microbatches, objective, mesh, **changes):
    """The rows of a call in microbatches, [microbatches, n, ...]."""
    n = tokens.ids.shape[0]

    def split(leaf):
        leaf = np.asarray(leaf)
        return leaf.reshape(microbatches, n // microbatches, *leaf.shape[1:])

    advantages = split(np.linspace(-1, 2, n, dtype=np.float32))
    split_tokens = jax.tree.map(split, tokens)
    batch = TokenBatch(
        split_tokens, advantages, None, None, objective.denominators(tokens.completion)
    )
    batch = replace(batch, **jax.tree.map(split, changes))
    rows = replace(batch, denominators=None)
    return replace(on_rows(rows, mesh, axis=1), denominators=batch.denominators)


@pytest.mark.parametrize(
    ("dtype", "sizes", "options"),
    [
        (jnp.float32, (1, 1, 1), QUICK),
        pytest.param(jnp.float32, (1, 1, 1), {}, marks=slow),
        pytest.param(jnp.float32, (2, 4, 1), {}, marks=slow),
        pytest.param(jnp.bfloat16, (1, 1, 1), {}, marks=slow),
        pytest.param(jnp.bfloat16, (2, 4, 1), {}, marks=slow),
    ],
)
def test_replay_and_update_agree_to_the_bit(dtype, sizes, options):
    """On unchanged weights the ratio to recorded log-probs is 1 exactly."""
    model, adapters, tokens, _ = drawn(dtype, sizes)
    mesh = model.mesh
    objective = TokenGrpo(logit_chunk=8, beta=0.02)
    options = {**options, **compiler_options(dtype, mesh)}
    jit = partial(jax.jit, compiler_options=options)
    log_probs = jit(objective.log_probs)
    reference = log_probs(model, None, tokens)
    batch = batch_of(tokens, 2, objective, mesh, reference=reference)
    state = TrainState(adapters, adapters, OPTIMIZER.init(adapters), jnp.int32(0))
    step = jit(partial(update, objective, OPTIMIZER, EmaConfig(0.9, 1)))

    old = jit(objective.recompute_old)(model, adapters, batch)
    _, metrics = step(model, state, old)
    assert float(metrics["ratio_deviation"]) == 0
    assert float(metrics["clipfrac"]) == 0
    assert float(metrics["kl"]) > 1e-4

    # The replay alone, of a microbatch, and on one device of all rows at once. With fewer rows on a
    # device, the compiler makes other products.
    flat = np.asarray(old.old).reshape(16, STEPS)
    half = on_rows(jax.tree.map(lambda leaf: np.asarray(leaf)[:8], tokens), mesh)
    np.testing.assert_array_equal(log_probs(model, adapters, half), flat[:8])
    if mesh.size == 1:
        np.testing.assert_array_equal(log_probs(model, adapters, tokens), flat)


@slow
def test_a_second_step_on_the_same_rows_has_moved():
    """The first step takes its own log-probs, and the ratio is 1; the second one's are recorded."""
    model, adapters, tokens, _ = drawn(jnp.float32, (1, 1, 1))
    objective = TokenGrpo(logit_chunk=8)
    batch = batch_of(tokens, 2, objective, model.mesh)
    state = TrainState(adapters, adapters, OPTIMIZER.init(adapters), jnp.int32(0))
    step = jax.jit(partial(update, objective, OPTIMIZER, EmaConfig(0.9, 1)))
    old = jax.jit(objective.recompute_old)(model, adapters, batch)
    first, metrics = step(model, state, batch)
    assert float(metrics["ratio_deviation"]) == 0
    second, metrics = step(model, first, old)
    assert 1e-4 < float(metrics["ratio_deviation"]) < 1
    assert int(second.step) == 2


@slow
@pytest.mark.parametrize(
    ("dtype", "gap", "flips"),
    [(jnp.float32, 5e-5, 0), (jnp.bfloat16, 0.3, 0.1)],
)
def test_the_sampler_differs_from_the_replay_by_rounding(dtype, gap, flips):
    model, adapters, tokens, keys = drawn(dtype, (1, 1, 1))
    objective = TokenGrpo(logit_chunk=8)
    batch = batch_of(tokens, 1, objective, model.mesh)
    _, metrics = gradient(objective, model, adapters, batch)
    assert 0 < float(metrics["gap_mean"]) < float(metrics["gap_max"]) < gap
    flip = jax.jit(objective.flips, compiler_options=QUICK)
    flipped = flip(model, adapters, tokens, keys)
    assert np.asarray(flipped).sum() / np.asarray(tokens.completion).sum() <= flips
    assert np.asarray(flip(model, None, tokens, keys)).any()


# -- Denominators


def eight_rows():
    """Half of the call; the first row has one token."""
    model, adapters, tokens, _ = drawn(jnp.float32, (1, 1, 1))
    half = jax.tree.map(lambda leaf: np.array(leaf[:8]), tokens)
    half.completion[0, 1:] = False
    half.mask[0, 9:] = False
    assert len(set(half.completion.sum(axis=1))) > 2
    return model, adapters, half


CASES = [("token", "grpo"), ("token", "gspo"), ("sequence", "grpo"), ("constant", "gspo")]


def same_for_every_split(objective, policy, trainable, tokens, mesh):
    """The gradient and the metrics of eight rows in 1 microbatch and in 4."""
    old = np.asarray(tokens.logp) + np.float32(0.05)
    reference = np.asarray(tokens.logp) - np.float32(0.1)
    results = []
    for microbatches in (1, 4):
        batch = batch_of(tokens, microbatches, objective, mesh, reference=reference, old=old)
        results.append(gradient(objective, policy, trainable, batch))
    (one, one_metrics), (four, four_metrics) = results
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        assert np.abs(a).max() > 1e-4
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1, np.abs(a).max()))
    assert one_metrics.keys() == four_metrics.keys()
    for name, value in one_metrics.items():
        np.testing.assert_allclose(four_metrics[name], value, rtol=1e-5, atol=1e-6)


@slow
@pytest.mark.parametrize(("aggregate", "loss"), CASES)
def test_a_split_into_microbatches_changes_nothing(aggregate, loss):
    model, adapters, tokens = eight_rows()
    objective = TokenGrpo(loss=loss, aggregate=aggregate, beta=0.1, logit_chunk=8)
    same_for_every_split(objective, model, adapters, tokens, model.mesh)


@pytest.mark.parametrize(("aggregate", "loss"), CASES)
def test_a_split_of_a_table_changes_nothing(aggregate, loss):
    """The policy is a table [V, V] of the logits of a token by the token before it."""

    @partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
    @dataclass(frozen=True)
    class Table:
        def hidden(self, trainable, ids, mask):
            return trainable[ids]

        def logits(self, trainable, hidden):
            return hidden

    rng = np.random.default_rng(0)
    lengths = np.array([1, 6, 3, 2, 6, 5, 1, 4])
    completion = np.arange(6) < lengths[:, None]
    table = rng.normal(size=(7, 7)).astype(np.float32)
    ids = rng.integers(0, 7, (8, 8)).astype(np.int32)
    mask = np.concatenate([np.ones((8, 2), bool), completion], axis=1)
    objective = TokenGrpo(loss=loss, aggregate=aggregate, beta=0.1, logit_chunk=4)
    tokens = Tokens(ids, mask, completion, np.zeros((8, 6), np.float32), 2)
    tokens = replace(tokens, logp=objective.log_probs(Table(), table, tokens))
    same_for_every_split(objective, Table(), table, tokens, make_mesh(1, 1, 1, jax.devices()))


def test_denominators_count_all_rows():
    mask = np.array([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 1]]], bool)
    for aggregate, count in (("token", 9), ("sequence", 4), ("constant", 12)):
        assert TokenGrpo(aggregate=aggregate).denominators(mask) == count


# -- Weights, advantages, options


def one_row(logp, old, sampled, advantage, **options):
    """Loss and metrics of a row whose log-probs are given: the policy is a table of them."""
    tokens = len(logp)

    class Policy:
        """Logits of two tokens, of which the first was drawn."""

        def hidden(self, trainable, ids, mask):
            return jnp.concatenate([trainable[None], jnp.zeros((1, 1))], axis=1)[..., None]

        def logits(self, trainable, hidden):
            p = jnp.exp(hidden)
            return jnp.concatenate([hidden, jnp.log1p(-p)], axis=-1)

    ids = jnp.zeros((1, tokens + 1), jnp.int32)
    mask = jnp.ones((1, tokens + 1), bool)
    objective = TokenGrpo(**options)
    rows = jnp.asarray
    batch = TokenBatch(
        tokens=Tokens(ids[None], mask[None], mask[None, :, 1:], rows([[sampled]]), 1),
        advantages=rows([[advantage]]),
        reference=None,
        old=rows([[old]]),
        denominators=np.float32(tokens),
    )
    state = TrainState(rows(logp), None, None, jnp.int32(0))
    return objective.gradient(Policy(), state, batch)


def test_the_clip_is_lopsided():
    """Written out: ratios of 1.5, 1.2 and 0.7 with advantage 1 and clip (0.2, 0.28)."""
    old = np.log([0.2, 0.2, 0.2]).astype(np.float32)
    logp = old + np.log([1.5, 1.2, 0.7]).astype(np.float32)
    grads, metrics = one_row(logp, old, old, 1.0)
    np.testing.assert_allclose(metrics["loss"], -(1.28 + 1.2 + 0.7) / 3, rtol=1e-5)
    np.testing.assert_allclose(metrics["clipfrac"], 1 / 3, rtol=1e-5)
    np.testing.assert_allclose(grads, [0, -1.2 / 3, -0.7 / 3], rtol=1e-4)
    np.testing.assert_allclose(metrics["ratio_deviation"], 0.5, rtol=1e-5)

    # With advantage -1 a small ratio is clipped, and a large one is not.
    grads, metrics = one_row(logp, old, old, -1.0)
    np.testing.assert_allclose(metrics["loss"], (1.5 + 1.2 + 0.8) / 3, rtol=1e-5)
    np.testing.assert_allclose(grads, [1.5 / 3, 1.2 / 3, 0], rtol=1e-4)


def test_importance_weights_are_truncated():
    """exp(old - sampled) of 4, 1.5 and 0.5, cut at 2, without a gradient."""
    old = np.log([0.2, 0.2, 0.2]).astype(np.float32)
    sampled = old - np.log([4.0, 1.5, 0.5]).astype(np.float32)
    grads, metrics = one_row(old, old, sampled, 1.0, importance_cap=2.0)
    np.testing.assert_allclose(grads, [-2 / 3, -1.5 / 3, -0.5 / 3], rtol=1e-4)
    np.testing.assert_allclose(metrics["gap_clipped"], 1 / 3, rtol=1e-5)
    np.testing.assert_allclose(metrics["gap_max"], np.log(4), rtol=1e-4)
    np.testing.assert_allclose(metrics["gap_mean"], np.log([4, 1.5, 2]).mean(), rtol=1e-4)
    grads, metrics = one_row(old, old, sampled, 1.0, importance_cap=0.0)
    np.testing.assert_allclose(grads, [-1 / 3] * 3, rtol=1e-4)
    assert metrics["gap_clipped"] == 0


def test_advantages_are_clipped_and_entropy_is_counted():
    old = np.log([0.5, 0.25]).astype(np.float32)
    _, metrics = one_row(old, old, old, 9.0, adv_clip_max=5.0)
    np.testing.assert_allclose(metrics["loss"], -5.0, rtol=1e-5)
    entropy = np.mean([np.log(2), -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))])
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "ppo"}, "config.rewriter.loss is 'ppo'; choose one of grpo, gspo"),
        ({"aggregate": "mean"}, "config.rewriter.aggregate is 'mean'; choose one of token, seq"),
        ({"clip": (1.2, 0.2)}, r"config.rewriter.clip_range is \(1.2, 0.2\)"),
        ({"clip": (0.2,)}, r"config.rewriter.clip_range is \(0.2,\)"),
        ({"importance_cap": 0.5}, "config.rewriter.importance_cap is 0.5; expected 1 or more"),
        ({"temperature": 0.0}, "config.rewriter.temperature is 0; expected above 0"),
        ({"logit_chunk": 0}, "config.rewriter.logit_chunk is 0; expected above 0"),
    ],
)
def test_options_that_make_no_loss_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TokenGrpo(**options)
