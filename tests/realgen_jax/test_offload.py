"""Weights and optimizer state in host memory: the same bits, and what compilers make of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from realgen_configs.flux_grpo import get_config
from realgen_jax import sharding
from realgen_jax.models.loading import abstract_model, weight_sharding
from realgen_jax.nn.convert import leaves
from realgen_jax.nn.layers import Linear
from realgen_jax.nn.stack import scan_blocks
from realgen_jax.preflight.targets import target_devices
from realgen_jax.sharding import is_on_host, make_mesh, to_device, to_host
from realgen_jax.training.programs import abstract_state, first_state, make_recipe
from realgen_jax.update import EmaConfig, TrainState, make_optimizer, update
from tests.helpers.made_up import MADE_UP
from tests.helpers.models import golden_model, one_device, pretrained
from tests.helpers.replays import FAMILIES, Replay

LAYERS, WIDTH = 3, 128


def gradient_of_blocks(mesh, **options):
    """jit of (blocks' state, x [n, WIDTH]) -> the gradient of x through a stack of blocks."""
    kw = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    blocks = Linear(WIDTH, WIDTH, stack=(LAYERS,), rngs=nnx.Rngs(0), **kw)
    graph, state = nnx.split(blocks)

    def apply(block, x, _):
        return jnp.tanh(block(x))

    def score(state, x):
        return scan_blocks(apply, nnx.merge(graph, state), x, None, "full", mesh).sum()

    return jax.jit(jax.grad(score, argnums=1), **options), state


def placed(state, make, mesh):
    """The kernel in host memory; `make` takes a leaf and a sharding."""
    device = NamedSharding(mesh, P())

    def place(leaf):
        return make(leaf, to_host(device) if leaf.ndim == 3 else device)

    return jax.tree.map(place, state)


def test_blocks_are_read_from_host_memory_layer_by_layer():
    mesh = one_device()
    gradient, state = gradient_of_blocks(mesh)
    x = jax.random.normal(jax.random.key(0), (8, WIDTH))
    on_host = placed(state, jax.device_put, mesh)
    assert [is_on_host(leaf) for leaf in jax.tree.leaves(on_host)].count(True) == 1
    expected = gradient(state, x)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_array_equal(gradient(on_host, x), expected)


def test_a_gpu_reads_the_layers_of_the_backward_pass_in_its_own_order():
    """Not one slice of host memory lies where XLA works out from the loop's counter alone.

    XLA of jax 0.10 takes a counter that goes down for one that goes up.
    """
    mesh = make_mesh(1, 1, 1, target_devices("h200", 1))
    gradient, state = gradient_of_blocks(mesh)
    like = placed(
        state, lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), mesh
    )
    x = jax.ShapeDtypeStruct((8, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P()))
    compiled = gradient.lower(like, x).compile()
    memory = compiled.memory_analysis()
    assert memory.host_argument_size_in_bytes == 4 * LAYERS * WIDTH**2

    text = compiled.as_text()
    slices = [line for line in text.splitlines() if f"[1,{WIDTH},{WIDTH}]" in line]
    slices = [line for line in slices if " dynamic-slice(" in line]
    assert len(slices) == 2  # forward and backward
    assert not any("dynamic_slice_config" in line for line in slices)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize(
    ("family", "quantization"), [*((name, "") for name in FAMILIES), ("flux", "nf4")]
)
def test_weights_in_host_memory_change_no_bit(family, quantization, layout):
    """Of latents, gradient and weights; on a mesh the kernels are split in host memory too."""
    mesh = make_mesh(*layout, jax.devices())
    results = []
    for offload in (False, True):
        weights = {"quantization": quantization, "offload": offload}
        run = Replay(family, "tiny", jnp.float32, "both", mesh, **weights)
        state, metrics = run.update()
        assert run.model.offload == offload
        assert metrics["ratio_deviation"] == 0.0
        results.append((run.latents, state, metrics))
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_blocks_kernels_and_the_autoencoder_are_in_host_memory():
    for family in ("FluxPipeline", "StableDiffusion3Pipeline", "ZImagePipeline"):
        config = pretrained(family=family, model="", offload=True)
        model = abstract_model(config, (512, 512), one_device())
        arrays = leaves(model.params)
        host = {path for path, array in arrays.items() if is_on_host(array)}
        blocks = {path.partition(".")[0] for path in host}
        assert blocks == set(model.family.blocks)
        assert all(path.endswith(".kernel") for path in host)
        size = sum(arrays[path].size for path in host)
        assert size > 0.6 * sum(array.size for array in arrays.values())
        assert all(map(is_on_host, jax.tree.leaves(model.vae_params)))


class Pull:
    """An objective whose gradient is the weights themselves."""

    def gradient(self, policy, state, batch):
        return jax.tree.map(lambda a: a + batch, state.trainable), {}


