import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realgen_configs.flux_grpo import get_config
from realgen_jax.models.flux.family import FLUX
from realgen_jax.models.flux.transformer import Cond, FluxConfig, FluxTransformer
from realgen_jax.nn.lora import LoraConfig, lora_tensors
from realgen_jax.objectives import make_objective
from realgen_jax.objectives.grpo import (
    LossConfig,
    grpo_loss,
    guard_loss,
    mean_kl,
    mean_kl_reference,
)
from realgen_jax.rollout import Trajectory, draw_latents
from realgen_jax.sde import Steps, sde_steps
from realgen_jax.update import Batch, EmaConfig, TrainState, make_optimizer, update
from tests.helpers.goldens import GOLDENS, golden
from tests.helpers.models import flux_model, fresh_adapters, golden_model, load_adapters
from tests.helpers.objectives import grpo


def loss_variants():
    case = golden("07_loss/loss_packed.npz")
    names, variants = {key.split("/")[0] for key in case if "/" in key}, []
    for name in sorted(names):
        kind, clip, beta, adv = name.rsplit("_", 3)
        variants.append((name, kind, float(clip[4:]), float(beta[4:]), float(adv[3:])))
    return variants


@pytest.mark.parametrize(("name", "kind", "clip", "beta", "adv_clip"), loss_variants())
def test_losses_match_the_golden(name, kind, clip, beta, adv_clip):
    case = golden("07_loss/loss_packed.npz")
    want = {
        key.split("/", 1)[1]: value for key, value in case.items() if key.startswith(f"{name}/")
    }
    dt = float(case["sqrt_dt"].ravel()[0]) ** 2
    std = float((case["std_dev_t"] * case["sqrt_dt"]).ravel()[0])
    # v enters the golden independently of the mean: coefficients that make mean(x, v) the given
    # arrays are not needed
    step = Steps(x=0.0, v=1.0, std=std, sigma=0.5, dt=dt)
    guard = kind.startswith("guard")
    loss_fn = guard_loss if guard else grpo_loss
    config = LossConfig(clip, adv_clip, "batch" if guard else "sample")
    old, x_next = case["old_prev_sample_mean"], case["next_sample"]

    def policy(mean, config=config):
        return loss_fn(mean, old, x_next, step, case["advantages"], config)

    new = case["new_prev_sample_mean"]
    (loss, metrics), gradient = jax.value_and_grad(policy, has_aux=True)(new)
    np.testing.assert_allclose(loss, want["policy_loss"], rtol=1e-4, atol=1e-6)
    for key in ("approx_kl", "clipfrac", "clipfrac_gt_one", "clipfrac_lt_one"):
        np.testing.assert_allclose(metrics[key], want[key], rtol=1e-3, atol=1e-7)
    deviation = np.abs(want["ratio"] - 1).max()
    np.testing.assert_allclose(metrics["ratio_deviation"], deviation, rtol=1e-3, atol=1e-7)
    # the golden's log-prob and mean are separate inputs; ours depends on the mean alone: the chain
    # rule joins them
    elements = new[0].size
    through_logp = want["grad_new_log_prob"][:, None, None] * (x_next - new) / std**2 / elements
    kl = jax.grad(lambda m: mean_kl_reference(m, case["ref_prev_sample_mean"], 0.0, step))
    expected = want["grad_new_prev_sample_mean"] + through_logp - (0 if guard else beta * kl(new))
    np.testing.assert_allclose(
        gradient, expected, rtol=2e-3, atol=1e-4 * np.abs(expected).max() + 1e-12
    )

    if guard:
        penalty = np.mean((case["v_pred"] - case["v_ref"]) ** 2)
        if "per_sample_bias/policy_loss" in want:
            ours = LossConfig(clip, adv_clip, "sample")
            per_sample, metrics = policy(new, ours)
            np.testing.assert_allclose(
                per_sample, want["per_sample_bias/policy_loss"], rtol=1e-4, atol=1e-6
            )
            deviation = np.abs(want["per_sample_bias/ratio"] - 1).max()
            np.testing.assert_allclose(metrics["ratio_deviation"], deviation, rtol=1e-3, atol=1e-7)
    else:
        penalty = mean_kl_reference(new, case["ref_prev_sample_mean"], 0.0, step)
    np.testing.assert_allclose(penalty, want["kl_loss"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(loss + beta * penalty, want["loss"], rtol=1e-4, atol=1e-6)


def test_mean_kl_is_the_kl_of_two_gaussians():
    step = Steps(x=0.9, v=-0.1, std=0.3, sigma=0.5, dt=0.1)
    rng = np.random.default_rng(0)
    x, v, v_ref = (jnp.asarray(rng.standard_normal((2, 5))) for _ in range(3))
    by_hand = np.mean((0.1 * (v - v_ref)) ** 2) / (2 * 0.3**2)
    np.testing.assert_allclose(mean_kl(v, v_ref, x, step), by_hand, rtol=1e-5)


def test_arrays_that_would_broadcast_are_named():
    """An [n, 1] advantage would make [n, n] terms of n samples."""
    rng = np.random.default_rng(0)
    mean, mean_old, x_next = (jnp.asarray(rng.standard_normal((3, 4, 5))) for _ in range(3))
    step = Steps(x=0.9, v=-0.1, std=0.3, sigma=0.5, dt=0.1)
    config = LossConfig(clip_range=1e-3, adv_clip_max=5.0)
    for loss in (grpo_loss, guard_loss):
        for shape in ((3, 1), (1,), ()):
            with pytest.raises(ValueError, match=r"expected one per sample, \(3,\)"):
                loss(mean, mean_old, x_next, step, jnp.ones(shape), config)
        with pytest.raises(ValueError, match="must have the same shape"):
            loss(mean, mean_old[:1], x_next, step, jnp.ones(3), config)


def test_an_unknown_loss_is_refused():
    config = get_config("tiny").unlock()
    config.train.loss = "ppo"
    with pytest.raises(ValueError, match="loss is 'ppo'; choose one of grpo, guard"):
        make_objective(config.train, config.sample)


@pytest.fixture(scope="module")
def reference_run():
    """The golden training case: the tiny pipeline with its LoRA, two calls of three branches,
    window 2..4.
    """
    case = golden("07_train/train.npz")
    lora = LoraConfig(4, 8.0)
    model, adapters = load_adapters(golden_model(), GOLDENS / "07_train" / "lora_init", lora)
    return case, model, adapters


def reference_batch(case, policy, calls):
    """Rows are batch-major, b * 3 + m; ours are [calls, w, n]."""

    def stack(name):
        array = case[f"rollout_{policy}/{name}"]
        return jnp.asarray(array.reshape(2, 3, *array.shape[1:]).swapaxes(1, 2))[calls]

    latents = jnp.concatenate([stack("latents"), stack("next_latents")[:, -1:]], axis=1)
    noisy = sde_steps(case["sigmas"], 0.9)
    steps = jax.tree.map(lambda a: jnp.broadcast_to(a[2:5], (len(calls), 3)), noisy)
    n = len(calls)
    cond = Cond(
        jnp.asarray(case["prompt_embeds"])[calls][:, None],
        jnp.asarray(case["pooled_prompt_embeds"])[calls][:, None],
        jnp.full((n, 1), 3.5),
    )
    trajectory = Trajectory(latents, stack("prev_sample_mean"), stack("log_probs"), steps)
    return Batch(
        trajectory, cond, jnp.asarray(case["advantages"], jnp.float32).reshape(2, 3)[calls]
    )


@pytest.mark.parametrize(
    ("run", "policy", "clip", "beta", "lr", "norm", "updates"),
    [
        pytest.param("on_policy", "on", 1e-4, 4e-4, 1e-4, 1.0, [[0, 1]], marks=pytest.mark.slow),
        ("off_policy", "off", 1.8e-3, 4e-4, 1e-4, 1.0, [[0, 1]]),
        pytest.param(
            *("off_policy_ref_clip", "off", 2e-6, 0.05, 1e-3, 0.05, [[0], [1]]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_whole_optimizer_steps_match_the_reference(
    reference_run, run, policy, clip, beta, lr, norm, updates
):
    case, model, adapters = reference_run
    objective = grpo(beta=beta, clip=clip, guard_bias="batch", branches=3)
    optimizer = make_optimizer(lr, 0.9, 0.999, 1e-8, 1e-4, norm)
    state = TrainState(adapters, adapters, optimizer.init(adapters), jnp.int32(0))
    step = jax.jit(partial(update, objective, optimizer, EmaConfig(0.9, 8), model.velocity))
    gradient_of = jax.jit(partial(objective.gradient, model.velocity))
    table = FLUX.table(model.config)
    for i, calls in enumerate(updates):
        batch = reference_batch(case, policy, np.array(calls))
        grads, _ = gradient_of(state, batch)
        grads = lora_tensors(grads, table)
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["grad_norm"], case[f"{run}/grad_norm"][i], rtol=1e-3)
        np.testing.assert_allclose(
            metrics["loss"], case[f"{run}/loss_per_step"][calls].mean(), rtol=1e-3, atol=1e-5
        )
        for key in (
            "approx_kl",
            "clipfrac",
            "clipfrac_gt_one",
            "clipfrac_lt_one",
            "policy_loss",
            "kl_loss",
        ):
            np.testing.assert_allclose(
                metrics[key], case[f"{run}/info/{key}"][i], rtol=2e-3, atol=1e-5
            )
        after = lora_tensors(state.trainable, table)
        assert len(after) == 36
        for name in after:
            key = f"base_model.model.{name}.default.weight"
            gradient = case[f"{run}/update{i}/grad/{key}"]
            np.testing.assert_allclose(
                grads[name], gradient, rtol=1e-2, atol=1e-3 * np.abs(gradient).max()
            )
            np.testing.assert_allclose(
                after[name], case[f"{run}/update{i}/param/{key}"], atol=lr / 4
            )


SIZES = {
    "tiny": (
        FluxConfig(
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            axes_dims_rope=(8, 12, 12),
        ),
        4,
        16,
    ),
    "mid": (
        FluxConfig(
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=64,
            num_attention_heads=8,
            joint_attention_dim=128,
            pooled_projection_dim=64,
            axes_dims_rope=(16, 24, 24),
        ),
        16,
        32,
    ),
}


@pytest.mark.parametrize(
    ("size", "branches", "dtype", "remat"),
    [
        ("tiny", 2, jnp.bfloat16, "full"),
        pytest.param("tiny", 1, jnp.float32, "full", marks=pytest.mark.slow),
        pytest.param("mid", 2, jnp.bfloat16, "full", marks=pytest.mark.slow),
        pytest.param("mid", 2, jnp.float32, "full", marks=pytest.mark.slow),
        pytest.param("mid", 2, jnp.bfloat16, "attention", marks=pytest.mark.slow),
        pytest.param("mid", 2, jnp.bfloat16, "dots", marks=pytest.mark.slow),
        pytest.param("mid", 2, jnp.float32, "dots", marks=pytest.mark.slow),
    ],
)
def test_replay_is_the_rollout_bit_for_bit(size, branches, dtype, remat):
    """On unchanged weights the update sees exactly the means that were sampled (guard ratios are
    clipped at 2e-6).
    """
    config, side, tokens = SIZES[size]
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype, remat=remat)
    params = nnx.state(FluxTransformer(config, nnx.Rngs(0)))
    base = flux_model(config, params, side)
    model, adapters = fresh_adapters(base, LoraConfig(rank=8, alpha=16.0), jax.random.key(1))
    adapters = jax.tree.map(
        lambda a: a + 0.02 * jax.random.normal(jax.random.key(a.size), a.shape), adapters
    )
    slots = 4 if size == "tiny" else 2
    keys = jax.random.split(jax.random.key(2), 4)
    cond = Cond(
        jax.random.normal(keys[0], (slots, tokens, config.joint_attention_dim), dtype),
        jax.random.normal(keys[1], (slots, config.pooled_projection_dim), dtype),
        jnp.full(slots, 3.5),
    )
    objective = grpo(branches=branches)
    plan = objective.make_plan(model.sigmas(6)).draw(keys[2])
    shape = (side * side, 64)
    latents = draw_latents(keys[3], slots, slots, shape)
    noise = objective.draw_noise(keys[2], plan, slots * branches, shape)
    collect = jax.jit(partial(objective.collect, model.velocity))
    _, trajectory = collect(adapters, cond, latents, noise, plan)
    batch = jax.tree.map(
        lambda a: a[None], Batch(trajectory, cond, jnp.linspace(-1, 1, slots * branches))
    )
    optimizer = make_optimizer(1e-3, 0.9, 0.999, 1e-8, 1e-4, 1.0)
    state = TrainState(adapters, adapters, optimizer.init(adapters), jnp.int32(0))
    step = jax.jit(partial(update, objective, optimizer, EmaConfig(0.9, 1), model.velocity))
    _, metrics = step(state, batch)
    assert metrics["ratio_deviation"] == 0.0
    recompute = jax.jit(partial(objective.recompute_means, model.velocity))
    replayed = recompute(adapters, batch)
    np.testing.assert_array_equal(replayed.record.mean, batch.record.mean)
    moved = jax.tree.map(lambda a: a * 1.01, adapters)
    changed = recompute(moved, batch)
    assert np.abs(changed.record.mean - batch.record.mean).max() > 1e-6  # the check can fail


def test_only_the_trained_steps_of_a_window_are_replayed():
    """Their gradient is the mean of those of each step alone; other means stay as sampled."""
    objective = grpo(beta=0.1, clip=10.0, window=3, bounds=(0, 6))

    def velocity(trainable, x, sigma, cond):
        weights = 0.0 if trainable is None else trainable
        return weights * x * sigma[:, None, None] + cond[:, None, None]

    sigmas = np.linspace(1, 0, 9, dtype=np.float32)
    plan = objective.make_plan(sigmas).draw(jax.random.key(0))
    noise = objective.draw_noise(jax.random.key(1), plan, 2, (4, 8))
    latents = draw_latents(jax.random.key(2), 2, 2, (4, 8))
    weights, cond = jnp.float32(0.5), jnp.arange(2.0)
    collect = jax.jit(partial(objective.collect, velocity))
    _, record = collect(weights, cond, latents, noise, plan)
    assert record.trained is None

    moved = jnp.float32(0.6)
    state = TrainState(moved, moved, None, jnp.int32(0))
    gradient = jax.jit(partial(objective.gradient, velocity))

    def batch_of(*trained):
        part = dataclasses.replace(record, trained=jnp.array(trained, jnp.int32))
        return jax.tree.map(lambda a: a[None], Batch(part, cond, jnp.array([-1.0, 1.0])))

    alone = [gradient(state, batch_of(step))[0] for step in (0, 2)]
    together, _ = gradient(state, batch_of(0, 2))
    np.testing.assert_allclose(together, np.mean(alone), rtol=1e-5)
    assert abs(alone[0] - alone[1]) > 1e-3

    recompute = jax.jit(partial(objective.recompute_means, velocity))
    means = recompute(moved, batch_of(0, 2)).record.mean[0]
    np.testing.assert_array_equal(means[1], record.mean[1])
    for step in (0, 2):
        assert np.abs(means[step] - record.mean[step]).max() > 1e-3


def test_the_state_is_donated(reference_run):
    """Its memory is used again for the next one: all of it, by the compiler's own account."""
    case, model, adapters = reference_run
    optimizer = make_optimizer(1e-3, 0.9, 0.999, 1e-8, 1e-4, 1.0)
    state = TrainState(
        adapters, jax.tree.map(jnp.copy, adapters), optimizer.init(adapters), jnp.int32(0)
    )
    objective = grpo(branches=3)
    step = jax.jit(
        partial(update, objective, optimizer, EmaConfig(0.9, 1), model.velocity), donate_argnums=0
    )
    compiled = step.lower(state, reference_batch(case, "on", np.array([0]))).compile()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= held
