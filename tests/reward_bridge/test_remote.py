"""Rewards behind HTTP: every server here is a process of its own, and so can be killed."""

import ast
import asyncio
import contextlib
import pickle
import random
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
for module in ("httpx2", "starlette", "tenacity", "uvicorn"):
    pytest.importorskip(module)

import httpx2  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from safetensors.torch import save  # noqa: E402

from reward_bridge.bridge import RewardBridge, RewardError  # noqa: E402
from reward_bridge.client import RemoteReward  # noqa: E402
from reward_bridge.rewards import make_reward  # noqa: E402
from reward_bridge.rewards.embedded import subjects  # noqa: E402
from reward_bridge.server import TOKEN_ENV, Limits, _Batcher, bind  # noqa: E402
from tests.helpers.reward_servers import (  # noqa: E402
    ENV,
    ROOT,
    TOKEN,
    answers,
    end,
    expected,
    health,
    liar,
    make_images,
    payload,
    post,
    raw_request,
    start,
    start_program,
    wait_until,
)


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """All processes, started side by side: three of reward_servers.py, one to be killed, and the script, twice."""
    imports = tmp_path_factory.mktemp("script") / "imports.txt"
    without_token = {key: value for key, value in ENV.items() if key != TOKEN_ENV}
    script = ["scripts/serve_rewards.py", "--config.port=0"]
    with (
        imports.open("w") as file,
        contextlib.ExitStack() as stack,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv(TOKEN_ENV, TOKEN)
        run = SimpleNamespace(
            first=start_program(),
            second=start_program(),
            doomed=start_program(),
            script=start(["-X", "importtime", *script], stderr=file),
            refused=start(
                [*script, "--config.host=0.0.0.0"], stderr=subprocess.PIPE, env=without_token
            ),
        )
        for process in vars(run).values():
            stack.callback(end, process)
        run.a, run.b, run.c = (
            process.stdout.readline().strip() for process in (run.first, run.second, run.doomed)
        )
        run.imports, run.said = imports, ""
        while "\nstop " not in run.said:
            line = run.script.stdout.readline()
            assert line, imports.read_text()[-2000:]
            run.said += line
        run.address = re.search(r"at (http://\S+)", run.said)[1]
        for address in (run.a, run.b, run.c, run.address):
            wait_until(lambda address=address: answers(address))
        yield run


# --- the same scores, and each with its image


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
        batcher = _Batcher("size", bridge, limits, lambda: False)
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
        "reward 'picky' failed 1 times; the last time: ValueError('a bad prompt')"
    )


def test_the_bridge_of_a_run_takes_it_for_a_reward_like_any_other(servers):
    rewards = {
        name: make_reward(name, "cpu", {"servers": [servers.a]}) for name in ("identity", "short")
    }
    bridge = RewardBridge(rewards, dict.fromkeys(rewards, "cpu"), deadline=20, retries=3)
    images, prompts = jnp.asarray(make_images([3, 1, 2]).numpy()), ["x", "y", "z"]
    assert bridge.submit(images, prompts, only=["identity"]).result()[
        "identity"
    ].tolist() == expected([3, 1, 2], "xyz")
    with pytest.raises(
        RewardError,
        match=r"^reward 'short', server http://\S+ answered 500: reward 'short' returned",
    ):
        bridge.submit(images, prompts).result()


# --- what a server does not take


def test_health_needs_no_token(servers):
    answer = httpx2.get(f"{servers.a}/healthz").json()
    assert answer["status"] == "ok"
    assert sorted(answer["rewards"]) == ["identity", "picky", "short", "slow", "together"]
    assert answer["rewards"]["slow"]["device"] == "cpu"
    assert answer["rewards"]["slow"]["waiting"] == 0


@pytest.mark.parametrize("token", ["", "wrong", TOKEN + "x", TOKEN[:-1], "\N{SNOWMAN}"])
def test_a_wrong_token_ends_it_at_once(servers, monkeypatch, token):
    monkeypatch.setenv("ANOTHER_TOKEN", token)
    before = health(servers.a, "identity")["scored"]
    with pytest.raises(
        RewardError,
        match=r"reward 'identity', server http://\S+ answered 401: wrong or missing bearer token; .*_TOKEN$",
    ):
        RemoteReward("identity", [servers.a], token_env="ANOTHER_TOKEN")(make_images([1]), ["x"])
    assert health(servers.a, "identity")["scored"] == before
    assert RemoteReward("identity", [servers.a])(make_images([1]), ["x"]).tolist() == expected(
        [1], "x"
    )


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


