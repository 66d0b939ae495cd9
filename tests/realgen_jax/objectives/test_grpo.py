import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from realgen_jax.models.flux.transformer import Cond, FluxConfig, FluxTransformer
from realgen_jax.nn.convert import load_transformer
from realgen_jax.nn.lora import LoraConfig, init_lora, load_lora, lora_tensors, make_velocity
from realgen_jax.objectives.grpo import (
    LOSSES,
    Batch,
    EmaConfig,
    LossConfig,
    TrainState,
    accumulate,
    ema_decay,
    ema_update,
    group_advantages,
    make_optimizer,
    mean_kl,
    mean_kl_reference,
    recompute_means,
    update,
    zero_spread,
)
from realgen_jax.rollout import Trajectory, draw_noise, make_plan, rollout
from realgen_jax.sde import SchedulerConfig, Steps, flux_sigmas, sde_steps
from tests.helpers.goldens import GOLDENS, PIPELINE, golden

GUARD = LossConfig("guard", "velocity", beta=4e-4, clip_range=2e-6, adv_clip_max=5.0)


@pytest.mark.parametrize("global_std", [False, True])
def test_advantages_match_the_golden(global_std):
    case = golden("06_advantage/advantage.npz")
    order = np.argsort(case["group_ids"], kind="stable")
    rewards = case["rewards"][:, order].reshape(3, 3, 6)
    names = ["a", "b", "c"]
    weights = dict(zip(names, case["weights"], strict=True))
    got = group_advantages(dict(zip(names, rewards, strict=True)), weights, global_std=global_std)
    want = case[f"global_std_{str(global_std).lower()}/weighted_mean"][:, 0][order].reshape(3, 6)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_advantages_by_hand():
    scores = {"a": np.float32([[1, 2, 3], [5, 5, 5]]), "b": np.float32([[0, 0, 3], [1, 1, 4]])}
    got = group_advantages(scores, {"a": 1.0, "b": 3.0}, global_std=False, eps=0.0)
    a = np.array([[-1, 0, 1], [0, 0, 0]]) * np.sqrt(1.5)
    b = np.array([[-1, -1, 2], [-1, -1, 2]]) / np.sqrt(2)
    np.testing.assert_allclose(got, (a + 3 * b) / 4, rtol=1e-6)
    assert got.dtype == np.float32
    overall = group_advantages({"a": scores["a"]}, {"a": 1.0}, global_std=True, eps=0.0)
    np.testing.assert_allclose(
        overall, np.array([[-1, 0, 1], [0, 0, 0]]) / scores["a"].std(), rtol=1e-6
    )


def test_rounding_is_no_spread():
    """21 equal float32 rewards have std 7e-9 in numpy (D13): dividing by it would invent advantages."""
    scores = {"a": np.full((1, 21), 0.1, np.float32)}
    scores["a"][0, 0] = np.nextafter(np.float32(0.1), np.float32(1))
    assert zero_spread(scores["a"].astype(np.float64))[0]
    np.testing.assert_array_equal(
        group_advantages(scores, {"a": 1.0}, global_std=False, eps=0.0), 0
    )


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
    # v enters the golden independently of the mean: coefficients that make mean(x, v) the given arrays are not needed
    step = Steps(x=0.0, v=1.0, std=std, sigma=0.5, dt=dt)
    guard = kind.startswith("guard")
    loss_name, bias = ("guard", "batch") if guard else ("grpo", "sample")
    config = LossConfig(
        loss_name, "velocity" if guard else "mean_reference", beta, clip, adv_clip, bias
    )
    old, x_next = case["old_prev_sample_mean"], case["next_sample"]

    def policy(mean, config=config):
        return LOSSES[config.loss](mean, old, x_next, step, case["advantages"], config)

    new = case["new_prev_sample_mean"]
    (loss, metrics), gradient = jax.value_and_grad(policy, has_aux=True)(new)
    np.testing.assert_allclose(loss, want["policy_loss"], rtol=1e-4, atol=1e-6)
    for key in ("approx_kl", "clipfrac", "clipfrac_gt_one", "clipfrac_lt_one"):
        np.testing.assert_allclose(metrics[key], want[key], rtol=1e-3, atol=1e-7)
    deviation = np.abs(want["ratio"] - 1).max()
    np.testing.assert_allclose(metrics["ratio_deviation"], deviation, rtol=1e-3, atol=1e-7)
    # the golden's log-prob and mean are separate inputs; ours depends on the mean alone: the chain rule joins them
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
            ours = LossConfig("guard", "velocity", beta, clip, adv_clip, "sample")
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


