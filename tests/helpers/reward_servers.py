"""Servers for test_remote.py, each a process of its own, and what is asked of them.

    python tests/reward_servers.py PORT

serves as scripts/serve_rewards.py does, rewards whose scores tell which image and which prompt they belong to.
"""

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import httpx2
import torch
from safetensors.torch import save

from reward_bridge.bridge import RewardBridge
from reward_bridge.server import TOKEN_ENV, Limits, bind, serve
from tests.helpers.goldens import ROOT

TOKEN = "a secret"
ENV = {**os.environ, TOKEN_ENV: TOKEN, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def identity(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """The number that `make_images` wrote, and the prompt's checksum behind the point."""
    number = images[:, 0, 0, 0].float() * 256 + images[:, 1, -1, -1]
    return number + torch.tensor([zlib.crc32(prompt.encode()) % 64 / 64 for prompt in prompts])


def slow(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Takes as many tenths of a second as its first prompt says."""
    print("at work", flush=True)
    time.sleep(float(prompts[0]) / 10)
    return identity(images, prompts)


def picky(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    time.sleep(0.1)
    if "bad" in prompts:
        raise ValueError("a bad prompt")
    return identity(images, prompts)


def together(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """How many images it was given at once."""
    time.sleep(0.1)
    return torch.full((len(prompts),), float(len(prompts)))


def short(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return torch.zeros(len(prompts) - 1)


def main(port: int) -> None:
    rewards = {reward.__name__: reward for reward in (identity, slow, picky, together, short)}
    listener = bind("127.0.0.1", port, os.environ[TOKEN_ENV])
    bridge = RewardBridge(rewards, dict.fromkeys(rewards, "cpu"), deadline=30, retries=0)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    limits = Limits(body_mib=1, held_mib=4, images=32, waiting=48, batch=16, gather=0.005, upload=2)
    serve(bridge, listener, limits, os.environ[TOKEN_ENV])


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
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def answers(address: str) -> bool:
    with contextlib.suppress(httpx2.TransportError):
        return httpx2.get(f"{address}/healthz").status_code == 200
    return False


def make_images(numbers: Sequence[int], height: int = 4, width: int = 6) -> torch.Tensor:
    """Each image's number is in its first pixel's red and its last pixel's green; the rest is noise."""
    images = torch.randint(0, 256, (len(numbers), 3, height, width), dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([number // 256 for number in numbers])
    images[:, 1, -1, -1] = torch.tensor([number % 256 for number in numbers])
    return images


def expected(numbers: Sequence[int], prompts: Sequence[str]) -> list[float]:
    return [
        number + zlib.crc32(p.encode()) % 64 / 64
        for number, p in zip(numbers, prompts, strict=True)
    ]


def payload(images: torch.Tensor, prompts: Sequence[str]) -> bytes:
    return save({"images": images}, {"prompts": json.dumps(list(prompts))})


def post(address: str, body: bytes, reward: str = "identity", token: str = TOKEN):
    headers = {"Authorization": f"Bearer {token}"}
    return httpx2.post(f"{address}/score/{reward}", content=body, headers=headers, timeout=30)


def health(address: str, reward: str) -> dict:
    return httpx2.get(f"{address}/healthz").json()["rewards"][reward]


@contextlib.contextmanager
def raw_request(address: str, header: str) -> Iterator[socket.socket]:
    url = httpx2.URL(address)
    with socket.create_connection((url.host, url.port)) as connection:
        head = f"POST /score/identity HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n{header}\r\n\r\n"
        connection.sendall(head.encode())
        yield connection


@contextlib.contextmanager
def liar(*replies: tuple[int, bytes] | float) -> Iterator[SimpleNamespace]:
    """A server that answers (status, body) in turn, the last for ever; a number is seconds without an answer."""
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
