import functools
import resource
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
)
from realgen_jax.nn.lora import LoraConfig, init_lora
from realgen_jax.objectives.grpo import TrainState, make_optimizer
from realgen_jax.sharding import make_mesh, param_sharding


@functools.partial(jax.jit, static_argnums=(0, 2))
def _state(config, seed, rank):
    adapters = init_lora(config, LoraConfig(rank, 8.0), jax.random.key(seed))
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
    saved = Checkpoints(folder, keep=2)
    for epoch in (1, 2):
        saved.save(epoch, state_of(tiny, epoch), {"epoch": epoch})
    saved.close()
    return folder


def test_round_trip_keeps_every_bit_and_the_newest(tiny, tmp_path):
    folder = tmp_path / "c"
    assert newest_good(folder) == (None, [])
    saved = Checkpoints(folder, keep=2)
    assert saved.newest() is None
    for epoch in (1, 2, 3):
        saved.save(epoch, state_of(tiny, epoch), {"epoch": epoch, "data": {"next_index": epoch}})
    saved.close()
    assert saved.newest() == 3
    assert sorted(f.name for f in folder.iterdir()) == ["2", "3"]
    assert newest_good(folder) == (3, [])
    assert read_meta(folder, 3) == {"epoch": 3, "data": {"next_index": 3}}
    assert_equal(Checkpoints(folder, keep=2).restore(3, state_of(tiny, 0)), state_of(tiny, 3))
    subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=folder / "3", check=True)


def test_restores_onto_another_mesh(tiny, two):
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    like = jax.device_put(state_of(tiny, 0), NamedSharding(mesh, P()))
    state = Checkpoints(two, keep=1).restore(2, like)
    assert_equal(state, state_of(tiny, 2))
    assert all(leaf.sharding.mesh.size == 4 for leaf in jax.tree.leaves(state))


def test_split_weights_restore_onto_other_meshes(tiny, tmp_path):
    """All weights trained, split over fsdp and tensor: the arrays come back whole, split as the new mesh says."""

    def on(*sizes):
        sharding = param_sharding(make_mesh(*sizes, jax.devices()))
        flat = [
            (path, ".".join(map(str, path)), leaf) for path, leaf in nnx.to_flat_state(tiny.params)
        ]
        placed = [
            (p, v.replace(jax.device_put(v.get_value(), sharding(name, v.shape))))
            for p, name, v in flat
        ]
        weights = nnx.from_flat_state(placed)
        return TrainState(weights, weights, optax.adam(1.0).init(weights), jnp.int32(0))

    saved, state = Checkpoints(tmp_path / "c", keep=1), on(2, 2, 2)
    assert not state.trainable["single"]["qkv"]["kernel"].sharding.is_fully_replicated
    saved.save(1, state, {})
    saved.wait()
    for sizes in ((1, 4, 1), (4, 1, 1), (1, 1, 1)):
        like = jax.tree.map(jnp.zeros_like, on(*sizes))
        found = saved.restore(1, like)
        assert_equal(found, state)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


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
    files = sorted(f.relative_to(two) for f in (two / "2").rglob("*") if f.is_file())
    assert len(files) > 10
    for i, name in enumerate(files):
        folder = tmp_path / str(i)
        shutil.copytree(two, folder)
        harm(folder / name, rng)
        epoch, (told,) = newest_good(folder)
        assert epoch == 1
        if name.name != SUMS:
            assert (
                f"{name.relative_to('2')} {'is missing' if harm is remove else 'has changed'}"
                in told
            ), name
        elif harm is remove:
            assert told == "checkpoint 2 was not finished; it is not used"
        else:
            assert "checkpoint 2 is damaged and was moved to" in told
        assert not (folder / "2").exists()
        assert (folder / "damaged-2").exists() == (harm is not remove or name.name != SUMS)
        assert newest_good(folder) == (1, [])  # said once


def test_what_a_kill_leaves_is_cleared_away(two, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(two, folder)
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")  # in the middle of a save
    shutil.copytree(folder / "2", folder / "3")  # after it, before the digests
    (folder / "3" / SUMS).unlink()
    assert newest_good(folder) == (2, ["checkpoint 3 was not finished; it is not used"])
    assert sorted(f.name for f in folder.iterdir()) == ["1", "2"]
    for epoch in (1, 2):
        (folder / str(epoch) / "surplus").write_text("x")
    with pytest.raises(ValueError, match="surplus has changed\nno good checkpoint is left"):
        newest_good(folder)


def test_another_shape_is_told(tiny, two):
    saved = Checkpoints(two, keep=2)
    with pytest.raises(
        RestoreError, match=r"checkpoint 2 .* does not fit this config's weights and optimizer"
    ):
        saved.restore(2, state_of(tiny, 0, rank=2))


def test_a_full_disk_is_told_and_costs_nothing_but_that_checkpoint(tiny, two, tmp_path):
    """A limit on the size of files, which stops a write in its middle as a full disk does."""
    folder = tmp_path / "c"
    shutil.copytree(two, folder)
    saved, state = Checkpoints(folder, keep=2), state_of(tiny, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        saved.save(3, state, {"epoch": 3})
        with pytest.raises(
            SaveError, match=r"checkpoint 3 could not .* still that of epoch 2.*File too large"
        ):
            saved.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(f.name for f in folder.iterdir()) == ["1", "2"]
    assert saved.begun is None
    saved.wait()  # told once
    saved.save(4, state, {"epoch": 4})
    saved.close()
    assert newest_good(folder) == (4, [])
    assert_equal(Checkpoints(folder, keep=2).restore(2, state_of(tiny, 0)), state_of(tiny, 2))
