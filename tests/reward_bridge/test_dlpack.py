"""Arrays become tensors without a copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from reward_bridge.dlpack import shards_to_torch, to_torch


@pytest.mark.parametrize("dtype", ["uint8", "float32", "bfloat16", "int32"])
def test_shares_memory(dtype):
    array = jax.jit(lambda: jnp.arange(24, dtype=dtype).reshape(2, 3, 4))()
    tensor = to_torch(array)
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    assert tensor.shape == (2, 3, 4)
    np.testing.assert_array_equal(tensor.float().numpy(), array.astype(jnp.float32))
    pointer = tensor.data_ptr()
    del array  # the tensor keeps the memory
    assert tensor.data_ptr() == pointer
    assert tensor.float().sum() == 276


def test_waits_for_the_array():
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda i, x: jnp.tanh(x @ x), x))(
        jnp.eye(300) / 2
    )
    assert float(to_torch(slow).sum()) == float(slow.sum())


def test_sharded_arrays_come_shard_by_shard():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    array = jax.device_put(
        np.arange(32, dtype=np.uint8).reshape(8, 4), NamedSharding(mesh, P("data"))
    )
    with pytest.raises(ValueError, match="lies on 4 devices; expected one, or use shards_to_torch"):
        to_torch(array)
    tensors = shards_to_torch(array)
    assert [t.data_ptr() for t in tensors] == [
        s.data.unsafe_buffer_pointer() for s in array.addressable_shards
    ]
    np.testing.assert_array_equal(torch.cat(tensors).numpy(), np.asarray(array))
    copies = jax.device_put(np.ones(3, np.float32), NamedSharding(mesh, P()))
    assert len(shards_to_torch(copies)) == 1  # four replicas, one set of rows


def test_wrong_arrays_are_named():
    with pytest.raises(TypeError, match="is a tracer: call this outside of jit"):
        jax.jit(to_torch)(jnp.ones(3))
    with pytest.raises(TypeError, match=r"got a ndarray; expected a jax\.Array"):
        to_torch(np.ones(3))
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(ValueError, match="was donated to a jitted function; hand it over before"):
        to_torch(gone)
