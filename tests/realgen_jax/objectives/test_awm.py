import jax
import jax.numpy as jnp
import pytest

from realgen_jax.objectives.awm import (
    WEIGHTINGS,
    AwmConfig,
    awm_loss,
    log_likelihood,
    velocity_kl,
)
from tests.helpers.objective_goldens import case


def config_of(meta, weighting):
    return AwmConfig(
        beta_ema=meta["b_ema"],
        kl_weight="uniform",
        clip_range=meta["clip_range"],
        adv_clip_max=meta["adv_clip_max"],
        advantage_max=meta["advantage_max"],
        weighting=weighting,
        off_policy=False,
    )


def cases(name):
    return [key for key in case(name).meta if "/" in key]


@pytest.mark.parametrize("name", cases("awm"))
def test_losses_and_gradients_match_the_golden(name):
    awm = case("awm")
    weighting = name.split("/")[0]
    config, beta = config_of(awm.meta[name], weighting), awm.meta[name]["b_ref"]
    sigma, advantages = awm["sigma"], awm["advantages"]
    target = (awm["x0"], awm["noise"], sigma, weighting)

    def loss(v):
        logp, _ = log_likelihood(v, *target)
        v_old = v if name.endswith("on_policy") else awm["v_old"]
        logp_old, _ = log_likelihood(v_old, *target)
        policy_loss, _ = awm_loss(logp, logp_old, advantages, config)
        kl_ref = velocity_kl(v, awm["v_ref"], sigma, "uniform")
        kl_ema = velocity_kl(v, awm["v_ema"], sigma, "uniform")
        values = {
            "logp": logp,
            "logp_old": logp_old,
            "ratio": jnp.exp(logp - logp_old),
            "policy_loss": policy_loss,
            "kl_ref": kl_ref,
            "kl_ema": kl_ema,
            "kl_ref_elbo": velocity_kl(v, awm["v_ref"], sigma, "elbo"),
        }
        return policy_loss + beta * kl_ref + config.beta_ema * kl_ema, values

    (total, values), gradient = jax.value_and_grad(loss, has_aux=True)(awm["v"])
    for key, value in {**values, "loss": total, "grad_v": gradient}.items():
        awm.check(f"{name}/{key}", value)


@pytest.mark.parametrize("name", cases("awm_lora"))
def test_a_lora_is_trained_as_in_the_golden(name):
    awm = case("awm_lora")
    weighting = name.split("/")[0]
    config, beta = config_of(awm.meta[name], weighting), awm.meta[name]["b_ref"]
    x0, base = awm["x0"], awm["W0"]

    def velocity(a, b, x):
        return x @ (base + a @ b).T

    def loss(factors):
        losses, ratios = [], []
        for noise, sigma in zip(awm["noise"], awm["sigma"], strict=True):
            level = sigma[:, None, None]
            x = (1 - level) * x0 + level * noise
            v = velocity(*factors, x)
            logp, _ = log_likelihood(v, x0, noise, sigma, weighting)
            v_old = velocity(awm["lora_a_old"], awm["lora_b_old"], x)
            logp_old, _ = log_likelihood(v_old, x0, noise, sigma, weighting)
            v_ema = velocity(awm["lora_a_ema"], awm["lora_b_ema"], x)
            total, _ = awm_loss(logp, logp_old, awm["advantages"], config)
            total += beta * velocity_kl(v, x @ base.T, sigma, "uniform")
            total += config.beta_ema * velocity_kl(v, v_ema, sigma, "uniform")
            losses.append(total)
            ratios.append(jnp.exp(logp - logp_old))
        return jnp.mean(jnp.stack(losses)), jnp.stack(ratios)

    factors = (awm["lora_a"], awm["lora_b"])
    (total, ratio), gradient = jax.value_and_grad(loss, has_aux=True)(factors)
    awm.check(f"{name}/loss", total)
    awm.check(f"{name}/ratio", ratio)
    awm.check(f"{name}/grad_lora_a", gradient[0])
    awm.check(f"{name}/grad_lora_b", gradient[1])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_gradient_is_finite_where_the_velocity_is_exact(weighting):
    x0, noise = jnp.ones((2, 3, 4)), jnp.zeros((2, 3, 4))

    def logp(v):
        return jnp.sum(log_likelihood(v, x0, noise, jnp.full(2, 0.5), weighting)[0])

    assert jnp.all(jnp.isfinite(jax.grad(logp)(noise - x0)))


def test_arrays_that_would_broadcast_are_named():
    config = config_of(case("awm").meta["plain/case0"], "plain")
    with pytest.raises(ValueError, match="must have the same shape"):
        awm_loss(jnp.ones(3), jnp.ones(3), jnp.ones((3, 1)), config)
