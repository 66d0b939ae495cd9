"""What the reward bridge costs: pictures' way to the detectors, and how much of the scoring the next rollout hides.

    python benchmarks/bridge.py            prints JSON and writes benchmarks/results/bridge_<machine>.json

transfer   21 uint8 pictures of 1024x1024 (RealGen's rollout call), from the sampler's array to a detector's tensor, in
           one run of both ways: DLPack here, in one piece and in three; PIL, pickle and HTTP to another process as the
           reference does. Whether DLPack copied is told by pointers; HTTP's copies are those that its code makes.
overlap    an epoch of rollout calls of the embedded model with a reward of 0.8 rollouts on a device of its own (it
           waits, as the host does for a GPU): scored while the next call samples, against scored call by call.
           The last call has nothing to hide behind, so that (calls - 1) / calls is the most that can be hidden.
detectors  (with a GPU) Forensic-Chat's Qwen2.5-VL-7B and OmniAID's CLIP-L/14-336 at their real sizes with random
           weights: images a second and memory.
"""

import json
import multiprocessing
import os
import pickle
import statistics
import time
import urllib.request
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault(
    "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
)  # or the detectors would find three quarters taken

import jax
import jax.numpy as jnp
import numpy as np
import torch
from detectors import detectors
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from measure import median_seconds, save
from PIL import Image

from realgen_jax.models.flux.family import load_pipeline
from realgen_jax.models.flux.transformer import Cond
from realgen_jax.rollout import draw_noise, make_plan, rollout
from realgen_jax.sharding import make_mesh
from reward_bridge.bridge import RewardBridge

ROOT = Path(__file__).parent.parent
IMAGES, SIDE, REPEATS = 21, 1024, 5
CALLS, CALL_IMAGES = 8, 32


class Reference(BaseHTTPRequestHandler):
    """RealGen's reward server without a reward: unpickles PIL pictures, answers with a pickled list of floats."""

    def do_POST(self) -> None:
        pictures = pickle.loads(
            self.rfile.read(int(self.headers["Content-Length"]))
        )  # our own, over loopback
        answer = pickle.dumps([0.0] * len(pictures))
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_) -> None:
        pass


def serve(ports: multiprocessing.Queue) -> None:
    server = HTTPServer(("127.0.0.1", 0), Reference)
    ports.put(server.server_port)
    server.serve_forever()


def by_http(images: jax.Array, port: int) -> None:
    """uint8 [n, 3, h, w] to the server and back."""
    pixels = np.ascontiguousarray(np.asarray(images).transpose(0, 2, 3, 1))
    body = pickle.dumps([Image.fromarray(picture) for picture in pixels])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}", data=body) as answer:
        scores = pickle.loads(answer.read())
    if len(scores) != len(images):
        raise RuntimeError(f"got {len(scores)} scores for {len(images)} pictures")


def transfer(device: str) -> dict:
    """Seconds from the sampler's pictures to a reward that has them, and the bytes written on the way."""
    images = jax.jit(
        lambda: jax.random.bits(jax.random.key(0), (IMAGES, 3, SIDE, SIDE), jnp.uint8)
    )()
    parts = 3 if len(jax.devices()) >= 3 else 1
    mesh = jax.make_mesh((parts,), ("data",), devices=jax.devices()[:parts])
    sharded = jax.block_until_ready(jax.device_put(images, NamedSharding(mesh, P("data"))))
    prompts, seen = [""] * IMAGES, []

    def look(x, _):
        seen.append(x.data_ptr())
        return torch.zeros(len(x))

    bridge = RewardBridge({"look": look}, {"look": device}, deadline=60, retries=0)
    whole = median_seconds(lambda: bridge.submit(images, prompts).result(), REPEATS)
    shared = set(seen) == {images.unsafe_buffer_pointer()}
    seen.clear()
    pieces = median_seconds(lambda: bridge.submit(sharded, prompts).result(), REPEATS)
    own = {shard.data.unsafe_buffer_pointer() for shard in sharded.addressable_shards}
    sharded_copied = 0 if set(seen) <= own else images.nbytes
    bridge.close()
    ports = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(ports,), daemon=True)
    process.start()
    port = ports.get(timeout=60)
    http = median_seconds(lambda: by_http(images, port), REPEATS)
    process.kill()
    return {
        "images": [IMAGES, 3, SIDE, SIDE],
        "dlpack": {
            "seconds": whole,
            "bytes_copied": 0 if shared else images.nbytes,
            "bytes_through_host": 0,
        },
        "dlpack_sharded": {
            "devices": parts,
            "seconds": pieces,
            "bytes_copied": sharded_copied,
            "bytes_through_host": 0
            if device != "cpu" or jax.default_backend() == "cpu"
            else images.nbytes,
        },
        # transposed, into PIL, into the pickle, into the socket, out of it, out of the pickle
        "pil_pickle_http": {
            "seconds": http,
            "bytes_copied": 6 * images.nbytes,
            "bytes_through_host": 6 * images.nbytes,
        },
        "ratio": http / whole,
        "ratio_sharded": http / pieces,
    }


