import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realgen_jax.config import base
from realgen_jax.objectives import make_objective
from realgen_jax.objectives.dppo import DppoConfig, dppo_loss, kept
from realgen_jax.objectives.grpo import log_prob_difference
from realgen_jax.sde import Steps
from tests.helpers.objective_goldens import case


@pytest.mark.parametrize("name", ["t1e-5", "t1e-7", "raw"])
def test_losses_and_gradients_match_the_golden(name):
    dppo = case("dppo")
    meta = dppo.meta[name]
    config = DppoConfig(meta["threshold"], meta["divides_by_std"])

    found = {key: [] for key in ("log_ratio", "ratio", "k", "keep", "loss_per_step")}
    gradients = []
    for mean, old, x_next, std in zip(
        *(dppo[key] for key in ("mean", "mean_old", "x_next", "std")), strict=True
    ):
        step = Steps(x=0.0, v=1.0, std=std, sigma=0.5, dt=0.1)

        def loss(mean, old=old, x_next=x_next, step=step):
            return dppo_loss(mean, old, x_next, step, dppo["advantages"], config)

        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(mean))
        log_ratio = log_prob_difference(mean, old, x_next, std)
        ratio = jnp.exp(log_ratio)
        keep, k = kept(ratio, mean, old, std, dppo["advantages"], config)
        assert metrics["kept_share"] == jnp.mean(keep)
        for key, array in zip(found, (log_ratio, ratio, k, keep, value), strict=True):
            found[key].append(array)
        gradients.append(gradient)

    for key, arrays in found.items():
        dppo.check(f"{name}/{key}", np.stack(arrays))
    dppo.check(f"{name}/loss", np.mean(found["loss_per_step"]))
    dppo.check(f"{name}/grad_mean", np.stack(gradients) / len(gradients))


def test_one_optimizer_step_an_epoch_is_refused():
    config = base()
    config.train.loss = "dppo"
    config.train.gradient_accumulation_steps = config.sample.num_batches_per_epoch
    with pytest.raises(ValueError, match="an epoch has one optimizer step") as error:
        make_objective(config.train, config.sample)
    assert len(str(error.value).splitlines()) == 1
    config.train.num_inner_epochs = 2
    assert make_objective(config.train, config.sample).coupled
