"""Checkpoints: every bit comes back, damage is found, and a failed save costs nothing else."""

import functools
import json
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from realgen_jax.checkpoint import (
    SUMS,
    Checkpoints,
    RestoreError,
    SaveError,
    newest_good,
    read_meta,
    seal,
)
from realgen_jax.models.flux.tables import DIFFUSERS, LORA_TARGETS, RULES
from realgen_jax.models.flux.transformer import FluxTransformer
from realgen_jax.nn.lora import LoraConfig, with_lora
from realgen_jax.sharding import make_mesh, param_sharding
from realgen_jax.update import TrainState, make_optimizer
from tests.helpers.faults import full_disk


@functools.partial(jax.jit, static_argnums=(0, 2))
def _state(config, seed, rank):
    lora = LoraConfig(rank, 8.0)
    targets = {path: len(DIFFUSERS.rows[path]) for path in LORA_TARGETS}
    network = with_lora(FluxTransformer(config, nnx.Rngs(0)), targets, lora, jax.random.key(seed))
    adapters = nnx.state(network, nnx.LoRAParam)
    optimizer = make_optimizer(1e-3, 0.9, 0.999, 1e-8, 1e-4, 1.0)
    updates, opt_state = optimizer.update(adapters, optimizer.init(adapters), adapters)
    return TrainState(updates, adapters, opt_state, jnp.int32(seed))


def state_of(tiny, seed, rank=4):
    return _state(tiny.config, seed, rank)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    """Checkpoints of epochs 1 and 2. Copy before breaking."""
    folder = tmp_path_factory.mktemp("two") / "c"
    checkpoints = Checkpoints(folder, keep=2)
    for epoch in (1, 2):
        checkpoints.save(epoch, state_of(tiny, epoch), {"epoch": epoch})
    checkpoints.close()
    return folder


@pytest.mark.parametrize("name", ["c", "exp[lora] *"])
def test_round_trip_keeps_every_bit_and_the_newest(tiny, tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    assert newest_good(folder) == (None, [])
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.newest() is None
    for epoch in (1, 2, 3):
        meta = {"epoch": epoch, "data": {"next_index": epoch}}
        checkpoints.save(epoch, state_of(tiny, epoch), meta)
    checkpoints.close()

    assert checkpoints.newest() == 3
    assert sorted(entry.name for entry in folder.iterdir()) == ["2", "3"]
    assert newest_good(folder) == (3, [])
    assert read_meta(folder, 3) == {"epoch": 3, "data": {"next_index": 3}}
    assert_equal(Checkpoints(folder, keep=2).restore(3, state_of(tiny, 0)), state_of(tiny, 3))
    subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=folder / "3", check=True)


def test_any_pytree_can_be_saved(tiny, tmp_path):
    """A second set of adapters, lists and dictionaries in the state need no change here."""

    def tree(seed):
        first = state_of(tiny, seed)
        second = {"old": first.trainable, "history": [jnp.arange(3) + seed, jnp.float32(seed)]}
        return first, second

    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(1, tree(1), {})
    checkpoints.wait()
    assert_equal(checkpoints.restore(1, tree(0)), tree(1))


def test_restores_onto_another_mesh(tiny, two):
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    like = jax.device_put(state_of(tiny, 0), NamedSharding(mesh, P()))
    state = Checkpoints(two, keep=1).restore(2, like)
    assert_equal(state, state_of(tiny, 2))
    assert all(leaf.sharding.mesh.size == 4 for leaf in jax.tree.leaves(state))


def one_kernel_of_each_sharding(params, sharding):
    """{name: array} of the first kernel for every way in which kernels are split."""
    chosen = {}
    for path, variable in nnx.to_flat_state(params):
        name = ".".join(map(str, path))
        if name.endswith("kernel"):
            array = np.asarray(variable.get_value())
            chosen.setdefault(sharding(name, array.shape).spec, (name, array))
    return dict(chosen.values())