@pytest.mark.parametrize("name", ["decay0.9_every8", "decay0.99_every1"])
def test_ema_matches_the_golden(name):
    case = golden("09_ema/ema.npz")
    decay, every = name.removeprefix("decay").split("_every")
    config = EmaConfig(float(decay), int(every))
    params = {"a": case["param0"], "b": case["param1"]}
    ema = jax.tree.map(lambda p: jnp.asarray(p[0]), params)
    for step in range(40):
        np.testing.assert_allclose(
            ema_decay(jnp.int32(step), config.decay), case[f"{name}/decay"][step], rtol=1e-5
        )
        ema = ema_update(
            ema, jax.tree.map(lambda p, i=step: p[i + 1], params), jnp.int32(step), config
        )
        np.testing.assert_allclose(ema["a"], case[f"{name}/ema0"][step + 1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ema["b"], case[f"{name}/ema1"][step + 1], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def reference_run():
    """The golden training case: the tiny pipeline with its LoRA, two calls of three branches, window 2..4."""
    case = golden("07_train/train.npz")
    exact = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    config, params = load_transformer(PIPELINE / "transformer", **exact)
    lora, adapters = load_lora(GOLDENS / "07_train" / "lora_init", config)
    assert (lora.rank, lora.alpha) == (4, 8.0)
    return case, params, adapters, make_velocity(config, lora, 4, 4)


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
        ("on_policy", "on", 1e-4, 4e-4, 1e-4, 1.0, [[0, 1]]),
        ("off_policy", "off", 1.8e-3, 4e-4, 1e-4, 1.0, [[0, 1]]),
        ("off_policy_ref_clip", "off", 2e-6, 0.05, 1e-3, 0.05, [[0], [1]]),
    ],
)
def test_whole_optimizer_steps_match_the_reference(
    reference_run, run, policy, clip, beta, lr, norm, updates
):
    case, params, adapters, velocity = reference_run
    config = LossConfig("guard", "velocity", beta, clip, 5.0, guard_bias="batch")
    optimizer = make_optimizer(lr, 0.9, 0.999, 1e-8, 1e-4, norm)
    state = TrainState(adapters, adapters, optimizer.init(adapters), jnp.int32(0))
    step = jax.jit(partial(update, velocity, optimizer, config, EmaConfig(0.9, 8)))
    grads_of = jax.jit(partial(accumulate, velocity, config=config))
    for i, calls in enumerate(updates):
        batch = reference_batch(case, policy, np.array(calls))
        grads = lora_tensors(grads_of(params, state.trainable, batch)[0])
        state, metrics = step(params, state, batch)
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
        after = lora_tensors(state.trainable)
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
    "tiny": (FluxConfig(
        num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=4, joint_attention_dim=64,
        pooled_projection_dim=32, axes_dims_rope=(8, 12, 12),
    ), 4, 16),
    "mid": (FluxConfig(
        num_layers=2, num_single_layers=4, attention_head_dim=64, num_attention_heads=8, joint_attention_dim=128,
        pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    ), 16, 32),
}  # fmt: skip


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
    """On unchanged weights the update sees exactly the means that were sampled (guard ratios are clipped at 2e-6)."""
    config, side, tokens = SIZES[size]
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype, remat=remat)
    lora = LoraConfig(rank=8, alpha=16.0)
    params = nnx.state(FluxTransformer(config, nnx.Rngs(0)))
    adapters = jax.tree.map(
        lambda a: a + 0.02 * jax.random.normal(jax.random.key(a.size), a.shape),
        init_lora(config, lora, jax.random.key(1)),
    )
    velocity = make_velocity(config, lora, side, side)
    slots = 4 if size == "tiny" else 2
    keys = jax.random.split(jax.random.key(2), 4)
    cond = Cond(
        jax.random.normal(keys[0], (slots, tokens, config.joint_attention_dim), dtype),
        jax.random.normal(keys[1], (slots, config.pooled_projection_dim), dtype),
        jnp.full(slots, 3.5),
    )
    sigmas = flux_sigmas(6, side * side, SchedulerConfig())
    plan = make_plan(
        sigmas, kind="sde", noise_level=0.9, window=3, bounds=(0, 6), branches=branches
    ).draw(keys[2])
    latents, noise = draw_noise(keys[3], keys[2], plan, slots, slots, (side * side, 64))
    _, trajectory = jax.jit(partial(rollout, velocity))(
        params, adapters, cond, latents, noise, plan
    )
    batch = jax.tree.map(
        lambda a: a[None], Batch(trajectory, cond, jnp.linspace(-1, 1, slots * branches))
    )
    optimizer = make_optimizer(1e-3, 0.9, 0.999, 1e-8, 1e-4, 1.0)
    state = TrainState(adapters, adapters, optimizer.init(adapters), jnp.int32(0))
    step = jax.jit(partial(update, velocity, optimizer, GUARD, EmaConfig(0.9, 1)))
    assert step(params, state, batch)[1]["ratio_deviation"] == 0.0
    replayed = jax.jit(partial(recompute_means, velocity, GUARD))(params, adapters, batch)
    np.testing.assert_array_equal(replayed.trajectory.mean, batch.trajectory.mean)
    moved = jax.tree.map(lambda a: a * 1.01, adapters)
    changed = jax.jit(partial(recompute_means, velocity, GUARD))(params, moved, batch)
    assert (
        np.abs(changed.trajectory.mean - batch.trajectory.mean).max() > 1e-6
    )  # the check above can fail


def test_gradient_clipping_is_applied():
    """D11: the configured norm is the norm that acts. AdamW hides a scale, so look before it."""
    optimizer = make_optimizer(1.0, 0.0, 0.0, 1.0, 0.0, 0.5)
    params = jnp.zeros(4)
    updates, _ = optimizer.update(jnp.full(4, 10.0), optimizer.init(params), params)
    clipped = 0.5 / 2
    np.testing.assert_allclose(optax.tree.norm(updates), 2 * clipped / (clipped + 1.0), rtol=1e-6)


def test_the_state_is_donated(reference_run):
    """Its memory is used again for the next one: all of it, by the compiler's own account."""
    case, params, adapters, velocity = reference_run
    optimizer = make_optimizer(1e-3, 0.9, 0.999, 1e-8, 1e-4, 1.0)
    state = TrainState(
        adapters, jax.tree.map(jnp.copy, adapters), optimizer.init(adapters), jnp.int32(0)
    )
    step = jax.jit(partial(update, velocity, optimizer, GUARD, EmaConfig(0.9, 1)), donate_argnums=1)
    compiled = step.lower(params, state, reference_batch(case, "on", np.array([0]))).compile()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= held
