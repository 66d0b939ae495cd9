import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

torch = pytest.importorskip("torch")

from reward_bridge.bridge import resolve  # noqa: E402
from reward_bridge.dlpack import check_room, reserve, shards_to_torch, to_torch  # noqa: E402


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


@pytest.fixture
def gpus(monkeypatch):
    """A machine with so many GPUs of 80 GiB, as torch would tell."""

    def make(count, free=80.0):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(
            torch.cuda, "mem_get_info", lambda device: (int(free * 2**30), 80 * 2**30)
        )
        monkeypatch.setattr(jax.config, "update", lambda key, value: seen.append((key, value)))

    seen = []
    make.seen = seen
    return make


def test_the_last_gpu_is_the_rewards_by_default(gpus):
    assert resolve("auto") == "cpu"
    gpus(8)
    assert (resolve("auto"), resolve("cuda"), resolve("cuda:3"), resolve("cpu")) == (
        "cuda:7",
        "cuda:0",
        "cuda:3",
        "cpu",
    )
    with pytest.raises(ValueError, match="there is no device 'cuda:8': torch sees 8 CUDA devices"):
        resolve("cuda:8")
    with pytest.raises(ValueError, match="got device 'tpu'; expected auto, cpu, or a GPU"):
        resolve("tpu")


def test_jax_is_kept_off_the_rewards_gpus(gpus, monkeypatch):
    gpus(8)
    assert reserve({"cuda:7"}) == set()  # these tests run JAX on the CPU
    assert gpus.seen == []
    monkeypatch.setattr("reward_bridge.dlpack._on_gpu", lambda: True)
    assert reserve({"cuda:7", "cuda:5", "cpu"}) == set()
    assert gpus.seen == [("jax_cuda_visible_devices", "0,1,2,3,4,6")]
    assert reserve({"cuda:7", "cpu"}, share=True) == {"cuda:7"}
    gpus(1)
    assert reserve({"cuda:0"}) == {"cuda:0"}  # shared: the only one
    assert reserve({"cpu"}) == set()
    assert len(gpus.seen) == 1


def test_a_shared_gpu_must_have_room_for_both(gpus, monkeypatch):
    for name in (
        "XLA_CLIENT_MEM_FRACTION",
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "XLA_PYTHON_CLIENT_PREALLOCATE",
    ):
        monkeypatch.delenv(name, raising=False)
    gpus(1, free=62)
    check_room("cuda:0")
    gpus(1, free=60)
    with pytest.raises(
        ValueError,
        match=r"JAX would claim 75% of its 80 GiB and the rewards have 20\.0 GiB of it; ",
    ):
        check_room("cuda:0")
    with pytest.raises(
        ValueError, match=r"start with XLA_CLIENT_MEM_FRACTION=0\.73, or move the rewards"
    ):
        check_room("cuda:0")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.73")
    check_room("cuda:0")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.95")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    check_room("cuda:0")
