from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from realgen_jax.sharding import make_mesh
from realgen_jax.training.evaluation import evaluate

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
        monitor="reward",
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
