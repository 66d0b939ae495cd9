"""Rewards over HTTP, for a trainer in another environment or on another machine.

    python scripts/serve_rewards.py                                                     the embedded rewards, any laptop
    REALGEN_REWARD_TOKEN=... python scripts/serve_rewards.py --config.host=0.0.0.0      for other machines

The trainer uses a served reward where its config says so, with the same token in its environment:

    c.reward.options.embedded_detector = ConfigDict({"servers": ("http://host:8017",)})
"""

import itertools
import os
import socket
import sys
from collections.abc import Mapping, Sequence

import torch
from absl import app, flags

from realgen_configs import serve_rewards
from realgen_jax.config import define_config, parse_flags
from reward_bridge.bridge import RewardBridge, resolve
from reward_bridge.rewards import make_reward
from reward_bridge.server import TOKEN_ENV, Limits, bind, serve

FLAGS = flags.FLAGS
define_config("serve_rewards", template=serve_rewards.base)


def place(rewards: Sequence[str], device: str, own: Mapping[str, str]) -> dict[str, str]:
    """The torch device of every reward; "auto" takes the GPUs in turn. Raises ValueError for one that is not there."""
    if unknown := own.keys() - set(rewards):
        raise ValueError(
            f"config.devices names {', '.join(sorted(unknown))}, not in config.rewards"
        )
    turns = itertools.cycle([f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"])
    wanted = {name: own.get(name, device) for name in rewards}
    return {
        name: next(turns) if device == "auto" else resolve(device)
        for name, device in wanted.items()
    }


def describe(address: str, devices: Mapping[str, str], token: str) -> str:
    width = max(map(len, devices))
    if token:
        access = f"the one in {TOKEN_ENV}; the trainer needs it there too"
    else:
        access = f"none, everyone on this machine may ask; to set one, put it into {TOKEN_ENV}, here and for the trainer"
    return "\n".join(
        [
            f"serving {len(devices)} rewards at {address}",
            *(f"  {reward:{width}}  on {device}" for reward, device in devices.items()),
            f"token      {access}",
            f"is it up?  curl {address}/healthz",
            f'use it     c.reward.options.{next(iter(devices))} = ConfigDict({{"servers": ("{address}",)}}), in the '
            "trainer's config",
            "stop       Ctrl-C",
        ]
    )


def address_of(listener: socket.socket) -> str:
    """Where others find it: this machine's name, where it listens on all its addresses."""
    host, port = listener.getsockname()[:2]
    host = (
        socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    )
    return f"http://{host}:{port}"


def main(_: Sequence[str]) -> None:
    config, token = FLAGS.config, os.environ.get(TOKEN_ENV, "").strip()
    try:
        if not config.rewards:
            raise ValueError("config.rewards is empty: nothing to serve")
        limits = Limits(**config.limits)
        devices = place(config.rewards, config.device, config.devices.to_dict())
        listener = bind(config.host, config.port, token)
        print(f"loading {', '.join(devices)} ...", flush=True)
        options = config.options.to_dict()
        rewards = {
            name: make_reward(name, device, options.get(name, {}))
            for name, device in devices.items()
        }
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    bridge = RewardBridge(
        rewards,
        devices,
        deadline=config.deadline,
        retries=config.retries,
        batch_size=config.batch_size,
    )
    print(describe(address_of(listener), devices, token), flush=True)
    try:
        serve(bridge, listener, limits, token)
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
