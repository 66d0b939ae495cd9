import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from realgen_jax.sharding import make_mesh
from realgen_jax.training.evaluation import evaluate, fallen

torch = pytest.importorskip("torch")

from reward_bridge.bridge import RewardBridge  # noqa: E402


def test_an_evaluation_finds_rewards_that_look_at_the_batch():
    """Correlation and repeatability, of pictures 0, 1, ... and rewards made up; the last call is
    filled up.
    """

    def value(images, prompts):
        return images[:, 0, 0, 0].float()

    rewards = {
        "value": value,
        "minus": lambda x, p: -value(x, p),
        "company": lambda x, p: value(x, p) - value(x, p).mean(),
        "same": lambda x, p: torch.ones(len(p)),
    }
    sample = {"test_images_per_prompt": 2, "test_batch_size": 4}
    config = ConfigDict(
        {
            "sample": sample,
            "reward": {"fn": {"value": 2.0}, "held_out": ("minus", "company", "same")},
        }
    )
    run = SimpleNamespace(
        config=config,
        test_prompts=["a", "b", "c"],
        model=SimpleNamespace(mesh=make_mesh(1, 1, 1, devices=jax.devices()[:1])),
        scorer=RewardBridge(rewards, dict.fromkeys(rewards, "cpu"), deadline=20, retries=0),
        metrics={"pictures": len},
        cond=lambda prompts: prompts,
        key=lambda stream: None,
    )

    def draw(model, trainable, cond, key, ids):
        return jnp.broadcast_to(ids[:, None, None, None], (4, 3, 2, 2)).astype("uint8")

    found = evaluate(run, SimpleNamespace(evaluate=draw), None)
    assert found.prompts == ["a", "a", "b", "b", "c", "c"]
    assert found.scores["value"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found.means["value"] == found.means["reward"] == 2.5
    assert (found.means["prompt_std"], found.means["pictures"]) == (0.5, 6)
    assert found.correlation["minus"] == pytest.approx(-1)
    assert "same" not in found.correlation  # it has no spread
    noise = {name: float(found.details[f"noise/{name}"]) for name in rewards}
    assert noise == {"value": 0, "minus": 0, "company": pytest.approx(1 / 2**0.5), "same": 0}


def test_held_out_rewards_end_a_run_after_as_many_falls_as_allowed():
    def evaluations(*rows, drop=0.1, patience=2):
        """Evaluations (held-out score, reward) until the run ends, None where it does not."""
        reward = ConfigDict({"held_out": ("h",), "stop_drop": drop, "stop_patience": patience})
        peaks = {}
        for count, (held_out, trained) in enumerate(rows, start=1):
            peaks = json.loads(json.dumps(peaks))  # as a checkpoint keeps it
            if reasons := fallen(peaks, {"h": held_out, "reward": trained}, reward):
                assert reasons[0].startswith("h fell from 0.5 to ")
                return count
        return None

    assert evaluations((0.5, 0.1), (0.35, 0.2), (0.35, 0.2)) == 3
    assert (
        evaluations((0.5, 0.1), (0.35, 0.2), (0.45, 0.2), (0.35, 0.2), (0.3, 0.3)) == 5
    )  # twice in a row
    assert evaluations((0.4, 0.1), (0.5, 0.2), (0.35, 0.3), (0.35, 0.3)) == 4  # since its best
    assert evaluations((0.5, 0.1), (0.35, 0.1), (0.35, 0.05)) is None  # the reward does not rise
    assert evaluations((0.5, 0.1), (0.45, 0.2), (0.41, 0.2)) is None  # by less than the drop
    assert evaluations((0.5, 0.1), (0.1, 0.2), (0.1, 0.2), patience=0) is None  # never
