"""The pictures that the KL is for: GARDO's gate, its share, and the keys that choose it."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from realgen_jax.config import base
from realgen_jax.training.kl_gate import Gate, gate_epoch, gate_problems, rank_gaps, under_kl
from tests.helpers.objective_goldens import case


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_the_gate_matches_the_golden(share):
    """The paper's sign; the code's is the opposite."""
    gardo = case("gardo")
    gaps = rank_gaps(gardo["reward"], gardo["other_rewards"])
    gardo.check("gap", -gaps)
    gardo.check("paper/uncertainty", gaps / len(gaps))
    gardo.check(f"paper/share{share}/under_kl", under_kl(gaps, share))
    gardo.check(f"share{share}/under_kl", under_kl(-gaps, share))


def test_the_share_matches_the_golden():
    gardo = case("gardo")
    gate, shares = Gate(0.1), []
    for mean in gardo["mean_gaps"]:
        gate = gate.after(float(mean), 0.02, 0.2)
        shares.append(gate.share)
    gardo.check("share_after", shares)
    assert len(gate.means) == 20


def config(**changes):
    c = base()
    c.reward.fn = ConfigDict({"a": 1.0})
    c.reward.watched = ("b", "c")
    c.train.beta, c.train.kl_gate.against = 0.1, ("b", "c")
    c.update_from_flattened_dict({key.replace("__", "."): new for key, new in changes.items()})
    return c


def scores(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((5, 8)).astype(np.float32) for name in "abc"}


def test_an_epoch_gates_the_pictures_that_only_the_trained_reward_likes():
    """Of 10 pictures, one is the best for the trained reward and the worst for the others."""
    values = np.arange(10.0)[None]
    groups = {"a": values.copy(), "b": values, "c": 2 * values}
    groups["a"][0, [0, 9]] = 9.0, 0.0
    weights, metrics = gate_epoch(config(), groups, {})
    np.testing.assert_array_equal(weights, [[1] + [0] * 9])
    assert weights.dtype == np.float32
    assert metrics == {"kl_gate/share": 0.1, "kl_gate/pictures": 0.1}


def test_the_share_goes_on_where_a_checkpoint_left_it():
    """The history is stored as JSON."""
    whole, resumed = {}, {}
    for epoch in range(12):
        expected = gate_epoch(config(), scores(epoch), whole)
        got = gate_epoch(config(), scores(epoch), resumed)
        resumed = json.loads(json.dumps(resumed))
        np.testing.assert_array_equal(got[0], expected[0])
        assert got[1] == expected[1]
    assert whole == resumed
    assert whole["kl_gate"]["share"] != 0.1


def test_without_other_rewards_there_is_no_gate():
    history = {}
    assert gate_epoch(config(train__kl_gate__against=()), scores(0), history) == (None, {})
    assert history == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward__watched": ("b",)}, "against has 'c', which"),
        ({"train__kl_gate__against": ("a", "b")}, "has 'a', which is not scored"),
        ({"train__beta": 0.0}, "config.train.beta is 0; expected a beta above 0"),
        ({"train__kl_gate__share": 0.3}, "kl_gate.share is 0.3; expected a number from"),
    ],
)
def test_contradictory_keys_are_refused(changes, message):
    (problem,) = gate_problems(config(**changes))
    assert message in problem


def test_fitting_keys_are_not_refused():
    assert not gate_problems(config())
    assert not gate_problems(base())
