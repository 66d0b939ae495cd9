"""Measure the cost of the reward bridge: moving pictures to the rewards, and waiting for scores.

    python benchmarks/bridge.py

Prints JSON and writes benchmarks/results/bridge_<machine>.json.

transfer   21 uint8 pictures of 1024x1024 (RealGen's rollout call) from the sampler's array to a
           detector's tensor: by DLPack, whole and in three shards, and by PIL, pickle and HTTP to
           another process, as the reference does. Pointers show whether DLPack copied; the copies
           of HTTP are those that its code makes.
overlap    an epoch of rollout calls of the embedded model. The reward has a device of its own and
           takes 0.8 times as long as a rollout (it sleeps, as the host does while a GPU works).
           Scoring while the next call samples is compared with scoring call by call. Nothing hides
           the last call's scoring, so at most (calls - 1) / calls can be hidden.
detectors  (with a GPU) Forensic-Chat's Qwen2.5-VL-7B and OmniAID's CLIP-L/14-336 at their real
sizes
           with random weights: images per second and memory.
"""

import json
import multiprocessing
import os
import pickle
import statistics
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

# By default, JAX takes three quarters of the GPU's memory, which the detectors need.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from detectors import detectors
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from measure import median_seconds, save
from PIL import Image

from realgen_jax.models.flux.transformer import Cond
from realgen_jax.models.loading import load_model
from realgen_jax.rollout import draw_latents, make_plan, rollout
from realgen_jax.sharding import make_mesh
from reward_bridge.bridge import RewardBridge

ROOT = Path(__file__).parent.parent
# The transfer's pictures.
IMAGES = 21
SIDE = 1024
REPEATS = 5
# The overlap's rollout calls.
CALLS = 8
CALL_IMAGES = 32


class Reference(BaseHTTPRequestHandler):
    """RealGen's reward server without a reward.

    It unpickles PIL pictures and answers with a pickled list of floats.
    """

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        pictures = pickle.loads(body)  # sent by this program, over loopback
        answer = pickle.dumps([0.0] * len(pictures))
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_) -> None:
        pass


def serve(ports: multiprocessing.Queue) -> None:
    """Serve at a free port, which is put into the queue."""
    server = HTTPServer(("127.0.0.1", 0), Reference)
    ports.put(server.server_port)
    server.serve_forever()


def by_http(images: jax.Array, port: int) -> None:
    """Send pictures, uint8 [n, 3, h, w], to the server and wait for its answer."""
    pixels = np.ascontiguousarray(np.asarray(images).transpose(0, 2, 3, 1))
    body = pickle.dumps([Image.fromarray(picture) for picture in pixels])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}", data=body) as answer:
        scores = pickle.loads(answer.read())
    if len(scores) != len(images):
        raise RuntimeError(f"got {len(scores)} scores for {len(images)} pictures")


def transfer(device: str) -> dict:
    """Time the way of pictures from the sampler to a reward, and count the bytes written."""
    images = jax.jit(
        lambda: jax.random.bits(jax.random.key(0), (IMAGES, 3, SIDE, SIDE), jnp.uint8)
    )()
    parts = 3 if len(jax.devices()) >= 3 else 1
    mesh = jax.make_mesh((parts,), ("data",), devices=jax.devices()[:parts])
    sharded = jax.block_until_ready(jax.device_put(images, NamedSharding(mesh, P("data"))))

    # By DLPack, whole and in parts. The pointers that a reward sees tell whether it was copied.
    prompts = [""] * IMAGES
    pointers = []

    def look(x, _):
        pointers.append(x.data_ptr())
        return torch.zeros(len(x))

    bridge = RewardBridge({"look": look}, {"look": device}, deadline=60, retries=0)
    whole_seconds = median_seconds(lambda: bridge.submit(images, prompts).result(), REPEATS)
    shared = set(pointers) == {images.unsafe_buffer_pointer()}
    pointers.clear()
    sharded_seconds = median_seconds(lambda: bridge.submit(sharded, prompts).result(), REPEATS)
    shards = {shard.data.unsafe_buffer_pointer() for shard in sharded.addressable_shards}
    shards_shared = set(pointers) <= shards
    bridge.close()
    on_one_kind = device != "cpu" or jax.default_backend() == "cpu"

    # By PIL, pickle and HTTP to another process.
    context = multiprocessing.get_context("spawn")
    ports = context.Queue()
    process = context.Process(target=serve, args=(ports,), daemon=True)
    process.start()
    port = ports.get(timeout=60)
    http_seconds = median_seconds(lambda: by_http(images, port), REPEATS)
    process.kill()

    return {
        "images": [IMAGES, 3, SIDE, SIDE],
        "dlpack": {
            "seconds": whole_seconds,
            "bytes_copied": 0 if shared else images.nbytes,
            "bytes_through_host": 0,
        },
        "dlpack_sharded": {
            "devices": parts,
            "seconds": sharded_seconds,
            "bytes_copied": 0 if shards_shared else images.nbytes,
            "bytes_through_host": 0 if on_one_kind else images.nbytes,
        },
        # Transposed, into PIL, into the pickle, into the socket, out of it, out of the pickle.
        "pil_pickle_http": {
            "seconds": http_seconds,
            "bytes_copied": 6 * images.nbytes,
            "bytes_through_host": 6 * images.nbytes,
        },
        "ratio": http_seconds / whole_seconds,
        "ratio_sharded": http_seconds / sharded_seconds,
    }


