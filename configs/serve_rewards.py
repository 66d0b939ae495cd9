"""Configs of scripts/serve_rewards.py: the rewards, the address and the limits.

    python scripts/serve_rewards.py                                             the embedded rewards
    python scripts/serve_rewards.py --config.host=0.0.0.0 --config.port=8017    for other machines
    python scripts/serve_rewards.py --config configs/serve_rewards.py:realgen   RealGen's detectors

An address that other machines can reach needs a token (docs/rewards.md). To serve other rewards,
copy this file: `rewards` names them, `options` has the arguments of their constructors.
"""

from importlib.resources import files

from ml_collections import ConfigDict

from realgen_jax.config_files import make_preset

REWARDS = files("reward_bridge") / "embedded"


def base() -> ConfigDict:
    """All keys, with no rewards."""
    c = ConfigDict()
    # 127.0.0.1: this machine only. Any other address needs the token in REALGEN_REWARD_TOKEN.
    c.host = "127.0.0.1"
    c.port = 8017  # 0: any free port

    c.rewards = ()
    c.options = ConfigDict()  # {reward: its constructor's options}
    c.device = "auto"  # auto: round-robin over the GPUs, or the CPU; or cpu, cuda:N
    c.devices = ConfigDict()  # {reward: its own device}, such as {"omniaid": "cuda:1"}
    c.batch_size = 0  # images a reward scores at once, halved when out of memory; 0: all at once
    c.deadline = 120.0  # seconds for one reward and one batch
    c.retries = 1

    c.limits = ConfigDict()
    c.limits.body_mib = 256.0  # body of one request: 85 images of 1024x1024
    c.limits.held_mib = 4096.0  # all request bodies being read, waiting or being scored
    c.limits.images = 256  # images in one request
    c.limits.waiting = 1024  # images waiting for one reward
    c.limits.batch = 64  # images of several requests that are scored together
    c.limits.gather = 0.005  # seconds the first request waits for others to join its batch
    c.limits.upload = 60.0  # seconds a body may take to arrive

    c.lock()
    c.options.unlock()
    c.devices.unlock()
    return c


def tiny() -> ConfigDict:
    """The rewards that ship with the package. Any machine, nothing to download."""
    c = base()
    c.rewards = ("embedded_detector", "embedded_held_out", "embedded_prompt_accuracy", "clip_score")
    c.options.clip_score = ConfigDict({"path": str(REWARDS / "clip")})
    return c


def realgen() -> ConfigDict:
    """RealGen's three detectors, from the folders that configs/flux_grpo.py uses.

    They take 20 GiB of GPU memory, plus the memory of the batches.
    """
    c = base()
    c.rewards = ("forensic_chat", "omniaid", "longclip")
    c.options.forensic_chat = ConfigDict({"path": "models/forensic_chat", "dtype": "bfloat16"})
    c.options.omniaid = ConfigDict({"path": "models/omniaid", "routing": "patch_mean"})
    c.options.longclip = ConfigDict({"path": "models/longclip", "dtype": "float16"})
    c.deadline = 600.0
    return c


PRESETS = {"tiny": tiny, "realgen": realgen}


def get_config(preset: str = "tiny") -> ConfigDict:
    """The config of the preset that is named after the colon in --config."""
    return make_preset(PRESETS, preset, __file__).lock()
