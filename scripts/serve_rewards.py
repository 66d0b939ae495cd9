"""Serve rewards over HTTP, for a trainer in another environment or on another machine.

The embedded rewards, on any laptop:
    python scripts/serve_rewards.py

For other machines:
    REALGEN_REWARD_TOKEN=... python scripts/serve_rewards.py --config.host=0.0.0.0

The trainer needs the same token in its environment, and this in its config:
    c.reward.options.embedded_detector = ConfigDict({"servers": ("http://host:8017",)})
"""

from realgen_jax import process

process.begin(__name__)  # before the imports that take seconds

import itertools
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

import torch
from absl import app, flags

from realgen_configs import serve_rewards
from realgen_jax.command_line import define_config, parse_flags
from realgen_jax.config_ranges import SERVER_RANGES
from realgen_jax.files import content_digest
from reward_bridge.batching import Limits
from reward_bridge.bridge import RewardBridge
from reward_bridge.devices import resolve
from reward_bridge.digests import reward_digest
from reward_bridge.groups import check_served
from reward_bridge.rewards import make_reward
from reward_bridge.server import TOKEN_ENV, bind, serve
from reward_bridge.terminal import show_messages

FLAGS = flags.FLAGS
define_config("serve_rewards", template=serve_rewards.base, ranges=SERVER_RANGES)


def place(rewards: Sequence[str], device: str, devices: Mapping[str, str]) -> dict[str, str]:
    """The torch device of every reward: its own in `devices`, else `device`.

    "auto" assigns the GPUs round-robin, or the CPU if there is none. Raises ValueError for a device
    that does not exist, and for a name in `devices` that is not among the rewards.
    """
    unknown = sorted(devices.keys() - set(rewards))
    if unknown:
        raise ValueError(
            f"config.devices has {', '.join(unknown)}, not in config.rewards ({', '.join(rewards)})"
        )

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    turns = itertools.cycle(gpus or ["cpu"])
    placed = {}
    for name in rewards:
        wanted = devices.get(name, device)
        placed[name] = next(turns) if wanted == "auto" else resolve(wanted)
    return placed


def describe(address: str, devices: Mapping[str, str], token: str) -> str:
    """The text that tells the user how to reach the server."""
    if token:
        access = f"from {TOKEN_ENV}; the trainer needs the same one"
    else:
        access = (
            f"none: everyone on this machine has access; set {TOKEN_ENV} here and for the trainer "
            "to require one"
        )

    lines = [f"serving {len(devices)} rewards at {address}"]
    width = max(map(len, devices))
    for reward, device in devices.items():
        lines.append(f"  {reward:{width}}  on {device}")

    first = next(iter(devices))
    lines += [
        f"  token   {access}",
        f"  check   curl {address}/healthz",
        f'  use     c.reward.options.{first} = ConfigDict({{"servers": ("{address}",)}}) in the '
        "trainer's config",
        "  stop    Ctrl-C",
    ]
    return "\n".join(lines)


def address_of(listener: socket.socket) -> str:
    """The URL of a listening socket; this machine's name if it listens on all addresses."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    elif ":" in host:
        host = f"[{host}]"
    return f"http://{host}:{port}"


def run(_: Sequence[str]) -> None:
    show_messages()
    config = FLAGS.config
    token = os.environ.get(TOKEN_ENV, "").strip()
    try:
        # Report mistakes before anything is loaded.
        if not config.rewards:
            raise ValueError("config.rewards is empty; expected the name of one reward or more")
        limits = Limits(**config.limits)
        devices = place(config.rewards, config.device, config.devices.to_dict())
        listener = bind(config.host, config.port, token)

        # Load the rewards.
        print(f"loading {', '.join(devices)} ...")
        options = config.options.to_dict()
        rewards = {}
        digests = {}
        for name, device in devices.items():
            rewards[name] = make_reward(name, device, options.get(name, {}))
            check_served(name, rewards[name])
            digests[name] = reward_digest(name, options.get(name, {}), content_digest)
    except (ValueError, OSError) as error:
        # The rewards name the keys of a trainer's config.
        message = str(error).replace("config.reward.", "config.")
        sys.exit(f"error: {message}")

    bridge = RewardBridge(
        rewards,
        devices,
        deadline=config.deadline,
        retries=config.retries,
        batch_size=config.batch_size,
    )
    print(describe(address_of(listener), devices, token))

    # After Ctrl-C, the server finishes its batch; then it sends the signal again.
    process.on_signal(signal.SIGINT, lambda _: process.leave("stopped", 0))
    serve(bridge, digests, listener, limits, token)
    process.leave("stopped", 0)


def main() -> None:
    app.run(run, flags_parser=parse_flags)


if __name__ == "__main__":
    main()
