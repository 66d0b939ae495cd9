"""What a config of Flow-GRPO or RealGen becomes: our keys with their values, and what differs.

Each rule below is a function of their config that returns keys of ours and appends what differs to
`remarks`. Keys with the same meaning need no rule (realgen_jax/convert_config/keys.py).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ml_collections import ConfigDict

from realgen_jax.config import base
from realgen_jax.config_ranges import wrong_values
from realgen_jax.convert_config.keys import KEYS, MODELS, REWARDS
from realgen_jax.convert_config.reading import Config

DTYPES = {"fp16": "bfloat16", "bf16": "bfloat16", "no": "float32"}
EMA = {True: (0.9, 8), False: (0.0, 1)}  # decay, optimizer steps between updates
GUIDANCE_OFFSET = {"StableDiffusion3Pipeline": 0.0, "ZImagePipeline": 1.0}
LEARN = ("omniaid", "omniaid_dino")  # the rewards that learn in RealGen V2
# Keys without a counterpart, and their values that change nothing.
HARMLESS = {
    "sample.kl_reward": 0,
    "train.sft": 0,
    "train.preset_lora_path": "",
    "per_prompt_stat_tracking": True,
    "train.use_8bit_adam": False,
}


@dataclass(frozen=True)
class Conversion:
    """A config of ours.

    values: {key of ours: value}. remarks: what the run does differently. left_out: {key of theirs:
    why it has no counterpart}. learners: {reward that learns: {key of adversary(): value}}.
    """

    values: dict[str, Any]
    remarks: list[str]
    left_out: dict[str, str]
    learners: dict[str, dict[str, Any]]


def convert(theirs: Config) -> Conversion:
    """Convert a config.

    Raises ValueError, in one line, for a model, a reward or a number that has no counterpart.
    """
    if not theirs.gpus:
        raise ValueError("the preset has no gpu_number; pass --gpus, the GPUs that train")

    values = {}
    remarks: list[str] = []
    left_out = {}
    for key, value in theirs.values.items():
        entry = KEYS.get(key)
        if entry is None:
            remarks.append(f"{key} = {value!r} is not known, and left out")
        elif not entry.ours:
            left_out[key] = entry.note
        elif entry.same and value is not None:
            values[entry.ours[0]] = value
        if value != HARMLESS.get(key, value):
            remarks.append(f"{key} = {value!r} has no counterpart, but changes training")

    for rule in RULES:
        values |= rule(theirs, remarks)
    return Conversion(checked(values), remarks, left_out, learners(theirs))


def checked(values: dict[str, Any]) -> dict[str, Any]:
    """Return values with the types of our keys. Raises ValueError for what a key refuses."""
    config = base()
    for key, value in values.items():
        *parents, name = key.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        if type(value) is int and type(section.get(name)) is float:
            value = float(value)
            values[key] = value
        try:
            section[name] = ConfigDict(value) if isinstance(value, dict) else value
        except TypeError as error:
            raise ValueError(f"config.{key} is {value!r}; {error}") from error
    problems = wrong_values(config)
    if problems:
        raise ValueError(problems[0])
    return values


# -- Whose config it is


def is_second(theirs: Config) -> bool:
    """Return whether a config is of RealGen V2."""
    return "d_threshold" in theirs.values


def is_realgen(theirs: Config) -> bool:
    """Return whether a config is RealGen's, of either version."""
    return is_second(theirs) or theirs.get("prompt_fn") == "realgen"


def model_facts(theirs: Config) -> tuple[str, int, float]:
    """Return config.pretrained.family, and the LoRA's rank and alpha."""
    name = str(theirs.get("pretrained.model", ""))
    parts = [part for part in MODELS if part in name.lower() and "kontext" not in name.lower()]
    if not parts:
        raise ValueError(
            f"pretrained.model is {name!r}; expected FLUX.1-dev, Stable Diffusion 3.5 or Z-Image"
        )
    return MODELS[parts[0]]


def pipeline(theirs: Config) -> str:
    """Return the pipeline's class."""
    return model_facts(theirs)[0].partition(":")[0]


def weights_of(theirs: Config) -> dict[str, float]:
    """Return {reward of ours: weight}."""
    rewards = theirs.get("reward_fn")
    if not isinstance(rewards, dict) or not rewards:
        raise ValueError(f"reward_fn is {rewards!r}; expected {{reward: weight}}")
    weights = {REWARDS[name][0]: weight for name, weight in rewards.items() if name in REWARDS}
    if not weights:
        raise ValueError(f"reward_fn is {rewards!r}; expected some of {', '.join(REWARDS)}")
    return {name: float(weight) for name, weight in weights.items()}


