import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from realgen_jax.checkpoint import Checkpoints
from realgen_jax.flux.lora import LoraConfig, init_lora
from realgen_jax.grpo import TrainState, make_optimizer


@functools.partial(jax.jit, static_argnums=0)
def _state(config, seed):
    adapters = init_lora(config, LoraConfig(4, 8.0), jax.random.key(seed))
    optimizer = make_optimizer(1e-3, 0.9, 0.999, 1e-8, 1e-4, 1.0)
    updates, opt_state = optimizer.update(adapters, optimizer.init(adapters), adapters)
    return TrainState(updates, adapters, opt_state, jnp.int32(seed))


def state_of(tiny, seed):
    return _state(tiny.config, seed)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_round_trip_keeps_every_bit_and_the_newest(tiny, tmp_path):
    saved = Checkpoints(tmp_path / "c", keep=2)
    assert saved.newest() is None
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint; start without --resume"):
        saved.restore(state_of(tiny, 0))
    for epoch in (1, 2, 3):
        saved.save(epoch, state_of(tiny, epoch), {"epoch": epoch, "data": {"next_index": epoch}})
    saved.close()
    assert sorted(f.name for f in (tmp_path / "c").iterdir()) == ["2", "3"]
    again = Checkpoints(tmp_path / "c", keep=2)
    state, meta = again.restore(state_of(tiny, 0))
    assert meta == {"epoch": 3, "data": {"next_index": 3}}
    assert_equal(state, state_of(tiny, 3))


def test_restores_onto_another_mesh(tiny, tmp_path):
    saved = Checkpoints(tmp_path / "c", keep=1)
    saved.save(1, state_of(tiny, 5), {"epoch": 1})
    saved.close()
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    like = jax.device_put(state_of(tiny, 0), NamedSharding(mesh, P()))
    state, _ = Checkpoints(tmp_path / "c", keep=1).restore(like)
    assert_equal(state, state_of(tiny, 5))
    assert all(leaf.sharding.mesh.size == 4 for leaf in jax.tree.leaves(state))
