"""Rewards that fail, hang or exit; closing the bridge; interrupts."""

import queue
import subprocess
import sys
import textwrap
import threading
import time
from unittest.mock import Mock

import pytest
import torch

from reward_bridge.bridge import PendingScores
from reward_bridge.reward import RewardError
from tests.helpers.bridges import PROMPTS, bridge, images


def test_a_reward_that_fails_once_is_tried_again():
    calls = []

    def flaky(x, prompts):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("busy")
        return torch.ones(len(prompts))

    assert bridge(flaky, retries=1).submit(images(), PROMPTS).result().rewards["odd"].tolist() == [
        1,
        1,
        1,
        1,
    ]
    assert len(calls) == 2


class AnswersLater:
    """An answer that is None at the first `reads` looks, then an error."""

    def __init__(self, reads):
        self.reads = reads

    @property
    def outcome(self):
        self.reads -= 1
        return None if self.reads >= 0 else RewardError("the reward failed")


@pytest.mark.parametrize("reads", range(5))
def test_an_error_is_raised_at_whatever_moment_it_comes(reads):
    lane = Mock()
    done = queue.SimpleQueue()
    for _ in range(9):
        done.put(None)
    pending = PendingScores({lane: AnswersLater(reads)}, done, ["odd"])
    with pytest.raises(RewardError, match="the reward failed"):
        pending.result()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x, p: 1 / 0, r"reward 'odd' failed 3 times; the last error: ZeroDivisionError"),
        (
            lambda x, p: torch.tensor([1.0, float("nan"), 1.0, 1.0]),
            r"reward 'odd' returned nan for image 1 \('b'\)",
        ),
        (
            lambda x, p: torch.tensor([1.0, 1.0, 1.0, float("inf")]),
            r"reward 'odd' returned inf for image 3 \('d'\)",
        ),
        (lambda x, p: None, r"reward 'odd' failed 3 times; the last error: "),
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
    assert both.submit(images(), PROMPTS).result().rewards["odd"].tolist() == [0, 0, 0, 0]


def test_a_reward_that_hangs_is_named_at_its_deadline():
    stop = threading.Event()
    both = bridge(lambda x, p: stop.wait(60), deadline=0.2)
    pending = both.submit(images(), PROMPTS)
    clock = time.monotonic()
    with pytest.raises(
        RewardError, match=r"reward 'odd' did not answer within 0\.2 s \(config\.reward\.deadline\)"
    ):
        pending.result()
    assert time.monotonic() - clock < 10
    assert both.stuck() == ["odd"]
    stop.set()


def test_a_hanging_reward_does_not_keep_the_process_alive():
    program = """
        import time, jax.numpy as jnp
        from reward_bridge.bridge import RewardBridge
        slow = {"slow": lambda x, p: time.sleep(600)}
        bridge = RewardBridge(slow, {"slow": "cpu"}, deadline=0.2, retries=0)
        bridge.submit(jnp.zeros((1, 3, 2, 2), "uint8"), ["x"]).result()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "RewardError: reward 'slow' did not answer within" in done.stderr


def test_a_failed_batch_is_dropped_where_it_is_still_queued():
    """One reward fails while another is busy: the busy one skips the failed batch."""
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
    assert first.result().rewards.keys() == last.result().rewards.keys()
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

    with pytest.raises(RewardError, match=r"'odd' (did not answer within 0\.5 s|failed 3 times)"):
        bridge(slow, deadline=0.5, retries=50).submit(images(), PROMPTS).result()
    time.sleep(0.5)
    assert len(calls) == 3  # and none after the deadline


def test_a_reward_that_exits_is_named():
    with pytest.raises(RewardError, match=r"'odd' failed 1 times; the last error: SystemExit"):
        bridge(lambda x, p: sys.exit(0)).submit(images(), PROMPTS).result()


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
    assert not [lane for lane in both._lanes if lane.thread.is_alive()]


def test_a_closed_bridge_says_so():
    inside, go_on = threading.Event(), threading.Event()
    both = bridge(lambda x, p: (inside.set(), go_on.wait(20), torch.zeros(len(p)))[-1])
    at_work, queued = (both.submit(images(), PROMPTS, only=["odd"]) for _ in range(2))
    assert inside.wait(20)
    assert both.stuck() == []
    both.close(wait=0)
    with pytest.raises(RewardError, match="the bridge was closed before this batch was scored"):
        queued.result()
    with pytest.raises(RuntimeError, match="the bridge is closed and scores nothing more"):
        both.submit(images(), PROMPTS)
    go_on.set()
    assert at_work.result().rewards["odd"].tolist() == [0, 0, 0, 0]
    both.close()  # twice does no harm


def test_an_interrupt_while_scores_are_pending_ends_the_process_at_once():
    program = """
        import os, signal, threading, time
        import jax.numpy as jnp
        from reward_bridge.bridge import RewardBridge
        slow = {"slow": lambda x, p: time.sleep(600)}
        bridge = RewardBridge(slow, {"slow": "cpu"}, deadline=500, retries=0)
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
    """1000 interrupts while batches are submitted and awaited; the bridge scores after each."""
    program = """
        import random, signal, time
        import torch
        from reward_bridge.bridge import RewardBridge
        quick = lambda x, p: torch.ones(len(p))
        slow = lambda x, p: time.sleep(0.0002) or quick(x, p)
        rewards = {"quick": quick, "slow": slow}
        bridge = RewardBridge(rewards, dict.fromkeys(rewards, "cpu"), deadline=60, retries=0)
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
            assert list(bridge.submit(images, ["x"]).result().rewards) == ["quick", "slow"]
        print(interrupts > 800)
        bridge.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
