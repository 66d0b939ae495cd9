"""Keys that ask for something which the chosen objective does not do are refused."""

import pytest

from realgen_configs import flux_grpo
from realgen_jax.config import base
from realgen_jax.objectives import OBJECTIVES, make_objective

REFUSED = [
    ("guard", "sample.solver", "dpm2", "but 'guard' replays the steps that were sampled"),
    ("dppo", "sample.solver", "dpm2", "known only for steps of first order; expected 'euler'"),
    ("guard", "sample.cached_steps", 1, "predicted velocity is not the policy's; expected 0"),
    ("grpo", "train.nft.mix", 0.5, "which config.train.loss 'nft' reads, but not 'grpo'"),
    ("nft", "train.awm.off_policy", True, "which config.train.loss 'awm' reads, but not 'nft'"),
    ("awm", "train.dppo.threshold", 1e-7, "which config.train.loss 'dppo' reads, but not 'awm'"),
    ("nft", "sample.sde_window_size", 2, "but 'nft' samples without noise and has no window"),
    ("awm", "sample.sde_window_range", (0, 4), "but 'awm' samples without noise"),
    ("nft", "sample.sde_window.strategy", "decay", "expected 'random'"),
    ("nft", "sample.branches", 2, "expected 1"),
    ("awm", "sample.noise_schedule", "cosine", "expected 'constant'"),
    ("awm", "sample.same_latent", True, "all pictures of a prompt would be the same"),
    ("awm", "train.recompute_old", True, "expected False"),
    ("nft", "train.kl", "mean", "expected 'velocity'"),
]


@pytest.mark.parametrize(("loss", "key", "value", "message"), REFUSED)
def test_a_key_that_contradicts_the_loss_is_one_line(loss, key, value, message):
    config = base()
    config.train.loss = loss
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=key) as error:
        make_objective(config.train, config.sample)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"config.{key} is {value!r}")
    assert message in line


def test_every_key_is_named():
    config = base()
    config.train.loss = "nft"
    config.sample.branches, config.sample.sde_window_size = 3, 7
    with pytest.raises(ValueError, match=r"sde_window_size is 7.*\n.*branches is 3"):
        make_objective(config.train, config.sample)


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_the_embedded_model_takes_every_loss(loss):
    config = flux_grpo.get_config("tiny").unlock()
    config.train.loss = loss
    assert make_objective(config.train, config.sample).coupled == (loss not in ("nft", "awm"))
