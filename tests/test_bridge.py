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

from reward_bridge.bridge import RewardBridge, RewardError  # noqa: E402

PROMPTS = ["a", "b", "c", "d"]


def images(n=4):
    return jnp.asarray(np.arange(n * 12, dtype=np.uint8).reshape(n, 3, 2, 2))


def brightness(x, prompts):
    return x.float().mean((1, 2, 3))


def bridge(reward, deadline=20.0, retries=0, **more):
    return RewardBridge({"bright": brightness, "odd": reward, **more}, "cpu", deadline=deadline, retries=retries)


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
    bridge(lambda x, p: pointers.append(x.data_ptr()) or torch.zeros(len(p))).submit(array, PROMPTS).result()
    assert pointers == [array.unsafe_buffer_pointer()]


def test_sharded_images_keep_their_order():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    array = jax.device_put(images(8), NamedSharding(mesh, P("data")))
    scores = bridge(brightness).submit(array, PROMPTS * 2).result()
    np.testing.assert_allclose(scores["odd"], np.asarray(images(8)).mean((1, 2, 3)))


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

    assert bridge(flaky, retries=1).submit(images(), PROMPTS).result()["odd"].tolist() == [1, 1, 1, 1]
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x, p: 1 / 0, r"reward 'odd' failed 3 times; the last time: ZeroDivisionError"),
        (lambda x, p: torch.tensor([1.0, float("nan"), 1.0, 1.0]), r"reward 'odd' returned nan for image 1 \('b'\)"),
        (lambda x, p: torch.tensor([1.0, 1.0, 1.0, float("inf")]), r"reward 'odd' returned inf for image 3 \('d'\)"),
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
    pending = bridge(lambda x, p: stop.wait(60), deadline=0.2).submit(images(), PROMPTS)
    clock = time.monotonic()
    with pytest.raises(RewardError, match=r"reward 'odd' has not answered for 0\.2 s \(config\.reward\.deadline\)"):
        pending.result()
    assert time.monotonic() - clock < 10
    stop.set()


def test_a_hanging_reward_does_not_keep_the_process_alive():
    program = """
        import time, jax.numpy as jnp
        from reward_bridge.bridge import RewardBridge
        bridge = RewardBridge({"slow": lambda x, p: time.sleep(600)}, "cpu", deadline=0.2, retries=0)
        bridge.submit(jnp.zeros((1, 3, 2, 2), "uint8"), ["x"]).result()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
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
    assert not [thread for thread in threading.enumerate() if thread is both._thread]


def test_wrong_counts_are_named():
    with pytest.raises(ValueError, match="got 4 images and 3 prompts"):
        bridge(brightness).submit(images(), PROMPTS[:3])