def test_optimizer_state_in_host_memory_changes_no_bit():
    """Three updates; moments and average stay where they are, and so does their memory."""
    mesh = one_device()
    optimizer = make_optimizer(1e-2, 0.9, 0.999, 1e-8, 1e-2, 1.0)
    weights = {"a": jax.random.normal(jax.random.key(0), (64, 32)), "b": jnp.ones(8)}
    device = NamedSharding(mesh, P())
    weights = jax.device_put(weights, device)
    start = TrainState(weights, weights, optimizer.init(weights), jnp.int32(0))
    start = jax.device_put(start, device)

    def place(where):
        def moment(leaf, _=None):
            return jax.device_put(leaf, where)

        moments = optax.tree_map_params(optimizer, moment, start.opt_state)
        average = jax.tree.map(moment, start.ema)
        return jax.tree.map(jnp.copy, TrainState(weights, average, moments, start.step))

    ends = []
    for where in (device, to_host(device)):
        state = place(where)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = jax.jit(
            partial(update, Pull(), optimizer, EmaConfig(0.9, 1), None),
            donate_argnums=0,
            out_shardings=(shardings, device),
        )
        for number in range(3):
            state, metrics = step(state, jnp.float32(number))
        on_host = [is_on_host(leaf) for leaf in jax.tree.leaves((state.ema, state.opt_state))]
        assert on_host.count(True) == (0 if where == device else 6)
        assert not any(map(is_on_host, jax.tree.leaves(state.trainable)))
        assert not any(map(is_on_host, jax.tree.leaves(to_device(state))))
        ends.append((state, metrics))
    for ours, theirs in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(ours, theirs)


class Product(Pull):
    """An objective with activations that are larger than the optimizer's state."""

    def gradient(self, policy, state, batch):
        def score(weights):
            return jnp.square(batch @ weights["a"]).sum()

        return jax.grad(score)(state.trainable), {}


def test_optimizer_state_is_not_on_a_gpu_while_the_gradient_is_computed():
    """By XLA's compiler, which copies an argument as early as it may."""
    mesh = make_mesh(1, 1, 1, target_devices("h200", 1))
    optimizer = make_optimizer(1e-2, 0.9, 0.999, 1e-8, 1e-2, 1.0)
    device = NamedSharding(mesh, P())

    def struct(leaf, where=device):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    weights = {"a": jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=device)}
    moment = partial(struct, where=to_host(device))
    moments = optax.tree_map_params(
        optimizer,
        moment,
        jax.eval_shape(optimizer.init, weights),
        transform_non_params=struct,
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=device)
    state = TrainState(weights, jax.tree.map(moment, weights), moments, step)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    program = jax.jit(
        partial(update, Product(), optimizer, EmaConfig(0.9, 1), None),
        donate_argnums=0,
        out_shardings=(shardings, device),
    )
    rows = jax.ShapeDtypeStruct((16384, 1024), jnp.float32, sharding=device)
    memory = program.lower(state, rows).compile().memory_analysis()
    size = 4 * 1024**2
    assert memory.host_argument_size_in_bytes == memory.host_alias_size_in_bytes == 3 * size

    # 16 for the product and 2 for gradients; the state's would be 3 more.
    assert memory.temp_size_in_bytes < 19 * size


def test_a_run_starts_with_optimizer_state_in_host_memory():
    config = get_config().unlock()
    config.train.offload = True
    recipe = make_recipe(config)
    model = golden_model(trainable=recipe.trainable)
    state = first_state(recipe, model, jax.random.key(0))
    for leaf, like in zip(
        jax.tree.leaves(state), jax.tree.leaves(abstract_state(recipe, model)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
        assert is_on_host(leaf) == is_on_host(like)
    for leaf in jax.tree.leaves(state.ema):
        assert is_on_host(leaf)
    assert not any(map(is_on_host, jax.tree.leaves(state.trainable)))
    moments = [is_on_host(leaf) for leaf in jax.tree.leaves(state.opt_state)]
    assert moments.count(True) == 2 * len(jax.tree.leaves(state.ema))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.lora": False}, r"train\.lora=False trains all weights; expected .*offload=False"),
        ({"pretrained.remat": "none"}, r"remat is 'none', which would keep the weights of all"),
    ],
)
def test_what_needs_the_weights_on_the_device_is_refused(changes, message):
    config = get_config().unlock()
    config.pretrained.offload = True
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        make_recipe(config)


def test_devices_without_host_memory_are_refused(monkeypatch):
    monkeypatch.setattr(sharding, "HOST", "page_locked")
    with pytest.raises(
        ValueError,
        match=r"^JAX offers no host memory \(page_locked\) for \S+, only device, .*False$",
    ):
        to_host(NamedSharding(one_device(), P()))


def test_a_family_without_stacked_blocks_is_refused():
    with pytest.raises(ValueError, match=r"offload is True, which MadeUpPipeline does not support"):
        weight_sharding(MADE_UP, one_device(), offload=True)
