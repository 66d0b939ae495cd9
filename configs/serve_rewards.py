"""Which rewards scripts/serve_rewards.py serves, where, and within which limits.

    python scripts/serve_rewards.py                                             the embedded rewards, on this machine
    python scripts/serve_rewards.py --config.host=0.0.0.0 --config.port=8017    for other machines; needs a token
    python scripts/serve_rewards.py --config configs/serve_rewards.py:realgen   RealGen's three detectors

For other rewards copy this file: `rewards` names them, `options` gives their constructors' arguments.
"""

from pathlib import Path

from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parent.parent


def tiny() -> ConfigDict:
    """The rewards that ship with the package: nothing to download, any machine."""
    c = ConfigDict()
    c.host = (
        "127.0.0.1"  # this machine only; any other address needs the token in REALGEN_REWARD_TOKEN
    )
    c.port = 8017  # 0: a free one

    c.rewards = ("embedded_detector", "embedded_held_out", "embedded_prompt_accuracy", "clip_score")
    c.options = ConfigDict(
        {"clip_score": ConfigDict({"path": str(ROOT / "reward_bridge" / "embedded" / "clip")})}
    )
    c.device = "auto"  # the GPUs in turn, without one the CPU; cpu, cuda:N
    c.devices = ConfigDict()  # rewards that have a device of their own, {"omniaid": "cuda:1"}
    c.batch_size = (
        0  # most images a reward sees at once; 0: all of a batch. Halved where memory runs out
    )
    c.deadline = 120.0  # seconds for one reward and one batch
    c.retries = 1

    c.limits = ConfigDict()
    c.limits.body_mib = 256.0  # of one request: 85 pictures of 1024x1024
    c.limits.held_mib = 4096.0  # request bodies that are read, wait or are scored, together
    c.limits.images = 256  # of one request
    c.limits.waiting = 1024  # images that wait for one reward
    c.limits.batch = 64  # images of several requests that are scored together
    c.limits.gather = 0.005  # seconds that a first request waits for others to join it
    c.limits.upload = 60.0  # seconds that a body may take to arrive
    return c


def realgen() -> ConfigDict:
    """What RealGen trains on, from the folders of configs/flux_grpo.py: 20 GiB of GPU memory, and room for batches."""
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
    """The preset's config; `preset` is what follows the colon of --config."""
    if preset not in PRESETS:
        raise ValueError(
            f"configs/serve_rewards.py has no preset {preset!r}; choose from {', '.join(PRESETS)}"
        )
    return PRESETS[preset]().lock()
