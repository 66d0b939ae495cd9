"""What a server accepts, how it starts and how it ends. Servers are processes of their own."""

import contextlib
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from reward_bridge.client import RemoteReward
from reward_bridge.reward import RewardError
from reward_bridge.server import TOKEN_ENV, bind
from tests.helpers.reward_servers import (
    GOOD,
    TOKEN,
    answers,
    end,
    expected,
    health,
    make_images,
    payload,
    post,
    raw_request,
    start_program,
    wait_until,
)


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
        match=r"reward 'identity', server http://\S+ answered 401: wrong or missing bearer token; "
        r"use the token in the server's .*_TOKEN$",
    ):
        RemoteReward("identity", [servers.a], token_env="ANOTHER_TOKEN")(make_images([1]), ["x"])
    assert health(servers.a, "identity")["scored"] == before
    assert RemoteReward("identity", [servers.a])(make_images([1]), ["x"]).tolist() == expected(
        [1], "x"
    )


def test_an_unknown_reward_is_answered_with_the_known_ones(servers):
    with pytest.raises(
        RewardError,
        match="answered 404: there is no reward 'nice'; this server has identity, pi",
    ):
        RemoteReward("nice", [servers.a])(make_images([1]), ["x"])
    assert httpx2.get(f"{servers.a}/score/identity").status_code == 405
    assert "error" in httpx2.get(f"{servers.a}/elsewhere").json()


def test_a_client_can_ask_whether_a_reward_is_there(servers):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    told = httpx2.get(f"{servers.a}/rewards/identity", headers=headers).json()
    assert told == {"digest": "digest of identity"}
    assert httpx2.get(f"{servers.a}/rewards/nice", headers=headers).status_code == 404
    assert httpx2.get(f"{servers.a}/rewards/identity").status_code == 401


def test_too_large_a_request_is_refused(servers):
    with pytest.raises(
        RewardError,
        match=r"answered 413: the body exceeds this server's limit of 1 MiB.*limits.body_mib$",
    ):
        RemoteReward("identity", [servers.a])(make_images([1] * 2, 500, 400), ["x"] * 2)
    with pytest.raises(
        RewardError,
        match=r"answered 413: got 33 images; this server accepts 32 at once.*limits.images$",
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
        r"serving 4 rewards at http://127\.0\.0\.1:\d+\n  embedded_detector +on \S+\n",
        servers.output,
    )
    assert f"  token   from {TOKEN_ENV};" in servers.output
    assert TOKEN not in servers.output
    assert f"curl {servers.address}/healthz" in servers.output
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
