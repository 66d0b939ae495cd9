"""Remote rewards: the same scores in the same order, and what is done about a bad server."""

import json
import logging
import random
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import jax.numpy as jnp
import pytest
import torch
from tenacity import wait_fixed

from reward_bridge.bridge import RewardBridge
from reward_bridge.client import RemoteReward
from reward_bridge.reward import RewardError
from reward_bridge.rewards import make_reward
from reward_bridge.rewards.embedded import subjects
from tests.helpers.faults import dead_proxy, lying_server
from tests.helpers.reward_servers import (
    GOOD,
    IMAGES,
    TOKEN,
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


def scores_of(count):
    """What an honest server answers for one image or more of the same score."""
    return json.dumps({"scores": [1.0] * count, "digest": "d"}).encode()


MORE_LIES = {
    "half an answer": (
        (200, {"Content-Length": "99", "Connection": "close"}, scores_of(2)),
        "RemoteProtocolError",
    ),
    "text that is called JSON": (
        (200, {"Content-Type": "application/json"}, b"all is well"),
        r"no list of scores \(JSONDecodeError",
    ),
    "not the compression that it says": (
        (200, {"Content-Encoding": "gzip"}, scores_of(2)),
        "DecodingError",
    ),
    "bytes that are no text": ((200, {}, b"\xff\xfe\x00"), "no list of scores"),
    "a list in a list in a list": ((200, {}, b"[" * 100_000), "no list of scores"),
    "infinite": ((200, {}, b'{"scores": [1.0, Infinity]}'), "1 of them not finite"),
    "null": ((200, {}, b'{"scores": [1.0, null]}'), "no list of scores"),
    "for another request": (
        (200, {}, b'{"scores": [1.0, 2.0], "x-request-id": "yesterday"}'),
        "the answer is for another request",
    ),
}


@pytest.mark.parametrize("case", list(MORE_LIES))
def test_a_server_that_lies_is_named(case):
    answer, message = MORE_LIES[case]
    with lying_server(lambda path, body: answer) as address:
        reward = RemoteReward("bright", [address], attempts=1)
        with pytest.raises(RewardError, match=rf"^reward 'bright', server {address}.*{message}"):
            reward(IMAGES, ["x", "y"])


def test_the_server_repeats_the_requests_id(servers):
    headers = {"Authorization": f"Bearer {TOKEN}", "X-Request-Id": "seven"}
    answer = httpx2.post(f"{servers.a}/score/identity", content=GOOD, headers=headers)
    assert answer.json()["x-request-id"] == "seven"


# -- A server that goes and comes back


def lines_of(caplog):
    return [record.getMessage() for record in caplog.records]


@pytest.fixture
def quick(monkeypatch):
    """Let clients try again after a tenth of a second."""
    monkeypatch.setattr("reward_bridge.client.wait_exponential_jitter", lambda **_: wait_fixed(0.1))
    return monkeypatch


@pytest.mark.usefixtures("quick")
def test_a_server_that_goes_and_comes_back_is_told_twice(caplog):
    """Whatever the number of calls, and of rewards on it."""
    caplog.set_level(logging.INFO, "reward_bridge")

    def answer(path, body):
        return 200, {}, scores_of(2)

    with lying_server(answer) as address:
        rewards = [RemoteReward(name, [address], attempts=2) for name in ("bright", "sharp")]
        for reward in rewards:
            reward(IMAGES, ["x", "y"])
    assert not lines_of(caplog)
    for reward in rewards:
        with pytest.raises(RewardError, match="gave up after 2 attempts"):
            reward(IMAGES, ["x", "y"])
    with lying_server(answer, int(address.split(":")[2])):
        for reward in rewards:
            reward(IMAGES, ["x", "y"])

    lost, back = lines_of(caplog)
    assert lost.startswith(f"lost reward server {address}: ConnectError ")
    assert lost.endswith("; it is asked up to 2 times, for 100 s at most")
    assert re.fullmatch(rf"reward server {address} is back after \d s", back)


def test_other_servers_score_while_one_is_away(servers, caplog):
    with lying_server(lambda path, body: (200, {}, b"")) as away:
        pass
    reward = RemoteReward("identity", [away, servers.a])
    for _ in range(2):
        assert reward(make_images([4, 5]), ["x", "y"]).tolist() == expected([4, 5], "xy")
    (line,) = lines_of(caplog)
    assert line.startswith(f"lost reward server {away}: ConnectError ")
    assert line.endswith("; the other servers score meanwhile")


def test_a_reward_that_fails_on_a_server_is_told(servers, caplog):
    failing = lambda path, body: (500, {}, b'{"error": "no memory"}')  # noqa: E731
    with lying_server(failing) as address:
        RemoteReward("identity", [address, servers.a])(make_images([4, 5]), ["x", "y"])
    (line,) = lines_of(caplog)
    start = f"lost reward 'identity' on server {address}: answered 500: no memory; the other"
    assert line.startswith(start)


def test_a_busy_server_is_told_only_if_it_stays_so(caplog, quick):
    answers = [(503, {}, b'{"error": "full"}')] * 2 + [(200, {}, scores_of(2))]
    with lying_server(lambda path, body: answers.pop(0)) as address:
        RemoteReward("bright", [address])(IMAGES, ["x", "y"])
        assert not lines_of(caplog)
        quick.setattr("reward_bridge.outage.PATIENCE", 0.05)
        answers += [(503, {}, b'{"error": "full"}')] * 2 + [(200, {}, scores_of(2))]
        RemoteReward("bright", [address])(IMAGES, ["x", "y"])
    (line,) = lines_of(caplog)
    assert line.startswith(f"lost reward 'bright' on server {address}: answered 503: full; it is")


def test_a_server_that_hangs_is_told_before_the_deadline(caplog):
    with liar(60.0) as hanging, pytest.raises(RewardError, match=r"no scores after 0\.4 s"):
        RemoteReward("bright", [hanging.address], deadline=0.4)(IMAGES, ["x", "y"])
    (line,) = lines_of(caplog)
    assert line.startswith(f"lost reward 'bright' on server {hanging.address}: no answer for 0.2 s")


# -- Before anything is loaded


def test_a_wrong_token_and_a_missing_reward_are_found(servers, monkeypatch):
    RemoteReward("identity", [servers.a, servers.b]).check_connection()
    with pytest.raises(RewardError, match=r"answered 404: there is no reward 'nice'; this server"):
        RemoteReward("nice", [servers.a]).check_connection()
    monkeypatch.setenv("OTHER_TOKEN", "wrong")
    with pytest.raises(RewardError, match="answered 401: wrong or missing bearer token"):
        RemoteReward("identity", [servers.a], token_env="OTHER_TOKEN").check_connection()


def test_a_run_needs_one_of_its_servers(servers, caplog):
    with lying_server(lambda path, body: (200, {}, b"")) as away:
        pass
    RemoteReward("identity", [away, servers.a]).check_connection()
    (line,) = lines_of(caplog)
    assert line.startswith(f"lost reward server {away}: ConnectError ")
    with pytest.raises(RewardError, match=rf"{away}: ConnectError .*; start the servers first"):
        RemoteReward("identity", [away]).check_connection()


@pytest.mark.parametrize("status", [405, 501, 503])
def test_a_server_that_does_not_know_the_question_is_asked_later(status):
    with lying_server(lambda path, body: (status, {}, b"")) as address:
        RemoteReward("bright", [address]).check_connection()


def test_a_server_on_this_machine_is_asked_without_the_proxy(servers):
    with dead_proxy():
        reward = RemoteReward("identity", [servers.a, "https://example.invalid"])
        assert reward(make_images([4, 5]), ["x", "y"]).tolist() == expected([4, 5], "xy")