GOOD = payload(make_images([1, 2]), ["x", "y"])
IMAGES = make_images([1, 2])
BAD = {
    "nothing": (b"", "not safetensors"),
    "garbage": (random.Random(0).randbytes(5000), "not safetensors"),
    "cut off": (GOOD[:-1], "not safetensors"),
    "longer than it says": (GOOD + b"x", "not safetensors"),
    "header longer than the body": ((2**62).to_bytes(8, "little") + GOOD[8:], "not safetensors"),
    "text": (b'{"images": [1]}', "not safetensors"),
    "no metadata": (save({"images": IMAGES}), "__metadata__"),
    "no prompts": (save({"images": IMAGES}, {"prompt": "[]"}), "'prompts'"),
    "prompts no JSON": (save({"images": IMAGES}, {"prompts": "x"}), "not safetensors"),
    "prompts nested too deep": (
        save({"images": IMAGES}, {"prompts": "[" * 100_000}),
        "RecursionError",
    ),
    "prompts no list": (save({"images": IMAGES}, {"prompts": '"xy"'}), "no JSON list of strings"),
    "prompts no strings": (
        save({"images": IMAGES}, {"prompts": '["x", 1]'}),
        "no JSON list of strings",
    ),
    "too few prompts": (payload(IMAGES, ["x"]), "got 2 images and 1 prompts"),
    "too many prompts": (payload(IMAGES, ["x", "y", "z"]), "got 2 images and 3 prompts"),
    "no images": (payload(IMAGES[:0], []), "nothing to score"),
    "no pixels": (payload(IMAGES[:, :, :, :0], ["x", "y"]), "nothing to score"),
    "floats": (payload(IMAGES.float(), ["x", "y"]), r"'images' torch.float32 \[2, 3, 4, 6\]"),
    "grey": (payload(IMAGES[:, :1].contiguous(), ["x", "y"]), r"\[2, 1, 4, 6\]"),
    "one image alone": (payload(IMAGES[0].contiguous(), ["x"]), r"\[3, 4, 6\]"),
    "another tensor": (save({"pixels": IMAGES}, {"prompts": '["x", "y"]'}), "'pixels'"),
    "two tensors": (
        save({"images": IMAGES, "more": IMAGES.clone()}, {"prompts": '["x", "y"]'}),
        "'more'",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_body_that_is_no_batch_is_refused(servers, case):
    body, message = BAD[case]
    answer = post(servers.a, body)
    assert answer.status_code == 400
    assert re.search(message, answer.json()["error"])
    assert post(servers.a, GOOD).json()["scores"] == expected([1, 2], "xy")


def test_pickle_is_refused_and_not_run(servers, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    for body in (
        bomb,
        payload(IMAGES, ["x", "y"])[:8] + bomb,
        save({"images": IMAGES}, {"prompts": repr(bomb)}),
    ):
        answer = post(servers.a, body)
        assert answer.status_code == 400
        assert "pickle" in answer.json()["error"]
    assert not (tmp_path / "ran").exists()
    pickle.loads(bomb)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("file", ["server", "client"])
def test_the_code_has_no_pickle_and_no_eval(file):
    tree = ast.parse((ROOT / "reward_bridge" / f"{file}.py").read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert not names & {
        "pickle",
        "eval",
        "exec",
        "marshal",
        "joblib",
        "cloudpickle",
        "numpy.load",
        "torch.load",
    }
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"torch.load", "np.load"}


def test_an_unknown_reward_is_answered_with_the_known_ones(servers):
    with pytest.raises(
        RewardError,
        match="answered 404: there is no reward 'nice' here; this server has identity, pi",
    ):
        RemoteReward("nice", [servers.a])(make_images([1]), ["x"])
    assert httpx2.get(f"{servers.a}/score/identity").status_code == 405
    assert "error" in httpx2.get(f"{servers.a}/elsewhere").json()


def test_too_large_a_request_is_refused(servers):
    with pytest.raises(
        RewardError,
        match=r"answered 413: the body is over this server's limit of 1 MiB.*limits.body_mib$",
    ):
        RemoteReward("identity", [servers.a])(make_images([1] * 2, 500, 400), ["x"] * 2)
    with pytest.raises(
        RewardError,
        match=r"answered 413: got 33 images, this server takes 32 at once.*limits.images$",
    ):
        RemoteReward("identity", [servers.a])(make_images([1] * 33), ["x"] * 33)


def test_a_body_without_an_end_is_cut_off_at_the_limit(servers):
    with raw_request(servers.a, "Transfer-Encoding: chunked") as connection:
        chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        answer = b""
        for _ in range(1000):
            connection.sendall(chunk)
            connection.settimeout(0.02)
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(4096)
                break
        assert answer.startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_arrive_is_given_up(servers):
    with raw_request(servers.a, f"Content-Length: {len(GOOD)}") as connection:
        connection.sendall(GOOD[:20])
        connection.settimeout(10)
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


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
        assert "requests of 4 MiB are at work, of at most 4 MiB" in answer.json()["error"]
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


# --- what a client does about a bad server


LIES = {
    "too few": (
        b'{"scores": [1.0]}',
        r"answered \[1\] scores, 0 of them not finite; expected 2 finite numbers",
    ),
    "too many": (b'{"scores": [1.0, 2.0, 3.0]}', r"answered \[3\] scores"),
    "nested": (b'{"scores": [[1.0, 2.0]]}', r"answered \[1, 2\] scores"),
    "not a number": (b'{"scores": [1.0, NaN]}', r"1 of them not finite"),
    "beyond float32": (b'{"scores": [1.0, 1e39]}', r"1 of them not finite|no list of scores"),
    "no numbers": (b'{"scores": ["a", "b"]}', r"no list of scores"),
    "no scores": (b'{"score": [1.0, 2.0]}', r"no list of scores \(KeyError"),
    "a list": (b"[1.0, 2.0]", r"no list of scores"),
    "no JSON": (b"<html>", r"no list of scores \(JSONDecodeError"),
}


@pytest.mark.parametrize("case", list(LIES))
def test_an_answer_that_is_no_scores_is_never_used(case):
    body, message = LIES[case]
    with liar((200, body)) as server:
        reward = RemoteReward("bright", [server.address], attempts=1)
        with pytest.raises(
            RewardError,
            match=rf"reward 'bright', server {server.address}.*{message}.*after 1 attempts",
        ):
            reward(IMAGES, ["x", "y"])


def test_attempts_are_bounded_and_go_round_the_servers():
    with liar((200, b'{"scores": [1.0, 2.0]}')) as one, liar((503, b'{"error": "full"}')) as other:
        with pytest.raises(RewardError, match="given up after 3 attempts"):
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
        RewardError, match=rf"server {address}: ConnectError .*given up after 1 attempts"
    ):
        RemoteReward("bright", [address], attempts=1)(IMAGES, ["x", "y"])


# --- servers that end


def test_a_server_killed_in_mid_batch_and_restarted_answers_in_the_end(servers):
    numbers, prompts = [11, 12, 13], ["3", "x", "y"]
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(RemoteReward("slow", [servers.c]), make_images(numbers), prompts)
        assert servers.doomed.stdout.readline() == "at work\n"
        servers.doomed.kill()
        servers.doomed.wait()
        restarted = start_program(httpx2.URL(servers.c).port)
        try:
            assert pending.result(timeout=60).tolist() == expected(numbers, prompts)
            stops_gracefully(restarted, servers.c)
        finally:
            end(restarted)


def stops_gracefully(process: subprocess.Popen, address: str) -> None:
    """On SIGTERM the batch at work ends well, what waits gets 503, nobody new gets in."""
    assert process.stdout.readline().startswith("http")
    assert process.stdout.readline() == "at work\n"
    with ThreadPoolExecutor(2) as pool:
        at_work = pool.submit(post, address, payload(make_images([1]), ["20"]), "slow")
        assert process.stdout.readline() == "at work\n"
        waits = pool.submit(post, address, payload(make_images([2]), ["0"]), "slow")
        wait_until(lambda: health(address, "slow")["waiting"] == 1)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: not answers(address))
        assert not at_work.done()
        assert at_work.result().json()["scores"] == expected([1], ["20"])
        assert waits.result().status_code == 503
        assert waits.result().json() == {"error": "the server is stopping; ask again later"}
    assert process.wait(20) == -signal.SIGTERM


def test_the_script_says_what_it_does_and_never_imports_jax(servers):
    assert re.search(
        r"serving 4 rewards at http://127\.0\.0\.1:\d+\n  embedded_detector +on \S+\n", servers.said
    )
    assert f"token      the one in {TOKEN_ENV}" in servers.said
    assert TOKEN not in servers.said
    assert f"curl {servers.address}/healthz" in servers.said
    images = make_images([1], 64, 64)
    RemoteReward("clip_score", [servers.address])(images, ["a photo"])
    modules = set(re.findall(r"\|\s+(\S+)$", servers.imports.read_text(), re.M))
    assert {"torch", "reward_bridge.server"} <= modules
    assert not [name for name in modules if name.split(".")[0] in ("jax", "jaxlib")]


def test_an_open_address_needs_a_token(servers):
    _, said = servers.refused.communicate(timeout=30)
    assert servers.refused.returncode == 1
    assert re.fullmatch(
        rf"error: 0\.0\.0\.0 can be reached from other machines, .*{TOKEN_ENV}.*\n", said
    )
    for host in ("0.0.0.0", "::", "", "192.168.0.1", "example.org"):
        with pytest.raises(ValueError, match="a token is needed"):
            bind(host, 0, "")
    bind("127.0.0.1", 0, "").close()
    bind("localhost", 0, "").close()
    bind("0.0.0.0", 0, TOKEN).close()


def test_a_taken_port_is_named():
    with bind("127.0.0.1", 0, "") as taken:
        taken.listen()
        with pytest.raises(
            OSError, match=r"cannot listen on 127\.0\.0\.1:\d+: .* in use; choose another port"
        ):
            bind("127.0.0.1", taken.getsockname()[1], "")


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
            ValueError, match=r"would ever fit into limits\.waiting=4, limits\.held_mib=1"
        ):
            Limits(**{**good, **wrong})


@pytest.mark.parametrize(
    "servers", ["http://a:1", [], ["a:1"], ["ftp://a"], ["http://"], ["http://a:1", 5]]
)
def test_addresses_are_checked_when_the_reward_is_made(servers):
    with pytest.raises(
        ValueError, match=r"reward 'bright': got servers .*; expected a list such as"
    ):
        RemoteReward("bright", servers)
