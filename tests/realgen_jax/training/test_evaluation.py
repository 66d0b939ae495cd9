from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from realgen_jax.sharding import make_mesh
from realgen_jax.training.evaluation import evaluate
from realgen_jax.training.stage import Drawn

torch = pytest.importorskip("torch")

from reward_bridge.bridge import RewardBridge  # noqa: E402


def value(images, prompts):
    return images[:, 0, 0, 0].float()


def numbered(model, trainable, cond, key, ids):
    """Pictures 0, 1, ..."""
    return jnp.broadcast_to(ids[:, None, None, None], (4, 3, 2, 2)).astype("uint8")


EVALUATE = {"sample": {"guidance_scale": 1.0}}


def made_up_run(copies, prompts, rewards):
    """A run with these rewards, of which the first one is trained on."""
    sample = {"test_images_per_prompt": copies, "test_batch_size": 4}
    name, *held_out = rewards
    reward = {"fn": {name: 2.0}, "held_out": tuple(held_out)}
    return SimpleNamespace(
        config=ConfigDict(
            {"stage": "diffusion", "sample": sample, "reward": reward, "evaluate": EVALUATE}
        ),
        test_prompts=prompts,
        evaluated=SimpleNamespace(mesh=make_mesh(1, 1, 1, devices=jax.devices()[:1])),
        scorer=RewardBridge(rewards, dict.fromkeys(rewards, "cpu"), deadline=20, retries=0),
        metrics={"pictures": len},
        monitor="reward",
        cond=lambda texts, guidance, cache: texts,
        scored_test_prompts=prompts,
        key=lambda stream: None,
    )


STAGE = SimpleNamespace(
    evaluate=numbered, draw=lambda trainable, prompts: Drawn(prompts, None, trainable)
)


def test_an_evaluation_finds_rewards_that_look_at_the_batch():
    """Correlation and repeatability, of pictures 0, 1, ... and rewards made up; the last call is
    filled up.
    """
    rewards = {
        "value": value,
        "minus": lambda x, p: -value(x, p),
        "company": lambda x, p: value(x, p) - value(x, p).mean(),
        "same": lambda x, p: torch.ones(len(p)),
    }
    run = made_up_run(2, ["a", "b", "c"], rewards)
    found = evaluate(run, STAGE, None)
    assert found.prompts == ["a", "a", "b", "b", "c", "c"]
    assert found.scores["value"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found.means["value"] == found.means["reward"] == 2.5
    assert (found.means["prompt_std"], found.means["pictures"]) == (0.5, 6)
    assert found.correlation["minus"] == pytest.approx(-1)
    assert "same" not in found.correlation  # it has no spread
    noise = {name: float(found.details[f"noise/{name}"]) for name in rewards}
    assert noise == {"value": 0, "minus": 0, "company": pytest.approx(1 / 2**0.5), "same": 0}


@pytest.mark.parametrize(("copies", "recorded"), [(1, False), (2, True)])
def test_one_picture_has_no_spread(copies, recorded):
    run = made_up_run(copies, ["a"], {"value": value})
    run.metrics = {}
    run.config.reward.held_out = ()
    found = evaluate(run, STAGE, None)
    assert ("prompt_std" in found.means) == recorded
    assert ("std/value" in found.details) == recorded
    assert found.details["noise/value"] == 0


def test_the_spread_within_a_prompt_is_that_of_what_judges_the_run():
    run = made_up_run(2, ["a", "b"], {"value": value, "wide": lambda x, p: 4 * value(x, p)})
    run.monitor = "wide"
    run.config.reward.held_out = ("wide",)
    found = evaluate(run, STAGE, None)
    assert found.means["prompt_std"] == 2.0
