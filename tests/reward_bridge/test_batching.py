"""Requests are joined into batches, and each gets its own scores."""

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from reward_bridge.batching import Batcher, Limits
from reward_bridge.bridge import RewardBridge
from reward_bridge.client import RemoteReward
from reward_bridge.reward import RewardError
from tests.helpers.reward_servers import (
    GOOD,
    expected,
    health,
    make_images,
    payload,
    post,
    raw_request,
    wait_until,
)


def test_requests_that_meet_are_scored_together(servers):
    reward = RemoteReward("together", [servers.a])
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(
                lambda n: reward(make_images(range(n)), ["x"] * n).tolist(),
                [1, 2, 3, 1, 2, 3, 1, 2],
            )
        )
    assert [len(scores) for scores in found] == [1, 2, 3, 1, 2, 3, 1, 2]
    assert max(map(max, found)) > 3  # more than any request held
    assert max(map(max, found)) <= 16


def test_what_is_joined_has_one_size_and_fits_into_a_batch():
    def size_of_batch(images, prompts):
        return torch.full((len(prompts),), float(len(prompts)))

    async def score(requests):
        limits = Limits(body_mib=1, held_mib=1, images=9, waiting=99, batch=5, gather=0.1, upload=1)
        batcher = Batcher("size", bridge, limits, lambda: False)
        task, found = asyncio.create_task(batcher.run()), []
        for n, width in requests:
            found.append(batcher.add(make_images(range(n), width=width), ["x"] * n))
            await asyncio.sleep(0.005)  # after the first, which is to wait for the others
        scores = [set((await one).tolist()) for one in found]
        batcher.stop()
        await task
        return scores

    bridge = RewardBridge({"size": size_of_batch}, {"size": "cpu"}, deadline=20, retries=0)
    # 2 and 1 of a size and, past one that does not fit any more, another 2; then what was left
    assert asyncio.run(score([(2, 4), (3, 8), (1, 4), (4, 4), (2, 4), (7, 4)])) == [
        {5},
        {3},
        {5},
        {4},
        {5},
        {7},
    ]
    bridge.close()


def test_a_bad_request_does_not_fail_those_it_is_batched_with(servers):
    def ask(prompt: str):
        try:
            return RemoteReward("picky", [servers.a])(make_images([7]), [prompt]).tolist()
        except RewardError as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, ["a", "b", "bad", "c", "d", "e"]))
    assert [found[i] for i in (0, 1, 3, 4, 5)] == [expected([7], [p]) for p in "abcde"]
    assert found[2] == (
        f"reward 'picky', server {servers.a} answered 500: "
        "reward 'picky' failed 1 times; the last error: ValueError('a bad prompt')"
    )


def test_bodies_in_flight_are_bounded_together(servers):
    with contextlib.ExitStack() as stack:
        for _ in range(4):  # each may still become 1 MiB, of 4 MiB in all
            stack.enter_context(raw_request(servers.b, "Transfer-Encoding: chunked")).sendall(
                b"1\r\nx\r\n"
            )
        replies = []
        wait_until(lambda: replies.append(post(servers.b, GOOD)) or replies[-1].status_code == 503)
        answer = replies[-1]
        assert answer.headers["Retry-After"] == "1"
        assert "requests of 4 MiB are in progress, of at most 4 MiB" in answer.json()["error"]
    wait_until(lambda: post(servers.b, GOOD).status_code == 200)


def test_a_full_queue_is_answered_with_503_and_asked_again(servers):
    with ThreadPoolExecutor(4) as pool:
        busy = pool.submit(post, servers.a, payload(make_images([1]), ["15"]), "slow")
        assert servers.first.stdout.readline() == "at work\n"
        waiting = pool.submit(post, servers.a, payload(make_images([1] * 32), ["0"] * 32), "slow")
        wait_until(lambda: health(servers.a, "slow")["waiting"] == 32)
        answer = post(servers.a, payload(make_images([1] * 17), ["0"] * 17), "slow")
        assert answer.status_code == 503
        assert answer.json()["error"] == "32 images wait for slow, of at most 48; ask again later"
        patient = RemoteReward("slow", [servers.a])(make_images([5] * 17), ["0"] * 17)
        assert patient.tolist() == expected([5] * 17, ["0"] * 17)
        assert [busy.result().status_code, waiting.result().status_code] == [200, 200]
    for _ in range(2):
        servers.first.stdout.readline()


def test_limits_that_let_nothing_through_are_refused():
    good = {
        "body_mib": 1,
        "held_mib": 1,
        "images": 4,
        "waiting": 4,
        "batch": 4,
        "gather": 0.0,
        "upload": 1.0,
    }
    Limits(**good)
    for wrong in ({"images": 5}, {"body_mib": 2}):
        with pytest.raises(
            ValueError, match=r"would never fit into limits\.waiting=4 and limits\.held_mib=1"
        ):
            Limits(**{**good, **wrong})