# -- Rules


def model_keys(theirs: Config, remarks: list[str]) -> dict[str, Any]:
    """The model's folder, its precision, and the LoRA."""
    family, rank, alpha = model_facts(theirs)
    remarks.append(f"LoRA of rank {rank} and alpha {alpha:g}, which are constants of their scripts")
    model = str(theirs.get("pretrained.model"))
    if re.fullmatch(r"[\w-]+/[\w.-]+", model):
        folder = f"models/{model.rpartition('/')[2]}"
        remarks.append(f"models are folders: hf download {model} --local-dir {folder}")
        model = folder

    precision = theirs.get("mixed_precision", "no")
    if precision not in DTYPES:
        raise ValueError(f"mixed_precision is {precision!r}; expected {', '.join(DTYPES)}")
    if precision == "fp16":
        remarks.append("bfloat16 instead of float16")
    return {
        "pretrained.family": family,
        "pretrained.model": model,
        "train.lora_rank": rank,
        "train.lora_alpha": alpha,
        **dict.fromkeys(KEYS["mixed_precision"].ours, DTYPES[precision]),
    }


def prompt_keys(theirs: Config, remarks: list[str]) -> dict[str, Any]:
    """The files of the prompts."""
    folder = str(theirs.get("dataset", ""))
    if not folder:
        raise ValueError("dataset is empty; expected the folder of the prompts")
    files = ("train.txt", "test.txt")
    if theirs.get("prompt_fn") == "geneval":
        files = ("train_metadata.jsonl", "test_metadata.jsonl")
    elif is_second(theirs):
        files = ("train.jsonl", "test.txt")
    paths = [str(PurePosixPath(folder) / file) for file in files]
    values: dict[str, Any] = dict(zip(("prompts.train", "prompts.test"), paths, strict=True))
    if not is_realgen(theirs):
        values["prompts.max_tokens"] = 128
        remarks.append("prompts are cut at 128 tokens, a constant of their scripts")
    return values


def reward_keys(theirs: Config, remarks: list[str]) -> dict[str, Any]:
    """The rewards, their options, and how advantages are computed from several."""
    weights = weights_of(theirs)
    values: dict[str, Any] = {"reward.fn": weights, "evaluate.scores": tuple(weights)}
    for name in theirs.get("reward_fn"):
        if name not in REWARDS:
            remarks.append(f"reward {name!r} has no counterpart, and is left out")
            continue
        ours, options = REWARDS[name]
        if is_second(theirs):  # OmniAID's own weights
            options = {key: value for key, value in options.items() if key != "routing"}
        values[f"reward.options.{ours}"] = options

    # Flow-GRPO normalises the weighted sum of the rewards, RealGen each reward.
    summed = len(weights) > 1 and not is_realgen(theirs)
    values["train.advantages"] = "weighted_sum" if summed else "per_reward"
    # RealGen V1 reserves a GPU for the rewards; the others' rewards are where the model trains.
    values["reward.share_gpu"] = is_second(theirs) or not is_realgen(theirs)
    if learners(theirs):
        values["reward.references.path"] = prompt_keys(theirs, [])["prompts.train"]
        values["reward.references.root"] = str(theirs.get("dataset"))
    return values


def call_keys(theirs: Config, remarks: list[str]) -> dict[str, Any]:
    """Sizes of pictures and calls. Images of a call: theirs per GPU, ours of all GPUs."""
    size = int(theirs.number("resolution"))
    branches = int(theirs.number("sample.mini_num_image_per_prompt", 1))
    call = int(theirs.number("sample.train_batch_size")) * branches * theirs.gpus
    tests = int(theirs.number("sample.test_batch_size")) * theirs.gpus

    images = call * int(theirs.number("sample.num_batches_per_epoch"))
    group = int(theirs.number("sample.num_image_per_prompt"))
    if images % group:
        raise ValueError(
            f"an epoch has {images} images on {theirs.gpus} GPUs, which groups of {group} do not "
            "divide; pass another --gpus"
        )
    return {
        "sample.width": size,
        "sample.height": size,
        "sample.branches": branches,
        "sample.train_batch_size": call,
        "sample.test_batch_size": tests,
        "evaluate.batch_size": tests,
        "preflight.devices": theirs.gpus,
    }