def overlap() -> dict:
    """How much of the scoring disappears behind the next call's rollout."""
    folder = ROOT / "realgen_jax" / "embedded" / "flux_tiny"
    settings = {
        "dtype": "float32",
        "param_dtype": "float32",
        "vae_dtype": "float32",
        "remat": "full",
    }
    pretrained = Settings(model=str(folder), transformer="", **settings)
    pipe = load_pipeline(pretrained, 64, None, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    plan = make_plan(
        pipe.sigmas(10), kind="sde", noise_level=0.9, window=3, bounds=(0, 8), branches=1
    )
    keys = jax.random.split(jax.random.key(0), CALLS)
    cond = Cond(
        jnp.zeros((CALL_IMAGES, 16, pipe.model.joint_attention_dim)),
        jnp.zeros((CALL_IMAGES, pipe.model.pooled_projection_dim)),
        jnp.full(CALL_IMAGES, 3.5),
    )

    @jax.jit
    def sample(params, vae_params, key, plan):
        latents, noise = draw_noise(key, key, plan, CALL_IMAGES, CALL_IMAGES, pipe.token_shape)
        tokens, _ = rollout(pipe.velocity, params, None, cond, latents, noise, plan)
        return pipe.decode(vae_params, tokens)

    def call(key):
        return sample(pipe.params, pipe.vae_params, key, plan.draw(key))

    def epoch(bridge, overlapped: bool) -> None:
        pending = []
        for key in keys:
            images = call(key)
            pending.append(bridge.submit(images, prompts))
            if not overlapped:
                pending[-1].result()
        images.block_until_ready()
        sampled = time.perf_counter()
        for one in pending:
            one.result()
        if overlapped:
            waits.append(time.perf_counter() - sampled)

    prompts = [""] * CALL_IMAGES
    rollouts = median_seconds(lambda: [call(key).block_until_ready() for key in keys], 3)
    seconds = 0.8 * rollouts / CALLS
    wait = lambda x, p: time.sleep(seconds) or torch.zeros(len(p))  # noqa: E731
    bridge = RewardBridge({"wait": wait}, {"wait": "cpu"}, deadline=60, retries=0)
    waits = []  # for scores, once all pictures were there
    beside, after = (median_seconds(partial(epoch, bridge, how), 3) for how in (True, False))
    bridge.close()
    scoring = CALLS * seconds
    return {
        "calls": CALLS,
        "images": CALL_IMAGES,
        "rollouts_seconds": rollouts,
        "scoring_seconds": scoring,
        "epoch_seconds": beside,
        "epoch_seconds_call_by_call": after,
        "seconds_saved": after - beside,
        "hidden": 1 - statistics.median(waits) / scoring,
        "most_that_can_be_hidden": (CALLS - 1) / CALLS,
    }


class Settings(SimpleNamespace):
    """Stands in for a config: ml_collections may be absent where this runs."""

    def __getitem__(self, name: str):
        return getattr(self, name)


def main() -> None:
    gpu = torch.cuda.is_available()
    if not gpu:
        jax.config.update("jax_num_cpu_devices", 3)  # so that pictures can lie in pieces
    device = f"cuda:{torch.cuda.device_count() - 1}" if gpu else "cpu"
    found = {"transfer": transfer(device), "overlap": overlap()}
    if gpu:
        found["detectors"] = detectors(device, IMAGES, SIDE)
    print(json.dumps(found, indent=2))
    print(f"written to {save('bridge', found)}")


if __name__ == "__main__":
    main()
