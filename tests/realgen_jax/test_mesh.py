"""The same update and the same rollout on every mesh: results, bytes, traffic between devices."""

import re
from collections import Counter
from functools import cache
from math import prod
from types import SimpleNamespace

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realgen_configs.flux_grpo import get_config
from realgen_jax.models.flux import transformer
from realgen_jax.models.flux.tables import RULES
from realgen_jax.models.flux.transformer import Cond, FluxConfig, FluxTransformer
from realgen_jax.models.trainable import AllWeights, Lora
from realgen_jax.nn import stack
from realgen_jax.nn.convert import abstract, leaves
from realgen_jax.nn.lora import LoraConfig
from realgen_jax.nn.vae import Autoencoder, VaeConfig
from realgen_jax.rollout import Trajectory
from realgen_jax.sharding import batch_sharding, make_mesh, param_sharding, replicated
from realgen_jax.training.programs import abstract_state, make_programs, make_recipe
from realgen_jax.update import Batch, TrainState
from tests.helpers.models import flux_model

F32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}
# Every side divides by 8, the heads by 2. Two blocks or more of a kind: a scan of one is unrolled.
MODEL = FluxConfig(
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=4,
    joint_attention_dim=32,
    pooled_projection_dim=24,
    axes_dims_rope=(4, 6, 6),
    **F32,
)
VAE = VaeConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
LAYOUTS = {
    "one": (1, 1, 1),
    "data 2": (2, 1, 1),
    "data 4": (4, 1, 1),
    "data 8": (8, 1, 1),
    "fsdp 2": (1, 2, 1),
    "fsdp 8": (1, 8, 1),
    "tensor 2": (1, 1, 2),
    "fsdp 2 tensor 2": (1, 2, 2),
    "2 x 2 x 2": (2, 2, 2),
}
START = {"lora": "adapters", "full": "params"}  # what is trained
CALLS, WINDOW, IMAGES, TEXT, SIDE = 2, 2, 8, 5, 4
LEARNING_RATE, B1 = 1e-3, 0.9
QUICK = {"xla_backend_optimization_level": 0}  # of LLVM: what is partitioned how is decided before


def recipe(kind):
    """The update as configured, but that nothing is clipped: Adam's first moment is (1 - b1) times
    the gradient.
    """
    c = get_config("tiny").unlock()
    c.sample.train_batch_size = c.sample.num_image_per_prompt = IMAGES
    c.sample.num_steps, c.sample.sde_window_size, c.sample.sde_window_range = 4, WINDOW, (0, 3)
    c.train.lora, c.train.lora_rank, c.train.lora_alpha = kind == "lora", 2, 4.0
    c.train.gradient_accumulation_steps = CALLS
    c.train.beta, c.train.clip_range, c.train.max_grad_norm = 0.0, 1e6, 1e9
    c.train.learning_rate, c.train.adam_beta1 = LEARNING_RATE, B1
    return make_recipe(c.lock())


@cache
def host():
    """The arrays that all layouts start from: nothing at zero, so that every gradient is felt."""

    def noise(seed, a):
        return np.random.default_rng(seed).standard_normal(a.shape).astype(a.dtype)

    def noises(tree, scale):
        flat, treedef = jax.tree.flatten(tree)
        return jax.tree.unflatten(treedef, [scale * noise(i, a) for i, a in enumerate(flat)])

    lora = Lora(LoraConfig(2, 4.0))
    model = flux_model(MODEL, None, SIDE, lora, make_mesh(1, 1, 1, jax.devices()))
    shapes = {
        "params": abstract(FluxTransformer, MODEL)[1],
        "adapters": lora.abstract(model),
        "vae": abstract(Autoencoder, VAE)[1],
    }
    return SimpleNamespace(**noises(shapes, 0.1), noises=noises)


def small_model(mesh, trainable):
    """The small model on a mesh, as load_model puts it there."""
    sharding = param_sharding(mesh, RULES)
    placed = []
    for path, variable in nnx.to_flat_state(host().params):
        where = sharding(".".join(map(str, path)), variable.shape)
        placed.append((path, variable.replace(jax.device_put(variable.get_value(), where))))
    vae_params = jax.device_put(host().vae, replicated(mesh))
    params = nnx.from_flat_state(placed)
    return flux_model(MODEL, params, SIDE, trainable, mesh, VAE, vae_params)


def state_of(kind, like):
    """A training state on the mesh. EMA and trainable are two arrays: both are donated."""
    start = getattr(host(), START[kind])
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), like.opt_state)
    state = TrainState(start, start, zeros, np.int32(0))
    return jax.tree.map(
        lambda a, s: jax.make_array_from_callback(s.shape, s.sharding, lambda i: a[i]), state, like
    )


