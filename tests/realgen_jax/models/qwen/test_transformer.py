"""Qwen3 against recorded logits and hidden states."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realgen_jax.models.qwen.transformer import Qwen3Config, rms_norm
from realgen_jax.nn.convert import abstract, leaves
from realgen_jax.rewriter.generate import chosen_log_probs
from realgen_jax.sharding import make_mesh, param_sharding
from tests.helpers.compiling import QUICK
from tests.helpers.goldens import golden
from tests.helpers.language import (
    ADAPTER,
    LORA,
    SMALL,
    TIED,
    UNTIED,
    golden_language,
    golden_tokens,
    on_rows,
    prompts,
    random_adapters,
    random_language,
)

FOLDERS = {"tied": TIED, "untied": UNTIED}


@partial(jax.jit, compiler_options=QUICK)
def logits_of(model, trainable, ids, mask):
    return model.logits(trainable, model.hidden(trainable, ids, mask))


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", list(FOLDERS))
def test_logits_and_log_probs_match_the_golden(name):
    case = golden("15_rewriter/forward.npz")
    model = golden_language(FOLDERS[name])
    ids = jnp.asarray(case["ids"], jnp.int32)
    logits = logits_of(model, None, ids, jnp.ones(ids.shape, bool))
    close(logits, case[f"{name}_logits"], 5e-5)
    for temperature, suffix in ((1.0, "logp"), (0.7, "logp_t07")):
        logp = chosen_log_probs(logits[:, :-1] / temperature, ids[:, 1:])
        close(logp, case[f"{name}_{suffix}"], 5e-5)


@pytest.mark.parametrize("name", ["tied", pytest.param("untied", marks=pytest.mark.slow)])
def test_hidden_states_match_the_golden(name):
    """After the embedding, after one block, and after the last block and norm."""
    case = golden("15_rewriter/forward.npz")
    model = golden_language(FOLDERS[name])
    ids = jnp.asarray(case["ids"], jnp.int32)
    close(leaves(model.params)["embedding"][ids], case[f"{name}_hidden_0"], 0)
    hidden = jax.jit(model.hidden, compiler_options=QUICK)(None, ids, jnp.ones(ids.shape, bool))
    close(hidden, case[f"{name}_hidden_2"], 2e-5)

    # One block alone, without the last norm.
    graph, _ = abstract(model.family.Module, replace(model.config, num_hidden_layers=1))
    whole = nnx.to_flat_state(model.params)
    first = [
        (path, leaf.replace(leaf.get_value()[:1] if path[0] == "layers" else leaf.get_value()))
        for path, leaf in whole
    ]
    network = nnx.merge(graph, nnx.from_flat_state(first))
    after_one = network(ids)
    expected = rms_norm(case[f"{name}_hidden_1"], network.norm[...], model.config.rms_norm_eps)
    close(after_one, expected, 2e-5)


def test_padding_on_the_left_changes_nothing():
    case = golden("15_rewriter/forward.npz")
    model = golden_language()
    ids = jnp.asarray(case["padded_ids"], jnp.int32)
    mask = case["padded_mask"].astype(bool)
    logits = np.asarray(logits_of(model, None, ids, jnp.asarray(mask)))
    close(logits[mask], case["padded_logits"][mask], 5e-5)


def test_an_adapter_matches_the_golden():
    case = golden("15_rewriter/grpo.npz")
    model = golden_language(TIED, LORA)
    adapters = LORA.load(model, ADAPTER, jax.random.key(0))
    tokens = golden_tokens()
    logits = logits_of(model, adapters, tokens.ids, tokens.mask)
    logp = chosen_log_probs(logits[:, tokens.length - 1 : -1], tokens.new_ids)
    close(np.where(tokens.completion, logp, 0), case["lora_logp"], 5e-5)
    base = logits_of(model, None, tokens.ids, tokens.mask)
    assert np.abs(base - logits).max() > 0.1


def test_another_theta_fails_the_golden():
    case = golden("15_rewriter/forward.npz")
    model = golden_language()
    ids = jnp.asarray(case["ids"], jnp.int32)
    other = replace(model, config=replace(model.config, rope_theta=1e6))
    logits = logits_of(other, None, ids, jnp.ones(ids.shape, bool))
    assert np.abs(logits - case["tied_logits"]).max() > 0.5


def test_every_parameter_has_one_rule():
    for tied in (True, False):
        config = Qwen3Config(num_hidden_layers=2, tie_word_embeddings=tied)
        sharding = param_sharding(make_mesh(2, 2, 2, jax.devices()), golden_language().family.rules)
        names = leaves(abstract(golden_language().family.Module, config)[1])
        assert len(names) == 13 + (not tied)
        split = {name: sharding(name, leaf.shape).spec for name, leaf in names.items()}
        assert sum(any(spec) for spec in split.values()) == 8 + (not tied)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_logits_are_the_same_on_a_mesh(tied):
    config = replace(SMALL, tie_word_embeddings=tied)
    ids, mask = prompts(config.vocab_size, (9, 12, 1, 5, 12, 3, 8, 7), 12)
    outputs = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = make_mesh(*sizes, jax.devices())
        model = random_language(config, mesh)
        adapters = random_adapters(model)
        outputs.append(np.asarray(logits_of(model, adapters, *on_rows((ids, mask), mesh)))[mask])
    close(outputs[1], outputs[0], 1e-5 * np.abs(outputs[0]).max())
    assert outputs[0].std() > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "not a multiple of"),
        ({"head_dim": 5}, "expected an even number"),
        ({"remat": "some"}, "remat is 'some'; choose one of"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Qwen3Config(**changes)


def test_heads_are_split_whole():
    mesh = make_mesh(1, 1, 4, jax.devices())
    with pytest.raises(ValueError, match=r"num_key_value_heads 2 .* mesh axis tensor=4"):
        random_language(SMALL, mesh)
