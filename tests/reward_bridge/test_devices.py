"""Who gets which GPU."""

import pytest
import torch

from reward_bridge.devices import Allotment, check_room, reserve, resolve

GIB = 2**30


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that the machine has `count` GPUs of 80 GiB, of which `free` GiB are free."""

    def pretend(count, free=80.0):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        memory = (int(free * GIB), 80 * GIB)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: memory)

    return pretend


def test_the_last_gpu_is_the_rewards_by_default(gpus):
    assert resolve("auto") == "cpu"
    gpus(8)
    assert resolve("auto") == "cuda:7"
    assert resolve("cuda") == "cuda:0"
    assert resolve("cuda:3") == "cuda:3"
    assert resolve("cpu") == "cpu"
    with pytest.raises(ValueError, match="there is no device 'cuda:8': torch sees 8 CUDA devices"):
        resolve("cuda:8")
    with pytest.raises(ValueError, match="got device 'tpu'; expected auto, cpu, or a GPU"):
        resolve("tpu")


def shared(*devices):
    return Allotment(frozenset(devices), None)


def test_jax_is_kept_off_the_rewards_gpus(gpus):
    gpus(8)
    for platforms in (None, "", "cuda", "cuda,cpu", "gpu"):
        allotment = reserve({"cuda:7", "cuda:5", "cpu"}, platforms)
        assert allotment == Allotment(frozenset(), "0,1,2,3,4,6")
    assert reserve({"cpu"}, None) == shared()


def test_nothing_is_reserved_where_jax_does_not_run_on_gpus(gpus):
    gpus(8)
    for platforms in ("cpu", "tpu", "tpu,cpu"):
        assert reserve({"cuda:7"}, platforms) == shared()


def test_gpus_are_shared_on_request_and_where_there_is_only_one(gpus):
    gpus(8)
    assert reserve({"cuda:7", "cpu"}, None, share=True) == shared("cuda:7")
    gpus(1)
    assert reserve({"cuda:0"}, None) == shared("cuda:0")
    assert reserve({"cpu"}, None) == shared()


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
    claims = r"JAX would claim 75% of its 80 GiB, and the rewards use 20\.0 GiB; "
    with pytest.raises(ValueError, match=claims):
        check_room("cuda:0")
    remedy = r"start with XLA_CLIENT_MEM_FRACTION=0\.73, or move the rewards"
    with pytest.raises(ValueError, match=remedy):
        check_room("cuda:0")

    # The fraction that the error names fits; the old variable counts too; without preallocation
    # JAX claims nothing at its start.
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.73")
    check_room("cuda:0")
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.73")
    check_room("cuda:0")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.95")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    check_room("cuda:0")
