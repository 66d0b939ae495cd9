"""Remote rewards: the same scores in the same order, and what is done about a bad server."""

import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import pytest
import torch

from reward_bridge.bridge import RewardBridge
from reward_bridge.client import RemoteReward
from reward_bridge.reward import RewardError
from reward_bridge.rewards import make_reward
from reward_bridge.rewards.embedded import subjects
from tests.helpers.reward_servers import (
    IMAGES,
    expected,
    health,
    liar,
    make_images,
    payload,
)


def test_the_script_serves_the_scores_of_this_process(servers):
    images = torch.randint(0, 256, (13, 3, 64, 64), dtype=torch.uint8)
    prompts = [f"a photo of {subjects()[i % 3]}" for i in range(13)]
    for name in ("embedded_detector", "embedded_held_out", "embedded_prompt_accuracy"):
        with torch.inference_mode():
            wanted = make_reward(name, "cpu", {})(images, prompts)
        for addresses in (
            [servers.address],
            [servers.address] * 4,
        ):  # as one batch, and in uneven slices
            scores = make_reward(name, "cpu", {"servers": addresses})(images, prompts)
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 31])
def test_an_uneven_batch_keeps_its_order(servers, n):
    numbers = random.sample(range(65536), n)
    prompts = [f"prompt {number}" for number in numbers]
    for addresses in ([servers.a], [servers.a, servers.b], [servers.a, servers.b, servers.a]):
        scores = RemoteReward("identity", addresses)(make_images(numbers), prompts)
        assert scores.tolist() == expected(numbers, prompts)


def test_a_batch_is_spread_over_the_servers(servers):
    before = [health(address, "identity")["scored"] for address in (servers.a, servers.b)]
    RemoteReward("identity", [servers.a, servers.b])(make_images(range(9)), ["x"] * 9)
    after = [health(address, "identity")["scored"] for address in (servers.a, servers.b)]
    assert sorted([after[0] - before[0], after[1] - before[1]]) == [4, 5]


def test_single_images_are_spread_too():
    good = (200, b'{"scores": [1.0]}')
    with liar(good) as one, liar(good) as other:
        reward = RemoteReward("bright", [one.address, other.address])
        for _ in range(30):
            reward(IMAGES[:1], ["x"])
        assert len(one.seen) + len(other.seen) == 30
        assert one.seen
        assert other.seen


def test_eight_clients_and_500_requests_lose_and_mix_up_nothing(servers):
    jobs = iter(range(500))
    lock, right, per_batch = threading.Lock(), [], []

    def client(seed: int) -> None:
        draw = random.Random(seed)
        reward = RemoteReward("identity", [servers.a] if seed % 2 else [servers.a, servers.b])
        while True:
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            numbers = [draw.randrange(65536) for _ in range(draw.randint(1, 6))]
            prompts = [f"job {job}, {draw.random()}" for _ in numbers]
            scores = reward(make_images(numbers, *draw.choice([(4, 6), (8, 8)])), prompts)
            right.append(scores.tolist() == expected(numbers, prompts))
            per_batch.append(len(numbers))

    before = [health(address, "identity")["scored"] for address in (servers.a, servers.b)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(client, range(8)))
    after = [health(address, "identity")["scored"] for address in (servers.a, servers.b)]
    assert len(right) == 500
    assert all(right)
    assert sum(after) - sum(before) == sum(per_batch)  # each image once


def test_the_bridge_of_a_run_takes_it_for_a_reward_like_any_other(servers):
    rewards = {
        name: make_reward(name, "cpu", {"servers": [servers.a]}) for name in ("identity", "short")
    }
    bridge = RewardBridge(rewards, dict.fromkeys(rewards, "cpu"), deadline=20, retries=3)
    images, prompts = jnp.asarray(make_images([3, 1, 2]).numpy()), ["x", "y", "z"]
    assert bridge.submit(images, prompts, only=["identity"]).result().rewards[
        "identity"
    ].tolist() == expected([3, 1, 2], "xyz")
    with pytest.raises(
        RewardError,
        match=r"^reward 'short', server http://\S+ answered 500: reward 'short' returned",
    ):
        bridge.submit(images, prompts).result()


LIES = {
    "too few": (
        b'{"scores": [1.0]}',
        r"answered \[1\] scores, 0 of them not finite; expected 2 finite numbers",
    ),
    "too many": (b'{"scores": [1.0, 2.0, 3.0]}', r"answered \[3\] scores"),
    "nested": (b'{"scores": [[1.0, 2.0]]}', r"answered \[1, 2\] scores"),
    "not a number": (b'{"scores": [1.0, NaN]}', r"1 of them not finite"),
    "beyond float32": (b'{"scores": [1.0, 1e39]}', r"1 of them not finite|has no list of scores"),
    "no numbers": (b'{"scores": ["a", "b"]}', r"has no list of scores"),
    "no scores": (b'{"score": [1.0, 2.0]}', r"has no list of scores \(KeyError"),
    "a list": (b"[1.0, 2.0]", r"has no list of scores"),
    "no JSON": (b"<html>", r"has no list of scores \(JSONDecodeError"),
}