def batch(r, model):
    """Made-up trajectories, [calls, ...], with the rows where a rollout leaves them."""
    pixels, rows = (SIDE * SIDE, 64), (CALLS, IMAGES)
    shapes = SimpleNamespace(
        latents=(CALLS, WINDOW + 1, IMAGES, *pixels),
        mean=(CALLS, WINDOW, IMAGES, *pixels),
        logp=(CALLS, WINDOW, IMAGES),
        t5=(*rows, TEXT, 32),
        clip=(*rows, 24),
        guidance=rows,
        advantages=rows,
    )
    drawn = host().noises(
        {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in vars(shapes).items()}, 1.0
    )
    axis = {"latents": 2, "mean": 2, "logp": 2}
    drawn = {
        k: jax.device_put(v, batch_sharding(model.mesh, axis.get(k, 1))) for k, v in drawn.items()
    }
    noisy = r.objective.make_plan(model.sigmas(4)).noisy
    steps = jax.tree.map(lambda a: np.tile(a[:WINDOW], (CALLS, 1)), noisy)
    trajectory = Trajectory(
        drawn["latents"],
        drawn["mean"],
        drawn["logp"],
        jax.device_put(steps, replicated(model.mesh)),
    )
    return Batch(
        trajectory, Cond(drawn["t5"], drawn["clip"], drawn["guidance"]), drawn["advantages"]
    )


def compile_update(kind, layout):
    r = recipe(kind)
    model = small_model(make_mesh(*LAYOUTS[layout], jax.devices()), r.trainable)
    args = model, state_of(kind, abstract_state(r, model)), batch(r, model)
    return make_programs(r, model).update.lower(*args).compile(QUICK), args


@cache
def run(kind, layout):
    """One update on one layout: what it gives, and what its program is like."""
    compiled, args = compile_update(kind, layout)
    held = {
        name: local_bytes(tree)
        for name, tree in zip(
            ("params", "state", "batch"), (args[0].params, *args[1:]), strict=True
        )
    }
    state, metrics = compiled(*args)
    gradient = jax.tree.map(lambda m: np.asarray(m) / (1 - B1), state.opt_state[1][0].mu)
    return SimpleNamespace(
        loss=float(metrics["loss"]),
        gradient=gradient,
        after=jax.tree.map(np.asarray, state.trainable),
        held=held,
        text=compiled.as_text(),
        memory=compiled.memory_analysis(),
    )


def local_bytes(tree):
    return sum(
        prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
    )


slow = pytest.mark.slow
SAME = [
    ("lora", "2 x 2 x 2"),
    *(
        pytest.param("lora", name, marks=slow)
        for name in (
            "data 2",
            "data 4",
            "data 8",
            "fsdp 2",
            "fsdp 8",
            "tensor 2",
            "fsdp 2 tensor 2",
        )
    ),
    *(
        pytest.param("full", name, marks=slow)
        for name in ("data 2", "data 4", "data 8", "fsdp 2", "fsdp 8", "tensor 2", "2 x 2 x 2")
    ),
]


@pytest.mark.parametrize(("kind", "layout"), SAME)
def test_an_update_is_the_same_on_every_mesh(kind, layout):
    """Loss and gradients within 1e-5 (of an array's largest entry: sums over rows are taken in
    another order), the next weights within a tenth of the learning rate.
    """
    one, many = run(kind, "one"), run(kind, layout)
    assert many.loss == pytest.approx(one.loss, rel=1e-5)
    for a, b in zip(jax.tree.leaves(one.gradient), jax.tree.leaves(many.gradient), strict=True):
        assert np.abs(a).max() > 1e-6
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())
    pairs = zip(
        jax.tree.leaves(getattr(host(), START[kind])), jax.tree.leaves(one.after), strict=True
    )
    assert min(np.abs(b - a).max() for a, b in pairs) > LEARNING_RATE / 2
    for a, b in zip(jax.tree.leaves(one.after), jax.tree.leaves(many.after), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=LEARNING_RATE / 10)


def test_a_rollout_is_the_same_on_every_mesh():
    """The same keys give the same noise whatever the mesh, so the same pictures."""
    r, found = recipe("lora"), []
    for layout in ("one", "2 x 2 x 2"):
        mesh = make_mesh(*LAYOUTS[layout], jax.devices())
        model = small_model(mesh, r.trainable)
        first = jax.tree.map(lambda a: a[0], batch(r, model).cond)
        cond = jax.device_put(first, batch_sharding(mesh))
        adapters = jax.device_put(host().adapters, replicated(mesh))
        keys = jax.device_put(jax.random.split(jax.random.key(3)), replicated(mesh))
        plan = jax.device_put(r.objective.make_plan(model.sigmas(4)), replicated(mesh))
        args = model, adapters, cond, (keys[0], keys[1]), plan
        pictures, trajectory, finite = (
            make_programs(r, model).sample.lower(*args).compile(QUICK)(*args)
        )
        assert finite
        found.append((np.asarray(pictures).astype(int), np.asarray(trajectory.latents)))
    (pictures, latents), (again, latents_again) = found
    np.testing.assert_allclose(latents_again, latents, rtol=0, atol=1e-5 * np.abs(latents).max())
    assert np.abs(again - pictures).max() <= 1  # 1e-5 may fall on the other side of a rounding
    assert pictures.std() > 1


