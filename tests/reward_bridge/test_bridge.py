import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from reward_bridge.bridge import RewardBridge, RewardError  # noqa: E402
from reward_bridge.dlpack import gather  # noqa: E402

PROMPTS = ["a", "b", "c", "d"]


def images(n=4):
    return jnp.asarray(np.arange(n * 12, dtype=np.uint8).reshape(n, 3, 2, 2))


def brightness(x, prompts):
    return x.float().mean((1, 2, 3))


def bridge(reward, deadline=20.0, retries=0, batch_size=0, device="cpu", **more):
    rewards = {"bright": brightness, "odd": reward, **more}
    devices = dict.fromkeys(rewards, device)
    return RewardBridge(rewards, devices, deadline=deadline, retries=retries, batch_size=batch_size)


def test_scores_every_reward_and_only_those_asked_for():
    seen = []

    def length(x, prompts):
        seen.append((x.dtype, tuple(x.shape), prompts))
        return torch.tensor([float(len(p)) for p in prompts])

    both = bridge(length)
    scores = both.submit(images(), ["", "x", "xy", "xyz"]).result()
    np.testing.assert_array_equal(scores["odd"], [0, 1, 2, 3])
    np.testing.assert_allclose(scores["bright"], np.asarray(images()).mean((1, 2, 3)))
    assert scores["odd"].dtype == np.float32
    assert seen == [(torch.uint8, (4, 3, 2, 2), ["", "x", "xy", "xyz"])]
    assert set(both.submit(images(), PROMPTS, only=["bright"]).result()) == {"bright"}
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
    note = lambda x, p: pointers.append(x.data_ptr()) or x.float().mean((1, 2, 3))  # noqa: E731
    scores = bridge(note, another=note).submit(array, PROMPTS * 2).result()
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
        both.submit(x, PROMPTS).result() for x in (array, torch.from_numpy(np.array(array)))
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
    assert pending.result()["odd"].tolist() == [0, 0, 0, 0]


def test_a_reward_that_fails_once_is_tried_again():
    calls = []

    def flaky(x, prompts):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("busy")
        return torch.ones(len(prompts))

    assert bridge(flaky, retries=1).submit(images(), PROMPTS).result()["odd"].tolist() == [
        1,
        1,
        1,
        1,
    ]
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x, p: 1 / 0, r"reward 'odd' failed 3 times; the last time: ZeroDivisionError"),
        (
            lambda x, p: torch.tensor([1.0, float("nan"), 1.0, 1.0]),
            r"reward 'odd' returned nan for image 1 \('b'\)",
        ),
        (
            lambda x, p: torch.tensor([1.0, 1.0, 1.0, float("inf")]),
            r"reward 'odd' returned inf for image 3 \('d'\)",
        ),
        (lambda x, p: None, r"reward 'odd' failed 3 times; the last time: "),
        (lambda x, p: torch.ones(3), r"reward 'odd' returned shape \(3,\); expected \(4,\)"),
        (lambda x, p: torch.ones(4, 1), r"reward 'odd' returned shape \(4, 1\)"),
    ],
)
def test_faults_name_the_reward_and_the_bridge_lives_on(reward, message):
    faults = [True]
    both = bridge(lambda x, p: reward(x, p) if faults else torch.zeros(len(p)), retries=2)
    with pytest.raises(RewardError, match=message):
        both.submit(images(), PROMPTS).result()
    faults.clear()
    assert both.submit(images(), PROMPTS).result()["odd"].tolist() == [0, 0, 0, 0]


def test_a_reward_that_hangs_is_named_at_its_deadline():
    stop = threading.Event()
    both = bridge(lambda x, p: stop.wait(60), deadline=0.2)
    pending = both.submit(images(), PROMPTS)
    clock = time.monotonic()
    with pytest.raises(
        RewardError, match=r"reward 'odd' has not answered for 0\.2 s \(config\.reward\.deadline\)"
    ):
        pending.result()
    assert time.monotonic() - clock < 10
    assert both.stuck() == ["odd"]
    stop.set()