def step_keys(theirs: Config, remarks: list[str]) -> dict[str, Any]:
    """Steps, and the window of those with noise."""
    steps = int(theirs.number("sample.num_steps"))
    evaluated = int(theirs.number("sample.eval_num_steps"))
    void = 1 if pipeline(theirs) == "ZImagePipeline" else 0  # the last step, from 0 to 0

    # In their scripts with a window, the preset sets its length.
    size = 0
    if "sample.sde_window_size" in theirs.own:
        size = int(theirs.number("sample.sde_window_size"))
    trained = int(theirs.number("sample.train_num_steps", 0))
    if trained:
        size = trained
        span = (0, steps // 2 + trained)
    elif size:
        span = tuple(theirs.get("sample.sde_window_range"))
    else:
        share = theirs.number("train.timestep_fraction", 1.0)
        size = min(int(steps * share), steps - 1 - void)
        span = (0, size)
        remarks.append(
            f"noise in the first {size} of {steps - void} steps, those that are trained on; theirs "
            "also has noise in others"
        )
    return {
        "sample.num_steps": steps - void,
        "evaluate.sample.num_steps": evaluated - void,
        "sample.sde_window_size": size,
        "sample.sde_window_range": span,
    }


def guidance_keys(theirs: Config, remarks: list[str]) -> dict[str, Any]:
    """Guidance, and which of its two passes learn."""
    scale = float(theirs.number("sample.guidance_scale"))
    evaluated = scale
    if "sample.eval_guidance_scale" in theirs.own:
        evaluated = float(theirs.number("sample.eval_guidance_scale"))
    offset = GUIDANCE_OFFSET.get(pipeline(theirs))
    gradient = ""
    if offset is not None and scale + offset > 1:
        gradient = "bound" if is_realgen(theirs) and not is_second(theirs) else "both"
    return {
        "sample.guidance_scale": scale,
        "evaluate.sample.guidance_scale": evaluated,
        "train.cfg_gradient": gradient,
    }


def update_keys(theirs: Config, remarks: list[str]) -> dict[str, Any]:
    """The objective, its KL and clips, and the EMA."""
    guard = bool(theirs.get("rationorm", False))
    decay, interval = EMA[bool(theirs.get("train.ema"))]
    values = {
        "train.loss": "guard" if guard else "grpo",
        "train.kl": "velocity" if theirs.get("train.vkl") else "mean_reference",
        "train.ema_decay": decay,
        "train.ema_update_interval": interval,
    }
    if guard:
        remarks.append(
            "the ratio is centred for each sample; theirs also over the batch "
            '(train.guard_bias = "batch")'
        )

    # RealGen V1's scripts without guard add up the rewards' advantages; ours is their mean.
    divisor = 1.0
    weights = weights_of(theirs)
    if is_realgen(theirs) and not guard and len(weights) > 1:
        divisor = sum(abs(weight) for weight in weights.values())
        remarks.append(
            "their advantages of the rewards are added up, ours are averaged: beta, adv_clip_max "
            f"and max_grad_norm are divided by {divisor:g}, for the same update"
        )
    for key in ("beta", "adv_clip_max", "max_grad_norm"):
        values[f"train.{key}"] = theirs.number(f"train.{key}") / divisor

    for key in ("train.clip_range_lt", "train.clip_range_gt", "train.highclip_range"):
        other = theirs.get(key)
        if key in theirs.own and other != theirs.get("train.clip_range"):
            remarks.append(f"{key} = {other!r} is left out: train.clip_range is symmetric")
    return values


RULES: tuple[Callable[[Config, list[str]], dict[str, Any]], ...] = (
    model_keys,
    prompt_keys,
    reward_keys,
    call_keys,
    step_keys,
    guidance_keys,
    update_keys,
)


def learners(theirs: Config) -> dict[str, dict[str, Any]]:
    """Return {reward that learns: {key of adversary(): value}}, of RealGen V2."""
    if not is_second(theirs):
        return {}
    found: dict[str, dict[str, Any]] = {}
    for name in [name for name in LEARN if name in weights_of(theirs)]:
        found[name] = {}
        for key, entry in KEYS.items():
            value = theirs.get(key) if key.startswith("d_") else None
            if isinstance(value, dict):  # per detector, by their names
                value = value.get(name.replace("_", "-"))
            if value is None:
                continue
            if key == "d_batch_size":  # half from this epoch, half from earlier ones
                value //= 2
            for ours in entry.ours:
                found[name][ours.rpartition(".")[2]] = value
    return found
