"""Scores of every reward, without copies, beside the caller and on several devices."""

import threading

import jax
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from torch.utils._python_dispatch import TorchDispatchMode

from reward_bridge.bridge import RewardBridge
from reward_bridge.dlpack import gather
from tests.helpers.bridges import PROMPTS, bridge, brightness, images


def test_scores_every_reward_and_only_those_asked_for():
    seen = []

    def length(x, prompts):
        seen.append((x.dtype, tuple(x.shape), prompts))
        return torch.tensor([float(len(p)) for p in prompts])

    both = bridge(length)
    result = both.submit(images(), ["", "x", "xy", "xyz"]).result()
    scores = result.rewards
    assert result.references == {}
    np.testing.assert_array_equal(scores["odd"], [0, 1, 2, 3])
    np.testing.assert_allclose(scores["bright"], np.asarray(images()).mean((1, 2, 3)))
    assert scores["odd"].dtype == np.float32
    assert seen == [(torch.uint8, (4, 3, 2, 2), ["", "x", "xy", "xyz"])]
    assert set(both.submit(images(), PROMPTS, only=["bright"]).result().rewards) == {"bright"}
    assert len(seen) == 1


def test_images_are_handed_over_without_a_copy():
    pointers = []
    array = images()
    bridge(lambda x, p: pointers.append(x.data_ptr()) or torch.zeros(len(p))).submit(
        array, PROMPTS
    ).result()
    assert pointers == [array.unsafe_buffer_pointer()]


class Copies(TorchDispatchMode):
    """Counts the bytes that torch writes while pictures are on their way."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if any(word in str(function) for word in ("copy", "cat", "clone")):
            self.bytes += out.nbytes
        return out


@pytest.mark.parametrize(("parts", "copies"), [(1, 0), (4, 1)])
def test_pictures_are_copied_once_for_all_rewards_and_only_where_they_are_in_pieces(parts, copies):
    mesh = jax.make_mesh((parts,), ("data",), devices=jax.devices()[:parts])
    array = jax.device_put(images(8), NamedSharding(mesh, P("data")))
    with Copies() as counted:
        assert gather(array, "cpu").shape == array.shape
    assert counted.bytes == copies * array.nbytes
    pointers = []

    def note(x, prompts):
        pointers.append(x.data_ptr())
        return x.float().mean((1, 2, 3))

    scores = bridge(note, another=note).submit(array, PROMPTS * 2).result().rewards
    np.testing.assert_allclose(scores["odd"], np.asarray(images(8)).mean((1, 2, 3)))
    np.testing.assert_array_equal(scores["odd"], scores["another"])
    assert len(pointers) == 2
    assert len(set(pointers)) == 1
    pieces = {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}
    assert set(pointers) <= pieces if parts == 1 else not pieces & set(pointers)


def test_tensors_are_scored_as_arrays_are():
    array = images()
    both = bridge(brightness)
    want, got = (
        both.submit(x, PROMPTS).result().rewards for x in (array, torch.from_numpy(np.array(array)))
    )
    np.testing.assert_array_equal(want["odd"], got["odd"])


def test_scoring_runs_beside_the_caller():
    inside, go_on = threading.Event(), threading.Event()

    def wait(x, prompts):
        inside.set()
        assert go_on.wait(20)
        return torch.zeros(len(prompts))

    pending = bridge(wait).submit(images(), PROMPTS)
    assert inside.wait(20)  # it is scoring while this thread is here
    go_on.set()
    assert pending.result().rewards["odd"].tolist() == [0, 0, 0, 0]


def test_wrong_counts_are_named():
    with pytest.raises(
        ValueError, match="got 4 images and 3 prompts; expected one prompt per image"
    ):
        bridge(brightness).submit(images(), PROMPTS[:3])


def test_every_device_has_a_thread_and_rewards_on_one_take_turns(monkeypatch):
    """Two rewards on each of two GPUs, which this test has the CPU stand in for."""
    monkeypatch.setattr("reward_bridge.lane.Batch.on", lambda self, device: self._images)
    order, meet = {"cuda:0": [], "cuda:1": []}, threading.Barrier(2, timeout=20)

    def reward(name, device):
        def score(x, prompts):
            meet.wait()  # passes only while the other device is at work too
            order[device].append((name, threading.current_thread().name))
            return torch.zeros(len(prompts))

        return score

    devices = {"a": "cuda:0", "b": "cuda:1", "c": "cuda:0", "d": "cuda:1"}
    before = threading.active_count()
    both = RewardBridge(
        {n: reward(n, d) for n, d in devices.items()}, devices, deadline=20, retries=0
    )
    assert threading.active_count() == before + 2
    pending = [
        both.submit(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ["x", "y"]) for _ in range(3)
    ]
    assert [list(one.result().rewards) for one in pending] == [["a", "b", "c", "d"]] * 3
    for device, names in (("cuda:0", "ac"), ("cuda:1", "bd")):
        assert "".join(name for name, _ in order[device]) == names * 3
        assert len({thread for _, thread in order[device]}) == 1


def test_a_slow_reward_on_the_cpu_does_not_hold_up_another():
    go_on, done = threading.Event(), threading.Event()
    both = bridge(
        lambda x, p: go_on.wait(20) and torch.zeros(len(p)),
        quick=lambda x, p: done.set() or torch.ones(4),
    )
    pending = both.submit(images(), PROMPTS)
    assert done.wait(20)
    go_on.set()
    assert pending.result().rewards["quick"].tolist() == [1, 1, 1, 1]