def collectives(text):
    """{(loop, kind): arrays moved} of a compiled update. The loop is "step", "microbatch" or
    "block", the scan over the transformer's blocks; arrays that XLA joins in one collective count
    one by one, scalars (metrics, norms) do not.
    """
    computations, name, entry = {}, None, None
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = match[2]
            entry = name if match[1] else entry
            computations[name] = []
        elif name:
            computations[name].append(line)
    depths, todo = {}, [(entry, 0)]
    while todo:
        name, depth = todo.pop()
        depths[name] = max(depth, depths.get(name, 0))
        for line in computations[name]:
            for attribute, called in re.findall(r"(body|to_apply|calls)=%?([\w.\-]+)", line):
                todo.append((called, depth + (attribute == "body")))
    loops = ("step", "call", "microbatch", "block")
    found = []
    for name, depth in depths.items():
        for line in computations[name]:
            kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
            if match := re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line):
                shapes = [
                    tuple(map(int, s.split(","))) for s in re.findall(r"\w+\[([\d,]+)\]", match[1])
                ]
                found += [(loops[depth], match[2], shape) for shape in shapes]
    return found


def counts(text):
    return dict(Counter((loop, kind) for loop, kind, _ in collectives(text)))


# Arrays moved between devices in one update. Kernels: 4 a stream and so 8 of a double block, 3 of a
# single one, and 13 outside the blocks (3 embedders of 2, img_in, txt_in, 3 modulations, final_mod,
# proj_out), each with its bias. Adapters: 8 in a double block, 1 in a single one, of 2 factors.
TRAFFIC = {
    # 9 adapters' gradients, summed over the batch as each block's backward ends: A and B
    ("lora", "data 8"): {("block", "all-reduce"): 18},
    ("lora", "fsdp 8"): {
        ("block", "all-reduce"): 18,
        # a block's 8 + 7 kernels (proj's 5 parts one by one), once forward, once backward
        ("block", "all-gather"): 30,
        # the others, but for the modulations' and proj_out: XLA takes them out of the loops
        ("step", "all-gather"): 9,
        # the modulations' kernels stay where they are: the rows of vec go there, and the 3 outputs
        # come back, each as a piece from every one of 8 devices
        # proj_out's kernel, behind a barrier: for the policy, twice more for the backward pass
        ("microbatch", "all-gather"): 3,
        ("microbatch", "all-to-all"): 24,
    },
    ("lora", "tensor 2"): {
        # Outputs and gradients of inputs [n, t, D]: a stream sums 2 outputs forward, 1 again and 2
        # gradients backward; the single block 1 and 2: 13. Rank r [n, t, r]: A of proj and fc2 in 2
        # streams, forward and again: 8; the gradient through B of qkv and fc1 in 2 streams and of
        # the single block's qkv: 5.
        ("block", "all-reduce"): 26,
        ("call", "all-reduce"): 2,  # embedders of clip and guidance, the same all window long
        ("microbatch", "all-reduce"): 1,  # that of sigma
        ("microbatch", "all-gather"): 4,  # the modulations
        # Adapters are whole everywhere, the factors next to a split side (B of qkv and fc1, A of
        # proj and fc2: 9) get split gradients; so Adam runs split, and weights, EMA and two moments
        # are brought together.
        ("step", "all-gather"): 36,
    },
    ("full", "fsdp 8"): {
        ("block", "all-reduce"): 28,  # gradients of 11 kernels and biases, and of 6 norms
        ("block", "all-gather"): 30,
        # gradients of the other 13 kernels and biases, but for the modulations' kernels, which have
        # all rows at hand
        ("microbatch", "all-reduce"): 23,
        ("step", "all-gather"): 9,
        ("microbatch", "all-gather"): 3,
        ("microbatch", "all-to-all"): 48,  # outputs, and their gradients
    },
}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [pytest.param(*case, marks=[slow] if case[0] == "full" else []) for case in TRAFFIC],
)
def test_nothing_moves_between_devices_but_what_must(kind, layout):
    """The CPU's XLA has no pass that makes a reduce-scatter of an all-reduce of which each device
    keeps a part.
    """
    assert counts(run(kind, layout).text) == TRAFFIC[kind, layout]


