"""Write a config of Flow-GRPO or RealGen as a config file of ours."""

import math
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from ml_collections import ConfigDict

from realgen_jax.config import base
from realgen_jax.config_ranges import wrong_values
from realgen_jax.convert_config.keys import KEYS, MODELS, REWARDS
from realgen_jax.convert_config.reading import Config

# Keys without a counterpart, and their values that change nothing.
HARMLESS = {
    "sample.kl_reward": 0,
    "train.sft": 0,
    "train.preset_lora_path": "",
    "per_prompt_stat_tracking": True,
    "train.use_8bit_adam": False,
}
DTYPES = {"fp16": "bfloat16", "bf16": "bfloat16", "no": "float32"}
EMA = {True: (0.9, 8), False: (0.0, 1)}
# Key of RealGen V2's detectors -> keys of `adversary()`.
DETECTORS = {
    "d_lr": ("learning_rate",),
    "d_threshold": ("threshold",),
    "d_batch_size": ("batch_size", "history_batch_size"),
    "d_target_acc": ("target_accuracy",),
    "d_max_epochs": ("max_passes",),
    "d_buffer_size": ("history_size",),
}
LEARN = ("omniaid", "omniaid_dino")  # the rewards that learn in RealGen V2


class Conversion:
    """What a config becomes: our keys with their values, and remarks on what differs.

    remarks: what the converted run does differently. left_out: {key of theirs: why it has no
    counterpart}. Raises ValueError, in one line, for a model, reward or number that has none.
    """

    def __init__(self, theirs: Config, gpus: int | None) -> None:
        self.theirs = theirs
        self.gpus = gpus or theirs.gpus
        if not self.gpus:
            raise ValueError("the preset has no gpu_number; pass --gpus, the GPUs that train")
        self.values: dict[str, Any] = {}
        self.remarks: list[str] = []
        self.detectors: list[str] = []  # the rewards that learn

        self.left_out = {}
        for key, value in theirs.values.items():
            entry = KEYS.get(key)
            if entry is None:
                self.remarks.append(f"{key} = {value!r} is not known, and left out")
            elif not entry.ours:
                self.left_out[key] = entry.note
            elif entry.same and value is not None:
                self.values[entry.ours[0]] = value
            if value != HARMLESS.get(key, value):
                self.remarks.append(f"{key} = {value!r} has no counterpart, but changes training")

        self.model()
        self.prompts()
        self.precision()
        self.rewards()
        self.calls()
        self.window()
        self.guidance()
        self.update()
        self.check()

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key of theirs."""
        value = self.theirs.values.get(key)
        return default if value is None else value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number of theirs. Raises ValueError if it is something else."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{key} is {value!r}; expected a number")
        return value

    def model(self) -> None:
        name = str(self.get("pretrained.model", ""))
        parts = [part for part in MODELS if part in name.lower() and "kontext" not in name.lower()]
        if not parts:
            raise ValueError(
                f"pretrained.model is {name!r}; expected FLUX.1-dev, Stable Diffusion 3.5 or "
                "Z-Image"
            )
        family, rank, alpha = MODELS[parts[0]]
        self.family = family.partition(":")[0]
        self.values["pretrained.family"] = family
        self.values["pretrained.model"] = name
        if re.fullmatch(r"[\w-]+/[\w.-]+", name):
            self.values["pretrained.model"] = f"models/{name.rpartition('/')[2]}"
            self.remarks.append(
                f"hf download {name} --local-dir {self.values['pretrained.model']}: models are "
                "folders here"
            )
        self.values["train.lora_rank"] = rank
        self.values["train.lora_alpha"] = alpha
        self.remarks.append(
            f"LoRA of rank {rank} and alpha {alpha:g}, which are constants of their scripts"
        )
        size = int(self.number("resolution"))
        self.values |= {"sample.width": size, "sample.height": size}

    def prompts(self) -> None:
        folder = str(self.get("dataset", ""))
        if not folder:
            raise ValueError("dataset is empty; expected the folder of the prompts")
        self.second = "d_threshold" in self.theirs.values  # RealGen V2
        self.realgen = self.second or self.get("prompt_fn") == "realgen"
        files = ("train.txt", "test.txt")
        if self.get("prompt_fn") == "geneval":
            files = ("train_metadata.jsonl", "test_metadata.jsonl")
        elif self.second:
            files = ("train.jsonl", "test.txt")
        self.values["prompts.train"] = str(PurePosixPath(folder) / files[0])
        self.values["prompts.test"] = str(PurePosixPath(folder) / files[1])

    def precision(self) -> None:
        name = self.get("mixed_precision", "no")
        if name not in DTYPES:
            raise ValueError(f"mixed_precision is {name!r}; expected one of {', '.join(DTYPES)}")
        for key in KEYS["mixed_precision"].ours:
            self.values[key] = DTYPES[name]
        if name == "fp16":
            self.remarks.append("bfloat16 instead of float16")

    def rewards(self) -> None:
        rewards = self.get("reward_fn")
        if not isinstance(rewards, dict) or not rewards:
            raise ValueError(f"reward_fn is {rewards!r}; expected {{reward: weight}}")
        self.weights = {}
        for name, weight in rewards.items():
            if name in REWARDS:
                ours, options = REWARDS[name]
                self.weights[ours] = float(weight)
                if self.second and ours == "omniaid":
                    options = {"path": options["path"]}
                self.values[f"reward.options.{ours}"] = options
            else:
                self.remarks.append(f"reward {name!r} has no counterpart, and is left out")
        if not self.weights:
            raise ValueError(
                f"reward_fn is {rewards!r}; expected one of the rewards {', '.join(REWARDS)}"
            )
        self.values["reward.fn"] = self.weights
        self.values["train.advantages"] = "per_reward"
        if len(self.weights) > 1 and not self.realgen:
            self.values["train.advantages"] = "weighted_sum"
        if self.second:
            self.detectors = [name for name in LEARN if name in self.weights]
            if self.detectors:
                self.values["reward.references.path"] = self.values["prompts.train"]
                self.values["reward.references.root"] = str(self.get("dataset"))
        self.values["evaluate.scores"] = tuple(self.weights)

    def calls(self) -> None:
        """Images of a call: theirs per GPU, ours of all."""
        branches = int(self.number("sample.mini_num_image_per_prompt", 1))
        per_gpu = int(self.number("sample.train_batch_size")) * branches
        self.values["sample.branches"] = branches
        self.values["sample.train_batch_size"] = per_gpu * self.gpus
        tests = int(self.number("sample.test_batch_size")) * self.gpus
        self.values["sample.test_batch_size"] = tests
        self.values["evaluate.batch_size"] = tests
        self.values["preflight.devices"] = self.gpus

        images = per_gpu * self.gpus * int(self.number("sample.num_batches_per_epoch"))
        group = int(self.number("sample.num_image_per_prompt"))
        if images % group:
            raise ValueError(
                f"an epoch has {images} images on {self.gpus} GPUs, which groups of {group} do not "
                "divide; pass another --gpus"
            )

    def window(self) -> None:
        steps = int(self.number("sample.num_steps"))
        evaluated = int(self.number("sample.eval_num_steps"))
        last = 1 if self.family == "ZImagePipeline" else 0  # its last step is void
        self.values["sample.num_steps"] = steps - last
        self.values["evaluate.sample.num_steps"] = evaluated - last

        trained = self.get("sample.train_num_steps")
        size = self.get("sample.sde_window_size") if self.sets("sample.sde_window_size") else 0
        if trained:
            span = (0, steps // 2 + int(trained))
            size = trained
        elif size:
            span = self.get("sample.sde_window_range")
        else:
            size = min(int(steps * self.number("train.timestep_fraction", 1.0)), steps - 1 - last)
            span = (0, size)
            self.remarks.append(
                f"noise in the first {size} of {steps - last} steps, those that are trained on; "
                "theirs also has noise in the others, but the last one"
            )
        self.values["sample.sde_window_size"] = int(size)
        self.values["sample.sde_window_range"] = tuple(span)

    def sets(self, key: str) -> bool:
        """Return whether the preset itself sets a key."""
        return key in self.theirs.own

    def guidance(self) -> None:
        scale = float(self.number("sample.guidance_scale"))
        self.values["sample.guidance_scale"] = scale
        evaluated = scale
        if self.sets("sample.eval_guidance_scale"):
            evaluated = float(self.number("sample.eval_guidance_scale"))
        self.values["evaluate.sample.guidance_scale"] = evaluated

        offset = {"StableDiffusion3Pipeline": 0.0, "ZImagePipeline": 1.0}.get(self.family)
        if offset is not None and scale + offset > 1:
            first = self.realgen and not self.second
            self.values["train.cfg_gradient"] = "bound" if first else "both"

    def update(self) -> None:
        guard = bool(self.get("rationorm", False))
        self.values["train.loss"] = "guard" if guard else "grpo"
        self.values["train.kl"] = "velocity" if self.get("train.vkl") else "mean_reference"
        decay, interval = EMA[bool(self.get("train.ema"))]
        self.values |= {"train.ema_decay": decay, "train.ema_update_interval": interval}
        if guard:
            self.remarks.append(
                "the ratio is centred for each sample; theirs also over the batch "
                '(train.guard_bias = "batch")'
            )

        # RealGen V1's scripts without guard add up the rewards' advantages; ours is their mean.
        divisor = 1.0
        if self.realgen and not guard and len(self.weights) > 1:
            divisor = sum(abs(weight) for weight in self.weights.values())
            self.remarks.append(
                f"their advantages of the rewards are added up, ours are averaged: beta, "
                f"adv_clip_max and max_grad_norm are divided by {divisor:g}, for the same update"
            )
        for key in ("beta", "adv_clip_max", "max_grad_norm"):
            self.values[f"train.{key}"] = self.number(f"train.{key}") / divisor

        for key in ("clip_range_lt", "clip_range_gt", "highclip_range"):
            other = self.get(f"train.{key}")
            if self.sets(f"train.{key}") and other != self.get("train.clip_range"):
                self.remarks.append(
                    f"train.{key} = {other!r} is not converted: train.clip_range is symmetric"
                )

    def check(self) -> None:
        """Give numbers the types of our keys; raise ValueError for values that ours refuses."""
        config = base()
        for key, value in self.values.items():
            *parents, name = key.split(".")
            section = config
            for parent in parents:
                section = section[parent]
            if type(value) is int and type(section.get(name)) is float:
                value = float(value)
                self.values[key] = value
            try:
                section[name] = ConfigDict(value) if isinstance(value, dict) else value
            except TypeError as error:
                raise ValueError(f"config.{key} is {value!r}; {error}") from error
        problems = wrong_values(config)
        if problems:
            raise ValueError(problems[0])


def file_text(conversion: Conversion, source: str, preset: str) -> str:
    """Return the text of a config file of ours. source: the name of their file."""
    lines = [f'"""{source}, preset {preset}, by python -m realgen_jax.convert_config.', ""]
    lines += listing(conversion)
    lines += ['"""', "", "from ml_collections import ConfigDict", ""]
    helper = "adversary, base" if conversion.detectors else "base"
    lines += [f"from realgen_jax.config import {helper}", "", "", "def get_config():"]
    lines += ["    c = base()", f'    c.preset = "{preset}"']
    for key, value in sorted(conversion.values.items()):
        shown = f"ConfigDict({value!r})" if isinstance(value, dict) else repr(value)
        lines.append(f"    c.{key} = {shown}")
    for name in conversion.detectors:
        lines += ["", *(f"    {line}" for line in learner_lines(conversion, name))]
    return "\n".join([*lines, "    return c", ""])


def listing(conversion: Conversion) -> list[str]:
    """Return lines about what differs and what is left out."""
    lines = ["Different:", *(f"- {remark}" for remark in conversion.remarks)]
    lines += ["", "Left out:"]
    return lines + [f"- {key}: {reason}" for key, reason in conversion.left_out.items()]


def learner_lines(conversion: Conversion, name: str) -> Iterator[str]:
    """Yield the statements for a detector that learns."""
    yield f"c.reward.adversarial.{name} = adversary()"
    for key, ours in DETECTORS.items():
        value = conversion.get(key)
        if isinstance(value, dict):
            value = value.get(name, value.get(name.replace("_", "-")))
        if value is None:
            continue
        if key == "d_batch_size":
            value //= 2
        for setting in ours:
            yield f"c.reward.adversarial.{name}.{setting} = {value!r}"