def sampler() -> Callable[[jax.Array], jax.Array]:
    """Return a rollout call of the embedded model: key -> pictures."""
    folder = ROOT / "realgen_jax" / "embedded" / "flux_tiny"
    settings = {
        "dtype": "float32",
        "param_dtype": "float32",
        "vae_dtype": "float32",
        "vae": "",
        "vae_tile": 0,
        "quantization": "",
        "remat": "full",
    }
    pretrained = Settings(model=str(folder), transformer="", **settings)
    model = load_model(pretrained, (64, 64), make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    plan = make_plan(
        model.sigmas(10), kind="sde", noise_level=0.9, window=3, bounds=(0, 8), branches=1
    )
    cond = Cond(
        jnp.zeros((CALL_IMAGES, 16, model.config.joint_attention_dim)),
        jnp.zeros((CALL_IMAGES, model.config.pooled_projection_dim)),
        jnp.full(CALL_IMAGES, 3.5),
    )

    @jax.jit
    def sample(model, key, plan):
        latents = draw_latents(key, CALL_IMAGES, CALL_IMAGES, model.token_shape)
        noise = jax.random.normal(key, (plan.window, CALL_IMAGES, *model.token_shape))
        tokens, _ = rollout(partial(model.velocity, None), cond, latents, noise, plan)
        return model.decode(tokens)

    return lambda key: sample(model, key, plan.draw(key))


def overlap() -> dict:
    """Measure how much of the scoring is hidden behind the next call's rollout."""
    call = sampler()
    keys = jax.random.split(jax.random.key(0), CALLS)
    prompts = [""] * CALL_IMAGES
    rollouts = median_seconds(lambda: [call(key).block_until_ready() for key in keys], 3)
    seconds = 0.8 * rollouts / CALLS  # of scoring one call
    waits = []  # for scores, after all pictures were sampled

    def slow_reward(_, prompts):
        time.sleep(seconds)
        return torch.zeros(len(prompts))

    def epoch(bridge, overlapped: bool) -> None:
        pending = []
        for key in keys:
            images = call(key)
            pending.append(bridge.submit(images, prompts))
            if not overlapped:
                pending[-1].result()
        images.block_until_ready()
        sampled = time.perf_counter()
        for scores in pending:
            scores.result()
        if overlapped:
            waits.append(time.perf_counter() - sampled)

    bridge = RewardBridge({"wait": slow_reward}, {"wait": "cpu"}, deadline=60, retries=0)
    overlapped_seconds = median_seconds(partial(epoch, bridge, True), 3)
    in_turn_seconds = median_seconds(partial(epoch, bridge, False), 3)
    bridge.close()
    scoring = CALLS * seconds
    return {
        "calls": CALLS,
        "images": CALL_IMAGES,
        "rollouts_seconds": rollouts,
        "scoring_seconds": scoring,
        "epoch_seconds": overlapped_seconds,
        "epoch_seconds_call_by_call": in_turn_seconds,
        "seconds_saved": in_turn_seconds - overlapped_seconds,
        "hidden": 1 - statistics.median(waits) / scoring,
        "most_that_can_be_hidden": (CALLS - 1) / CALLS,
    }


class Settings(SimpleNamespace):
    """Stands in for a config; ml_collections may not be installed on the GPU machine."""

    def __getitem__(self, name: str):
        return getattr(self, name)


def main() -> None:
    gpu = torch.cuda.is_available()
    if not gpu:
        jax.config.update("jax_num_cpu_devices", 3)  # for sharded pictures
    device = f"cuda:{torch.cuda.device_count() - 1}" if gpu else "cpu"

    results = {"transfer": transfer(device), "overlap": overlap()}
    if gpu:
        results["detectors"] = detectors(device, IMAGES, SIDE)
    print(json.dumps(results, indent=2))
    print(f"written to {save('bridge', results)}")


if __name__ == "__main__":
    main()