@pytest.mark.parametrize("case", list(LIES))
def test_an_answer_that_is_no_scores_is_never_used(case):
    body, message = LIES[case]
    with liar((200, body)) as server:
        reward = RemoteReward("bright", [server.address], attempts=1)
        with pytest.raises(
            RewardError,
            match=rf"reward 'bright', server {server.address}.*{message}.*gave up after 1 attempts",
        ):
            reward(IMAGES, ["x", "y"])


def test_attempts_are_bounded_and_go_round_the_servers():
    with liar((200, b'{"scores": [1.0, 2.0]}')) as one, liar((503, b'{"error": "full"}')) as other:
        with pytest.raises(RewardError, match="gave up after 3 attempts"):
            RemoteReward("bright", [one.address, other.address], attempts=3)(IMAGES[:1], ["x"])
        assert sorted([len(one.seen), len(other.seen)]) == [1, 2]


def test_the_slice_of_a_bad_server_goes_to_the_next_and_the_bad_one_rests(servers):
    numbers, prompts = [9, 8, 7, 6, 5], list("abcde")
    with liar((200, b'{"scores": [1.0]}')) as bad:
        reward = RemoteReward("identity", [bad.address, servers.a])
        for _ in range(3):
            assert reward(make_images(numbers), prompts).tolist() == expected(numbers, prompts)
        assert len(bad.seen) == 1


def test_trouble_that_passes_is_waited_out():
    good = (200, b'{"scores": [1.0, 2.0]}')
    with liar((503, b'{"error": "full"}'), good) as server:
        clock = time.monotonic()
        assert RemoteReward("bright", [server.address])(IMAGES, ["x", "y"]).tolist() == [1, 2]
        assert 0.5 <= time.monotonic() - clock < 3
        assert len(server.seen) == 2
        assert server.seen[0] == server.seen[1] == payload(IMAGES, ["x", "y"])


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 302])
def test_what_no_repetition_mends_is_not_repeated(status):
    with liar((status, b'{"error": "because"}')) as server:
        with pytest.raises(RewardError, match=f"answered {status}: because$"):
            RemoteReward("bright", [server.address, server.address + "/"])(IMAGES[:1], ["x"])
        assert len(server.seen) == 1


def test_a_reward_that_fails_is_tried_once_on_every_server(servers):
    with liar((500, b'{"error": "no memory"}')) as broken, liar((500, b"oh")) as other:
        assert RemoteReward("identity", [broken.address, servers.a])(
            make_images([4, 5]), ["x", "y"]
        ).tolist() == expected([4, 5], "xy")
        broken.seen.clear()
        with pytest.raises(RewardError, match=r"answered 500: (no memory|oh)$"):
            RemoteReward("bright", [broken.address, other.address])(IMAGES[:1], ["x"])
        assert len(broken.seen) == len(other.seen) == 1


def test_a_server_that_hangs_gets_its_share_of_the_deadline(servers):
    with liar(60.0) as hanging:
        reward = RemoteReward("identity", [hanging.address, servers.a], deadline=3)
        for _ in range(2):
            assert reward(make_images([4, 5]), ["x", "y"]).tolist() == expected([4, 5], "xy")
        assert len(hanging.seen) == 1


def test_the_deadline_ends_it_and_the_server_drops_what_nobody_waits_for(servers):
    before = health(servers.a, "slow")["scored"]
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(RemoteReward("slow", [servers.a]), make_images([1]), ["10"])
        assert servers.first.stdout.readline() == "at work\n"
        with pytest.raises(
            RewardError,
            match=r"'slow' has no scores after 0\.4 s \(config\.reward\.options\.slow\.dead",
        ):
            RemoteReward("slow", [servers.a], deadline=0.4)(make_images([2] * 3), ["0"] * 3)
        assert busy.result().tolist() == expected([1], ["10"])
    RemoteReward("slow", [servers.a])(
        make_images([1]), ["0"]
    )  # had those three still waited, they would be done now
    assert health(servers.a, "slow")["scored"] == before + 2
    servers.first.stdout.readline()


def test_a_server_that_is_not_there_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(
        RewardError, match=rf"server {address}: ConnectError .*gave up after 1 attempts"
    ):
        RemoteReward("bright", [address], attempts=1)(IMAGES, ["x", "y"])


@pytest.mark.parametrize(
    "servers", ["http://a:1", [], ["a:1"], ["ftp://a"], ["http://"], ["http://a:1", 5]]
)
def test_addresses_are_checked_when_the_reward_is_made(servers):
    with pytest.raises(
        ValueError, match=r"reward 'bright': got servers .*; expected a list such as"
    ):
        RemoteReward("bright", servers)
