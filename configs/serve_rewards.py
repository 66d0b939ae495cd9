"""Which rewards scripts/serve_rewards.py serves, on which devices, and within which limits.

The embedded rewards, on this machine:
    python scripts/serve_rewards.py

For other machines; needs a token in REALGEN_REWARD_TOKEN:
    python scripts/serve_rewards.py --config.host=0.0.0.0 --config.port=8017

RealGen's three detectors:
    python scripts/serve_rewards.py --config configs/serve_rewards.py:realgen

For other rewards, copy this file. `rewards` names them, and `options` holds the arguments of their
constructors.
"""

from pathlib import Path

from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parent.parent


def tiny() -> ConfigDict:
    """The rewards that are part of the package: nothing to download, runs on any machine."""
    c = ConfigDict()
    # This machine only. Any other address needs a token in REALGEN_REWARD_TOKEN.
    c.host = "127.0.0.1"
    c.port = 8017  # 0: any free port

    c.rewards = ("embedded_detector", "embedded_held_out", "embedded_prompt_accuracy", "clip_score")
    c.options = ConfigDict(
        {"clip_score": ConfigDict({"path": str(ROOT / "reward_bridge" / "embedded" / "clip")})}
    )
    c.device = "auto"  # auto (the GPUs in turn, or the CPU if there is none), cpu, cuda:N
    c.devices = ConfigDict()  # devices of single rewards, {"omniaid": "cuda:1"}
    c.batch_size = 0  # most images a reward scores at once; 0: the whole batch
    c.deadline = 120.0  # seconds for one reward and one batch
    c.retries = 1  # further attempts after a failure

    c.limits = ConfigDict()
    c.limits.body_mib = 256.0  # MiB of one request: 85 pictures of 1024x1024
    c.limits.held_mib = 4096.0  # MiB of all requests being read, waiting or being scored
    c.limits.images = 256  # in one request
    c.limits.waiting = 1024  # images waiting for one reward
    c.limits.batch = 64  # images of several requests that are scored together
    c.limits.gather = 0.005  # seconds that the first request waits for others to join it
    c.limits.upload = 60.0  # seconds that a request may take to arrive
    return c


def realgen() -> ConfigDict:
    """The rewards that RealGen trains on, from the folders in configs/flux_grpo.py.

    They need 20 GiB of GPU memory, and room for batches.
    """
    c = tiny()
    c.rewards = ("forensic_chat", "omniaid", "longclip")
    c.options = ConfigDict(
        {
            "forensic_chat": ConfigDict({"path": "models/forensic_chat", "dtype": "bfloat16"}),
            "omniaid": ConfigDict({"path": "models/omniaid", "routing": "patch_mean"}),
            "longclip": ConfigDict({"path": "models/longclip", "dtype": "float16"}),
        }
    )
    c.deadline = 600.0
    return c


PRESETS = {"tiny": tiny, "realgen": realgen}


def get_config(preset: str = "tiny") -> ConfigDict:
    """The config of a preset, which is named after the colon in --config FILE:PRESET."""
    if preset not in PRESETS:
        raise ValueError(
            f"configs/serve_rewards.py has no preset {preset!r}; choose from {', '.join(PRESETS)}"
        )
    return PRESETS[preset]().lock()