def test_a_hanging_reward_does_not_keep_the_process_alive():
    program = """
        import time, jax.numpy as jnp
        from reward_bridge.bridge import RewardBridge
        bridge = RewardBridge({"slow": lambda x, p: time.sleep(600)}, {"slow": "cpu"}, deadline=0.2, retries=0)
        bridge.submit(jnp.zeros((1, 3, 2, 2), "uint8"), ["x"]).result()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "RewardError: reward 'slow' has not answered" in done.stderr


def test_closing_waits_for_the_reward_at_work_and_drops_the_rest():
    inside, done = threading.Event(), []

    def slow(x, prompts):
        inside.set()
        time.sleep(0.3)
        done.append(1)
        return torch.zeros(len(prompts))

    both = bridge(slow)
    for _ in range(5):
        both.submit(images(), PROMPTS)
    assert inside.wait(20)
    both.close()
    assert done == [1]
    assert not [lane for lane in both._lanes.values() if lane.thread.is_alive()]


def test_wrong_counts_are_named():
    with pytest.raises(ValueError, match="got 4 images and 3 prompts"):
        bridge(brightness).submit(images(), PROMPTS[:3])


def full(x, prompts):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_a_reward_out_of_memory_goes_on_with_half_the_images(error, caplog):
    seen = []

    def small(x, prompts):
        seen.append(len(prompts))
        if len(prompts) > 2:
            raise error
        return x.float().mean((1, 2, 3))

    both = bridge(small)
    scores = both.submit(images(7), list("abcdefg")).result()
    np.testing.assert_allclose(scores["odd"], np.asarray(images(7)).mean((1, 2, 3)))
    assert seen == [7, 4, 2, 2, 2, 1]
    assert "'odd' ran out of memory on 7 images and goes on with 4 at a time" in caplog.text
    both.submit(images(4), PROMPTS).result()
    assert seen[6:] == [2, 2]  # it has learnt
    assert both.batch_sizes == {"bright": 0, "odd": 2}


def test_a_reward_that_has_no_room_for_one_image_stops():
    with pytest.raises(
        RewardError, match=r"reward 'odd' failed 2 times; the last time: OutOfMemoryError"
    ):
        bridge(full, retries=1).submit(images(), PROMPTS).result()


def test_rewards_see_no_more_images_than_they_may():
    seen = []
    both = bridge(
        lambda x, p: seen.append((len(p), p[0])) or x.float().mean((1, 2, 3)), batch_size=3
    )
    scores = both.submit(images(7), list("abcdefg")).result()
    assert seen == [(3, "a"), (3, "d"), (1, "g")]
    np.testing.assert_array_equal(scores["odd"], scores["bright"])


def test_a_chunk_with_too_few_scores_is_not_filled_up_by_the_next_one():
    counts = iter([2, 4])
    with pytest.raises(RewardError, match=r"'odd' returned shape \(2,\); expected \(3,\)"):
        bridge(lambda x, p: torch.ones(next(counts)), batch_size=3).submit(
            images(6), list("abcdef")
        ).result()


def test_a_failed_batch_is_dropped_where_it_is_still_queued():
    """One reward fails while another is busy: what the busy one has not begun is not scored for nobody."""
    go_on, seen = threading.Event(), []

    def busy(x, prompts):
        assert go_on.wait(20)
        seen.append(prompts[0])
        return torch.zeros(len(prompts))

    both = bridge(lambda x, p: 1 / 0 if p[0] == "bad" else torch.zeros(len(p)), busy=busy)
    first = both.submit(images(1), ["good"])
    bad = [both.submit(images(1), ["bad"]) for _ in range(3)]
    for one in bad:
        with pytest.raises(RewardError, match="reward 'odd' failed"):
            one.result()
    last = both.submit(images(1), ["last"])
    go_on.set()
    assert first.result().keys() == last.result().keys()
    assert seen == ["good", "last"]


def test_a_failure_is_seen_without_waiting():
    go_on = threading.Event()
    both = bridge(lambda x, p: 1 / 0, busy=lambda x, p: go_on.wait(20) and torch.zeros(len(p)))
    pending = both.submit(images(), PROMPTS)
    with pytest.raises(RewardError, match="reward 'odd' failed"):  # noqa: PT012
        while not go_on.wait(0.01):
            pending.raise_if_failed()
    go_on.set()


def test_retries_share_one_deadline():
    calls = []

    def slow(x, prompts):
        calls.append(time.monotonic())
        time.sleep(0.2)
        raise OSError("busy")

    with pytest.raises(RewardError, match=r"'odd' (has not answered for 0\.5 s|failed 3 times)"):
        bridge(slow, deadline=0.5, retries=50).submit(images(), PROMPTS).result()
    time.sleep(0.5)
    assert len(calls) == 3  # and none after the deadline


def test_a_reward_that_exits_is_named():
    with pytest.raises(RewardError, match=r"'odd' failed 1 times; the last time: SystemExit"):
        bridge(lambda x, p: sys.exit(0)).submit(images(), PROMPTS).result()


def test_a_closed_bridge_says_so():
    inside, go_on = threading.Event(), threading.Event()
    both = bridge(lambda x, p: (inside.set(), go_on.wait(20), torch.zeros(len(p)))[-1])
    at_work, queued = (both.submit(images(), PROMPTS, only=["odd"]) for _ in range(2))
    assert inside.wait(20)
    assert both.stuck() == []
    both.close(wait=0)
    with pytest.raises(RewardError, match="the bridge was closed before this batch was scored"):
        queued.result()
    with pytest.raises(RuntimeError, match="the bridge was closed; it scores nothing more"):
        both.submit(images(), PROMPTS)
    go_on.set()
    assert at_work.result()["odd"].tolist() == [0, 0, 0, 0]
    both.close()  # twice does no harm


def test_every_device_has_a_thread_and_rewards_on_one_take_turns(monkeypatch):
    """Two rewards on each of two GPUs, which this test has the CPU stand in for."""
    monkeypatch.setattr("reward_bridge.bridge._Images.on", lambda self, device: self._images)
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
    assert [list(one.result()) for one in pending] == [["a", "b", "c", "d"]] * 3
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
    assert pending.result()["quick"].tolist() == [1, 1, 1, 1]


def test_an_interrupt_while_scores_are_pending_ends_the_process_at_once():
    program = """
        import os, signal, threading, time
        import jax.numpy as jnp
        from reward_bridge.bridge import RewardBridge
        bridge = RewardBridge({"slow": lambda x, p: time.sleep(600)}, {"slow": "cpu"}, deadline=500, retries=0)
        pending = [bridge.submit(jnp.zeros((1, 3, 2, 2), "uint8"), ["x"]) for _ in range(3)]
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        try:
            pending[0].result()
            print("scores were made up")
        except KeyboardInterrupt:
            print("interrupted")
        finally:
            bridge.close(wait=0.5)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


def test_interrupts_at_any_moment_leave_nothing_locked():
    """1000 of them while batches are handed in and waited for, after each of which the bridge must still score."""
    program = """
        import random, signal, time
        import torch
        from reward_bridge.bridge import RewardBridge
        quick = lambda x, p: torch.ones(len(p))
        slow = lambda x, p: time.sleep(0.0002) or quick(x, p)
        bridge = RewardBridge({"quick": quick, "slow": slow}, dict.fromkeys(["quick", "slow"], "cpu"), deadline=60,
                              retries=0)
        images, interrupts = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), 0
        def interrupt(*_):
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, interrupt)
        random.seed(0)
        for _ in range(1000):
            try:
                end = time.monotonic() + 0.05
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 1e-3))
                while time.monotonic() < end:
                    bridge.submit(images, ["x"]).result()
            except KeyboardInterrupt:
                interrupts += 1
            assert list(bridge.submit(images, ["x"]).result()) == ["quick", "slow"]
        print(interrupts > 800)
        bridge.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
