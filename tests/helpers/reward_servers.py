"""Reward servers for tests, each in its own process so that it can be killed, and requests to them.

    python tests/helpers/reward_servers.py PORT

serves rewards as scripts/serve_rewards.py does. Their scores show which image and which prompt they
belong to.
"""

import contextlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
import torch
from safetensors.torch import save

from reward_bridge.batching import Limits
from reward_bridge.bridge import RewardBridge
from reward_bridge.server import TOKEN_ENV, bind, serve
from tests.helpers.goldens import ROOT

TOKEN = "a secret"
ENV = {**os.environ, TOKEN_ENV: TOKEN, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def identity(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """The number that `make_images` wrote, plus a fraction from the prompt's checksum."""
    number = images[:, 0, 0, 0].float() * 256 + images[:, 1, -1, -1]
    return number + torch.tensor([zlib.crc32(prompt.encode()) % 64 / 64 for prompt in prompts])


def slow(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Takes as many tenths of a second as its first prompt says, then scores like `identity`."""
    print("at work", flush=True)
    time.sleep(float(prompts[0]) / 10)
    return identity(images, prompts)


def picky(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Fails on the prompt "bad"."""
    time.sleep(0.1)
    if "bad" in prompts:
        raise ValueError("a bad prompt")
    return identity(images, prompts)


def together(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """The number of images that are scored together."""
    time.sleep(0.1)
    return torch.full((len(prompts),), float(len(prompts)))


def short(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Returns one score too few."""
    return torch.zeros(len(prompts) - 1)


def main(port: int) -> None:
    rewards = {reward.__name__: reward for reward in (identity, slow, picky, together, short)}
    listener = bind("127.0.0.1", port, os.environ[TOKEN_ENV])
    bridge = RewardBridge(rewards, dict.fromkeys(rewards, "cpu"), deadline=30, retries=0)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    limits = Limits(body_mib=1, held_mib=4, images=32, waiting=48, batch=16, gather=0.005, upload=2)
    digests = {name: f"digest of {name}" for name in rewards}
    serve(bridge, digests, listener, limits, os.environ[TOKEN_ENV])


@dataclass
class Servers:
    """All server processes, with the addresses of those that run."""

    first: subprocess.Popen
    second: subprocess.Popen
    doomed: subprocess.Popen  # to be killed
    script: subprocess.Popen  # scripts/serve_rewards.py
    refused: subprocess.Popen  # the same without a token, on all addresses
    a: str  # address of `first`
    b: str  # of `second`
    c: str  # of `doomed`
    address: str  # of `script`
    output: str  # of `script`
    imports: Path  # what `script` imports, as python -X importtime writes it


@contextlib.contextmanager
def running_servers(imports: Path) -> Iterator[Servers]:
    """Start all processes side by side; the script's imports are written to a file."""
    without_token = {key: value for key, value in ENV.items() if key != TOKEN_ENV}
    script = ["scripts/serve_rewards.py", "--config.port=0"]
    with (
        imports.open("w") as file,
        contextlib.ExitStack() as stack,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv(TOKEN_ENV, TOKEN)
        processes = {
            "first": start_program(),
            "second": start_program(),
            "doomed": start_program(),
            "script": start(["-X", "importtime", *script], stderr=file),
            "refused": start(
                [*script, "--config.host=0.0.0.0"], stderr=subprocess.PIPE, env=without_token
            ),
        }
        for process in processes.values():
            stack.callback(end, process)

        addresses = [
            processes[name].stdout.readline().strip() for name in ("first", "second", "doomed")
        ]
        output = ""
        while "\n  stop " not in output:
            line = processes["script"].stdout.readline()
            assert line, imports.read_text()[-2000:]
            output += line
        addresses.append(re.search(r"at (http://\S+)", output)[1])

        for address in addresses:
            wait_until(lambda address=address: answers(address))
        yield Servers(*processes.values(), *addresses, output, imports)


def start(command: Sequence[str], **options) -> subprocess.Popen:
    settings = {"stdout": subprocess.PIPE, "text": True, "env": ENV, "cwd": ROOT, **options}
    return subprocess.Popen([sys.executable, *command], **settings)


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def start_program(port: int = 0) -> subprocess.Popen:
    return start([__file__, str(port)])


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.02)


def answers(address: str) -> bool:
    with contextlib.suppress(httpx2.TransportError):
        return httpx2.get(f"{address}/healthz").status_code == 200
    return False


def make_images(numbers: Sequence[int], height: int = 4, width: int = 6) -> torch.Tensor:
    """Images with a number in the first pixel's red and the last pixel's green; else noise."""
    images = torch.randint(0, 256, (len(numbers), 3, height, width), dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([number // 256 for number in numbers])
    images[:, 1, -1, -1] = torch.tensor([number % 256 for number in numbers])
    return images


def expected(numbers: Sequence[int], prompts: Sequence[str]) -> list[float]:
    """The scores of `identity`."""
    scores = []
    for number, prompt in zip(numbers, prompts, strict=True):
        scores.append(number + zlib.crc32(prompt.encode()) % 64 / 64)
    return scores


def payload(images: torch.Tensor, prompts: Sequence[str]) -> bytes:
    return save({"images": images}, {"prompts": json.dumps(list(prompts))})


def post(address: str, body: bytes, reward: str = "identity", token: str = TOKEN):
    headers = {"Authorization": f"Bearer {token}"}
    return httpx2.post(f"{address}/score/{reward}", content=body, headers=headers, timeout=30)


def health(address: str, reward: str) -> dict:
    return httpx2.get(f"{address}/healthz").json()["rewards"][reward]


IMAGES = make_images([1, 2])
GOOD = payload(IMAGES, ["x", "y"])


@contextlib.contextmanager
def raw_request(address: str, header: str) -> Iterator[socket.socket]:
    """A connection on which the head of a request was sent, but no body."""
    url = httpx2.URL(address)
    with socket.create_connection((url.host, url.port)) as connection:
        lines = [
            "POST /score/identity HTTP/1.1",
            "Host: x",
            f"Authorization: Bearer {TOKEN}",
            header,
            "",
            "",
        ]
        connection.sendall("\r\n".join(lines).encode())
        yield connection


@contextlib.contextmanager
def liar(*replies: tuple[int, bytes] | float) -> Iterator[SimpleNamespace]:
    """A server with prepared answers: (status, body), or seconds without any answer.

    The last one is repeated for ever. Yields its address and the bodies that it has seen.
    """
    seen = []
    done = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(self.rfile.read(int(self.headers["Content-Length"])))
            reply = replies[min(len(seen), len(replies)) - 1]
            if isinstance(reply, float):
                done.wait(reply)
                return
            self.send_response(reply[0])
            self.send_header("Content-Length", str(len(reply[1])))
            self.end_headers()
            self.wfile.write(reply[1])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        try:
            yield SimpleNamespace(address=f"http://127.0.0.1:{server.server_port}", seen=seen)
        finally:
            done.set()
            server.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