def test_split_weights_restore_onto_other_meshes(tiny, tmp_path):
    """Weights that are split over fsdp and tensor come back whole, split as the new mesh says."""
    split = param_sharding(make_mesh(2, 2, 2, jax.devices()), RULES)
    kernels = one_kernel_of_each_sharding(tiny.params, split)
    assert len(kernels) > 5

    def state_on(sharding, factor):
        weights = {}
        for name, array in kernels.items():
            weights[name] = jax.device_put(factor * array, sharding(name, array.shape))
        adam = optax.ScaleByAdamState(jnp.int32(3), weights, weights)
        return TrainState(weights, weights, adam, jnp.int32(0))

    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    state = state_on(split, 1)
    assert not any(weight.sharding.is_fully_replicated for weight in state.trainable.values())
    checkpoints.save(1, state, {})
    checkpoints.wait()
    for mesh_shape in ((1, 4, 1), (4, 1, 1), (1, 1, 1)):
        like = state_on(param_sharding(make_mesh(*mesh_shape, jax.devices()), RULES), 0)
        restored = checkpoints.restore(1, like)
        assert_equal(restored, state)
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize("number", [None, 1, 3])
def test_another_format_is_refused_in_one_line(two, tmp_path, number):
    folder = tmp_path / "c"
    shutil.copytree(two, folder)
    file = folder / "2" / "meta" / "meta.json"
    meta = json.loads(file.read_text())
    assert meta.pop("format") == 2
    if number is not None:
        meta["format"] = number
    file.write_text(json.dumps(meta))
    seal(folder / "2")
    assert newest_good(folder) == (2, [])
    message = rf"^checkpoint 2 in .* has format {number or 1}, .* reads format 2 only.*run_name"
    with pytest.raises(RestoreError, match=message) as error:
        read_meta(folder, 2)
    assert "\n" not in str(error.value)


def flip(file, rng):
    data = bytearray(file.read_bytes())
    bit = int(rng.integers(8 * len(data)))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def truncate(file, rng):
    file.write_bytes(file.read_bytes()[:-1])


def remove(file, rng):
    file.unlink()


@pytest.mark.parametrize("harm", [flip, truncate, remove])
def test_harm_to_any_file_is_named_and_the_checkpoint_before_is_used(two, tmp_path, harm):
    rng = np.random.default_rng(0)
    files = sorted(file.relative_to(two) for file in (two / "2").rglob("*") if file.is_file())
    assert len(files) > 10
    for i, name in enumerate(files):
        folder = tmp_path / str(i)
        shutil.copytree(two, folder)
        harm(folder / name, rng)
        epoch, (warning,) = newest_good(folder)
        assert epoch == 1
        if name.name != SUMS:
            change = "is missing" if harm is remove else "has changed"
            assert f"{name.relative_to('2')} {change}" in warning, name
        elif harm is remove:
            assert warning == "checkpoint 2 is incomplete and was removed"
        else:
            assert "checkpoint 2 is damaged and was moved to" in warning
        assert not (folder / "2").exists()
        assert (folder / "damaged-2").exists() == (harm is not remove or name.name != SUMS)
        assert newest_good(folder) == (1, [])  # warned once


def test_what_a_kill_leaves_is_removed(two, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(two, folder)
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")  # in the middle of a save
    shutil.copytree(folder / "2", folder / "3")  # after it, before the digests
    (folder / "3" / SUMS).unlink()
    assert newest_good(folder) == (2, ["checkpoint 3 is incomplete and was removed"])
    assert sorted(entry.name for entry in folder.iterdir()) == ["1", "2"]

    for epoch in (1, 2):
        (folder / str(epoch) / "surplus").write_text("x")
    with pytest.raises(ValueError, match="surplus has changed\nno intact checkpoint is left"):
        newest_good(folder)


def test_another_shape_is_refused(tiny, two):
    shapes = jax.eval_shape(lambda: state_of(tiny, 0, rank=2))
    like = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype)), shapes)
    message = r"checkpoint 2 .* does not fit the weights and the optimizer of this config"
    with pytest.raises(RestoreError, match=message):
        Checkpoints(two, keep=2).restore(2, like)


def test_a_full_disk_costs_nothing_but_that_checkpoint(tiny, two, tmp_path):
    """A limit on the size of files, which stops a write in its middle as a full disk does."""
    folder = tmp_path / "c"
    shutil.copytree(two, folder)
    checkpoints = Checkpoints(folder, keep=2)
    message = r"checkpoint 3 could not .* still that of epoch 2.*File too large"
    with full_disk():
        checkpoints.save(3, state_of(tiny, 3), {"epoch": 3})
        with pytest.raises(SaveError, match=message):
            checkpoints.wait()
    assert sorted(entry.name for entry in folder.iterdir()) == ["1", "2"]
    assert checkpoints.begun is None

    checkpoints.wait()  # raises once
    checkpoints.save(4, state_of(tiny, 3), {"epoch": 4})
    checkpoints.close()
    assert newest_good(folder) == (4, [])
    assert_equal(Checkpoints(folder, keep=2).restore(2, state_of(tiny, 0)), state_of(tiny, 2))