@pytest.mark.parametrize(
    "layout",
    [*(pytest.param(name, marks=slow) for name in ("fsdp 8", "fsdp 2 tensor 2")), "2 x 2 x 2"],
)
def test_inside_the_blocks_only_weights_are_gathered(layout):
    """Where fsdp and tensor meet, XLA fetches some kernels twice in the backward pass (it writes
    the same group of devices in two ways and does not see that they are one), so no count here: but
    never an activation.
    """
    tensor = LAYOUTS[layout][2]
    kernels = set()
    for leaf, value in leaves(abstract(FluxTransformer, MODEL)[1]).items():
        if leaf.startswith(("double.", "single.")) and leaf.endswith("kernel"):
            spec = param_sharding(make_mesh(1, 1, 1, jax.devices()), RULES)(leaf, value.shape).spec
            sides = zip(value.shape, (*spec, *(None,) * value.ndim), strict=False)
            shape = tuple(
                side // tensor if "tensor" in (axis or ()) else side for side, axis in sides
            )
            kernels |= {
                shape[1:],
                (shape[1], prod(shape[2:])),  # parts as one axis
                (1, *shape[-2:]),  # a layer, or a part
            }
    for kind in ("lora", "full") if layout == "fsdp 8" else ("full",):
        moved = collectives(run(kind, layout).text)
        gathered = [shape for loop, name, shape in moved if (loop, name) == ("block", "all-gather")]
        assert 30 <= len(gathered) <= 41
        assert set(gathered) <= kernels
        assert not [
            m for m in moved if m[0] == "block" and m[1] not in ("all-gather", "all-reduce")
        ]


@pytest.mark.slow
def test_the_count_sees_a_constraint_that_is_gone(monkeypatch):
    for module in (stack, transformer):
        monkeypatch.setattr(module, "pin_rows", lambda tree, mesh: tree)
    compiled, _ = compile_update("lora", "fsdp 8")
    assert counts(compiled.as_text()) != TRAFFIC["lora", "fsdp 8"]


def test_activations_are_constrained_inside_the_scans():
    """In the jaxpr of a block: streams at its start, between its halves and at its end; q, k and v
    by heads; what goes into the projections out of heads and hidden layers, and their kernels.
    """
    mesh = make_mesh(2, 2, 2, jax.devices())
    shape = jax.ShapeDtypeStruct
    model = flux_model(MODEL, abstract(FluxTransformer, MODEL)[1], SIDE, AllWeights(), mesh)

    def velocity(model, *args):
        return model.velocity(None, *args)

    cond = Cond(
        shape((8, TEXT, 32), jnp.float32), shape((8, 24), jnp.float32), shape((8,), jnp.float32)
    )
    args = (
        model,
        shape((8, 16, 64), jnp.float32),
        shape((8,), jnp.float32),
        cond,
    )
    found = {}
    for eqn in jax.make_jaxpr(velocity)(*args).eqns:
        if eqn.primitive.name == "scan":
            found[eqn.params["length"]] = Counter(pinned(eqn.params["jaxpr"].jaxpr))
    rows, heads = (("data", "fsdp"),), (("data", "fsdp"), None, "tensor")
    parts = (("data", "fsdp"), None, None, "tensor")
    kernel = ("tensor",)  # of a projection out of heads or hidden layers, gathered over fsdp
    assert found == {
        2: {rows: 6, heads: 3 + 4, kernel: 4},
        3: {rows: 2, heads: 3, parts: 1, kernel: 5},
    }


def pinned(jaxpr):
    """The specs of all sharding constraints in a jaxpr and in those inside it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sharding_constraint":
            yield tuple(eqn.params["sharding"].spec)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from pinned(inner)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("lora", "fsdp 8"),
        ("lora", "tensor 2"),
        pytest.param("full", "fsdp 8", marks=slow),
        ("full", "2 x 2 x 2"),
    ],
)
def test_a_device_holds_its_share_and_the_state_is_used_again(kind, layout):
    """By the compiler's account. Small arrays are whole: biases next to a whole side and norms."""
    one, many = run(kind, "one"), run(kind, layout)
    _, fsdp, tensor = LAYOUTS[layout]
    state = many.held["state"]
    assert many.memory.alias_size_in_bytes >= state
    arguments = many.memory.argument_size_in_bytes
    assert many.held["params"] * (kind == "lora") + state <= arguments <= sum(many.held.values())
    assert many.held["params"] < one.held["params"] / (fsdp * tensor) * 1.15
    if kind == "full":
        assert state < one.held["state"] / (fsdp * tensor) * 1.15


def test_heads_are_not_cut():
    with pytest.raises(
        ValueError, match=r"num_attention_heads 4 is not divisible by mesh axis tensor=8"
    ):
        flux_model(MODEL, None, SIDE, mesh=make_mesh(1, 1, 8, jax.devices()))
