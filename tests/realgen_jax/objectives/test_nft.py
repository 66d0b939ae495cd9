import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realgen_jax.objectives.decoupled import OldDecay
from realgen_jax.objectives.nft import (
    ADVANTAGES,
    NftConfig,
    matching_loss,
    nft_loss,
    optimality,
)
from tests.helpers.objective_goldens import case


def config_of(meta):
    return NftConfig(meta["adv_clip_max"], meta["b"], "all")


@pytest.mark.parametrize("name", [*(f"case{i}" for i in range(6)), "at_old"])
def test_losses_and_gradients_match_the_golden(name):
    nft = case("nft")
    config, beta = config_of(nft.meta[name]), nft.meta[name]["beta"]
    v = nft[nft.meta[name]["v"]]
    v_old, x0, sigma, advantages = (nft[key] for key in ("v_old", "x0", "sigma", "advantages"))
    level = sigma[:, None, None]
    x = (1 - level) * x0 + level * nft["noise"]

    def loss(v):
        policy_loss, _ = nft_loss(v, v_old, x, x0, sigma, advantages, config)
        kl = jnp.mean((v - nft["v_ref"]) ** 2)
        return policy_loss + beta * kl, (policy_loss, kl)

    (total, (policy_loss, kl)), gradient = jax.value_and_grad(loss, has_aux=True)(v)
    nft.check(f"{name}/loss", total)
    nft.check(f"{name}/policy_loss", policy_loss)
    nft.check(f"{name}/kl", kl)
    nft.check(f"{name}/grad_v", gradient)
    nft.check(f"{name}/grad_v_floor_row", gradient[nft.meta["floor_row"]])

    nft.check(f"{name}/r", optimality(advantages, config.adv_clip_max, "all"))
    step = config.mix * (v - v_old)
    for sign, branch in (("pos", v_old + step), ("neg", v_old - step)):
        value, weight = matching_loss(branch, x, x0, sigma)
        nft.check(f"{name}/loss_{sign}", value)
        nft.check(f"{name}/weight_{sign}", weight)


@pytest.mark.parametrize("name", [f"case{i}" for i in range(6)])
def test_a_lora_is_trained_as_in_the_golden(name):
    nft = case("nft_lora")
    config, beta = config_of(nft.meta[name]), nft.meta[name]["beta"]
    x0, advantages, base = nft["x0"], nft["advantages"], nft["W0"]

    def velocity(a, b, x):
        return x @ (base + a @ b).T

    def loss(factors):
        policy_losses, kls = [], []
        for noise, sigma in zip(nft["noise"], nft["sigma"], strict=True):
            level = sigma[:, None, None]
            x = (1 - level) * x0 + level * noise
            v = velocity(*factors, x)
            v_old = velocity(nft["lora_a_old"], nft["lora_b_old"], x)
            policy_losses.append(nft_loss(v, v_old, x, x0, sigma, advantages, config)[0])
            kls.append(jnp.mean((v - x @ base.T) ** 2))
        policy_loss = jnp.mean(jnp.stack(policy_losses))
        kl = jnp.mean(jnp.stack(kls))
        return policy_loss + beta * kl, (policy_loss, kl)

    factors = (nft["lora_a"], nft["lora_b"])
    (total, (policy_loss, kl)), gradient = jax.value_and_grad(loss, has_aux=True)(factors)
    nft.check(f"{name}/loss", total)
    nft.check(f"{name}/policy_loss", policy_loss)
    nft.check(f"{name}/kl", kl)
    nft.check(f"{name}/grad_lora_a", gradient[0])
    nft.check(f"{name}/grad_lora_b", gradient[1])


def test_optimality_matches_the_golden():
    nft = case("nft_r")
    for clip in (1, 2, 5):
        nft.check(f"c{clip}/r", optimality(nft["advantages"], clip, "all"))
    for kind in ADVANTAGES:
        nft.check(f"mode/{kind}/r", optimality(nft["advantages"], 5.0, kind))


DECAYS = {
    "nft_type0": OldDecay(0, 0.0, 0.5),
    "nft_type1": OldDecay(0, 0.001, 0.5),
    "nft_type2": OldDecay(75, 0.0075, 0.999),
    "awm_linear": OldDecay(0, 0.001, 0.3),
}


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", DECAYS)
def test_old_policies_match_the_golden(name, steps):
    recorded = case("old_policy")
    taken = steps * np.arange(1, 201)
    decays = DECAYS[name](taken)
    recorded.check(f"{name}/steps{steps}", decays)

    moved = f"{name}/steps{steps}/old"
    if moved in recorded.arrays:
        old, olds = recorded["start"], []
        for d, trained in zip(np.asarray(decays), recorded["trained"], strict=True):
            old = d * old + (1 - d) * trained
            olds.append(old)
        recorded.check(moved, np.stack(olds))


def test_flow_factory_counts_epochs_from_0():
    """The same schedule, one step later with one step an epoch."""
    case("old_policy").check(
        "flow_factory/piecewise_linear", OldDecay(0, 0.001, 0.5)(np.arange(200))
    )


def test_arrays_that_would_broadcast_are_named():
    v = jnp.ones((3, 4, 5))
    config = NftConfig(5.0, 1.0, "all")
    with pytest.raises(ValueError, match="must have the same shape"):
        nft_loss(v, v[:1], v, v, jnp.ones(3), jnp.ones(3), config)
    with pytest.raises(ValueError, match=r"one entry per sample, \(3,\)"):
        nft_loss(v, v, v, v, jnp.ones(3), jnp.ones((3, 1)), config)
