"""The allowed values of every config key, and the check that all programs run before they load.

A new key needs a line in `base()` (realgen_jax/config.py) and a line here. What depends on several
keys, on files or on the devices is checked where these are known.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from realgen_jax.files import expand_home
from realgen_jax.ranges import (
    Range,
    boolean,
    choice,
    device,
    folder,
    folder_name,
    fraction,
    integer,
    is_integer,
    is_mapping,
    is_number,
    is_pattern,
    is_tuple,
    names,
    number,
    options,
    positive,
    text,
)

MISSING = object()  # the value of a key that a config lacks

# -- Ranges of single keys

MAPPING = Range("a mapping, such as {'clip_score': 1.0}", lambda value: is_mapping(value))
SEED = integer(0, 2**32 - 1)  # jax.random.key() drops the bits above
DTYPE = choice("float32", "bfloat16", "float16")
PORT = integer(0, 65535)
MESH_AXIS = Range(
    "an integer, 1 or more, or -1 for all remaining devices",
    lambda value: is_integer(value) and (value >= 1 or value == -1),
)
UP_TO_ONE = Range("a number above 0, up to 1", lambda value: is_number(value) and 0 < value <= 1)
INSIDE_ONE = Range(
    "a number between 0 and 1, such as 0.95", lambda value: is_number(value) and 0 < value < 1
)
EPOCHS = Range(
    "numbers of epochs, counted from 1, such as (3, 5)",
    lambda value: is_tuple(value, lambda epoch: is_integer(epoch) and epoch >= 1),
)
STEPS = Range(
    "two integers (first, end) with 0 <= first < end",
    lambda value: is_tuple(value, is_integer) and len(value) == 2 and 0 <= value[0] < value[1],
)
SIZES = Range(
    "pairs (width, height) in pixels, such as ((512, 512), (768, 512))",
    lambda value: is_tuple(
        value,
        lambda size: is_tuple(size, lambda side: is_integer(side) and side >= 1) and len(size) == 2,
    ),
)
BETAS = Range(
    "two numbers from 0 to below 1",
    lambda value: is_tuple(value, fraction().holds) and len(value) == 2,
)
CLIP_RANGE = Range(
    "two numbers above 0, below and above 1, such as (0.2, 0.28)",
    lambda value: (
        is_tuple(value, lambda side: is_number(side) and side > 0)
        and len(value) == 2
        and value[0] < 1
    ),
)
PATTERNS = Range(
    "regular expressions, such as (r'IMG_\\d+',)", lambda value: is_tuple(value, is_pattern)
)
TAME_ABOVE = Range(
    "mean, median, or a number as text, such as '0.2'",
    lambda value: isinstance(value, str) and re.fullmatch(r"mean|median|\d*\.?\d+", value),
)
WEIGHT = Range(
    "a finite number other than 0 (below 0: a penalty); to score a reward without training on it, "
    "name it in config.reward.held_out",
    lambda value: is_number(value) and value != 0,
)


# -- Keys. "*" stands for a name that the user chooses, of a reward or of a prompt set.

# Of adversary() in realgen_jax/config.py.
ADVERSARY = {
    "options": options(),
    "schedule": choice("threshold", "margin", "every", "plateau"),
    "threshold": number(),
    "margin": number(),
    "learn_epochs": integer(1),
    "cycle": integer(1),
    "patience": integer(1),
    "min_rise": number(0),
    "always_first": boolean(),
    "skip_generator": boolean(),
    "optimizer": choice("adam", "adamw"),
    "learning_rate": positive(),
    "betas": BETAS,
    "weight_decay": number(0),
    "batch_size": integer(0),
    "history_batch_size": integer(0),
    "history_size": integer(0),
    "max_passes": integer(1),
    "target_accuracy": number(0),  # above 1: never reached
    "ema_decay": fraction(),
    "codec": choice("none", "jpeg"),
    "quality": integer(1, 95),
    "deadline": positive(),
}

# Of train.nft and train.awm in realgen_jax/config.py.
DECOUPLED = {
    "sigmas": integer(1),
    "draw": choice("permuted", "strata"),
    "first_step": integer(0),
    "fraction": UP_TO_ONE,
    "least_sigma": fraction(),
    "old_rate": number(0),
    "old_delay": integer(0),
    "old_most": fraction(),
}

# Of base() in realgen_jax/config.py.
RANGES = {
    "preset": folder_name(),
    "stage": choice("diffusion", "rewriter"),
    "seed": SEED,
    "run_name": folder_name(empty=True),
    "run_root": folder(),
    "num_epochs": integer(0),  # 0: only the evaluation
    "save_freq": integer(1),
    "num_checkpoint_limit": integer(1),
    "save_failure": choice("stop", "continue"),
    "preemption_grace": number(0),
    "eval_freq": integer(1),
    "wandb_project": text(),
    "compilation_cache": text(),
    "profile.steps": EPOCHS,
    "mesh.data": MESH_AXIS,
    "mesh.fsdp": MESH_AXIS,
    "mesh.tensor": MESH_AXIS,
    "preflight.devices": integer(1),
    "preflight.mfu": UP_TO_ONE,
    "pretrained.model": text(),
    "pretrained.family": text(),
    "pretrained.transformer": text(),
    "pretrained.vae": text(),
    "pretrained.lora": text(),
    "pretrained.dtype": DTYPE,
    "pretrained.param_dtype": DTYPE,
    "pretrained.vae_dtype": DTYPE,
    "pretrained.vae_tile": integer(0),
    "pretrained.quantization": choice("", "fp8", "int8", "nf4"),
    "pretrained.offload": boolean(),
    "pretrained.remat": choice("full", "attention", "dots", "none"),
    "prompts.train": text(),
    "prompts.test": text(),
    "prompts.max_tokens": integer(1),
    "prompts.cache": folder(),
    "prompts.dtype": choice("float32", "bfloat16"),
    "prompts.device": device(),
    "sample.width": integer(1),
    "sample.height": integer(1),
    "sample.buckets": SIZES,
    "sample.num_steps": integer(1),
    "sample.guidance_scale": number(0),
    "sample.train_batch_size": integer(1),
    "sample.num_image_per_prompt": integer(2),  # an advantage compares the images of a group
    "sample.branches": integer(1),
    "sample.same_latent": boolean(),
    "sample.num_batches_per_epoch": integer(1),
    "sample.solver": choice("euler", "dpm2"),
    "sample.cached_steps": integer(0),
    "sample.sde_type": choice("sde", "cps", "dance"),
    "sample.noise_level": positive(),
    "sample.noise_schedule": choice("constant", "cosine"),
    "sample.noise_least": number(0),
    "sample.sde_window_size": integer(1),
    "sample.sde_window_range": STEPS,
    "sample.sde_window.strategy": choice("random", "progressive", "decay", "exp_decay"),
    "sample.sde_window.epochs": integer(1),
    "sample.sde_window.stride": integer(0),
    "sample.sde_window.rollback": boolean(),
    "sample.sde_window.most": integer(1),
    "sample.sde_window.least": integer(1),
    "sample.sde_window.threshold": integer(0),
    "sample.sde_window.rate": number(0),
    "sample.sde_window.trained_steps": integer(0),
    "sample.sde_window.after": Range(
        "a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1
    ),
    "sample.scout.previews": integer(0),
    "sample.scout.num_steps": integer(1),
    "sample.scout.solver": choice("euler", "dpm2"),
    "sample.scout.select": choice("best_worst", "mean_deviation"),
    "sample.global_std": boolean(),
    "sample.test_batch_size": integer(1),
    "sample.test_images_per_prompt": integer(1),
    "train.lora": boolean(),
    "train.lora_rank": integer(1),
    "train.lora_alpha": positive(),
    "train.lora_init": choice("gaussian", "kaiming"),
    "train.loss": text(),
    "train.cfg_gradient": choice("", "both", "bound"),
    "train.guard_bias": choice("sample", "batch"),
    "train.kl": choice("velocity", "mean", "mean_reference"),
    "train.beta": number(0),
    "train.clip_range": positive(),
    "train.adv_clip_max": positive(),
    "train.advantages": text(),
    "train.tame_above": TAME_ABOVE,
    "train.learning_rate": positive(),
    "train.adam_beta1": fraction(),
    "train.adam_beta2": fraction(),
    "train.adam_epsilon": positive(),
    "train.adam_weight_decay": number(0),
    "train.max_grad_norm": positive(),
    "train.gradient_accumulation_steps": integer(1),
    "train.num_inner_epochs": integer(1),
    "train.ema_decay": fraction(),
    "train.ema_update_interval": integer(1),
    "train.offload": boolean(),
    "train.recompute_old": boolean(),
    "train.norm_guard.weight": number(0),
    "train.norm_guard.limit": positive(),
    "train.kl_gate.against": names(),
    "train.kl_gate.share": UP_TO_ONE,
    "train.kl_gate.least": UP_TO_ONE,
    "train.kl_gate.most": UP_TO_ONE,
    "train.dppo.threshold": positive(),
    "train.dppo.per_variance": boolean(),
    "train.nft.mix": positive(),
    "train.nft.advantages": choice("all", "positive_only", "negative_only", "one_only", "binary"),
    "train.awm.weighting": choice("plain", "ghuber", "t", "t2", "huber"),
    "train.awm.advantage_max": positive(),
    "train.awm.clip_range": positive(),
    "train.awm.beta_ema": number(0),
    "train.awm.kl_weight": choice("uniform", "elbo"),
    "train.awm.off_policy": boolean(),
    **{f"train.nft.{key}": allowed for key, allowed in DECOUPLED.items()},
    **{f"train.awm.{key}": allowed for key, allowed in DECOUPLED.items()},
    "rewriter.path": text(),
    "rewriter.adapter": text(),
    "rewriter.system": text(),
    "rewriter.thinking": boolean(),
    "rewriter.answer_tag": Range(
        "letters, such as 'answer', or ''",
        lambda value: isinstance(value, str) and (not value or value.isidentifier()),
    ),
    "rewriter.dtype": choice("float32", "bfloat16"),
    "rewriter.param_dtype": choice("float32", "bfloat16"),
    "rewriter.remat": choice("full", "attention", "dots", "none"),
    "rewriter.prompts_per_epoch": integer(1),
    "rewriter.rewrites_per_prompt": integer(2),  # an advantage compares the rewrites of a group
    "rewriter.images_per_rewrite": integer(1),
    "rewriter.max_prompt_tokens": integer(1),
    "rewriter.max_new_tokens": integer(1),
    "rewriter.temperature": positive(),
    "rewriter.loss": choice("grpo", "gspo"),
    "rewriter.aggregate": choice("token", "sequence", "constant"),
    "rewriter.clip_range": CLIP_RANGE,
    "rewriter.importance_cap": number(0),
    "rewriter.microbatch": integer(1),
    "rewriter.logit_chunk": integer(1),
    "rewriter.min_words": integer(0),
    "rewriter.max_words": integer(1),
    "rewriter.text_rewards.*": number(),
    "rewriter.spam_patterns": PATTERNS,
    "rewriter.max_unusable": UP_TO_ONE,
    "reward.fn.*": WEIGHT,
    "reward.held_out": names(),
    "reward.watched": names(),
    "reward.metrics": names(),
    "reward.score_original": boolean(),
    "reward.options.*": options(),
    "reward.device": device(),
    "reward.share_gpu": boolean(),
    "reward.devices.*": device(),
    "reward.batch_size": integer(0),
    "reward.deadline": positive(),
    "reward.retries": integer(0),
    "reward.monitor": text(),
    "reward.stop_drop": number(0),
    "reward.stop_patience": integer(0),
    **{f"reward.adversarial.*.{key}": allowed for key, allowed in ADVERSARY.items()},
    "reward.references.path": text(),
    "reward.references.root": text(),
    "evaluate.prompts.*": text(),
    "evaluate.images_per_prompt": integer(1),
    "evaluate.benchmarks.geneval": text(),
    "evaluate.benchmarks.dpg": text(),
    "evaluate.benchmarks.partiprompts": text(),
    "evaluate.benchmarks.ocr": text(),
    "evaluate.category_mean": boolean(),
    "evaluate.sample.width": integer(1),
    "evaluate.sample.height": integer(1),
    "evaluate.sample.num_steps": integer(1),
    "evaluate.sample.solver": choice("euler", "dpm2"),
    "evaluate.sample.tuned_share": UP_TO_ONE,
    "evaluate.sample.guidance_scale": number(0),
    "evaluate.batch_size": integer(1),
    "evaluate.scores": names(),
    "evaluate.detectors": names(),
    "evaluate.confidence": INSIDE_ONE,
    "evaluate.resamples": integer(1),
    "evaluate.report_prompts": integer(1),
    "evaluate.after_training": boolean(),
    "evaluate.arena.protocol": choice("balanced", "realgen"),
    "evaluate.arena.pairs": choice("all", "photographs", "first"),
    "evaluate.arena.prompts": integer(0),
    "evaluate.arena.concurrency": integer(1),
    "evaluate.arena.requests_per_minute": number(0),
    "evaluate.arena.timeout": positive(),
    "evaluate.arena.attempts": integer(1),
    "evaluate.arena.max_failures": integer(1),
    "evaluate.arena.port": PORT,
}

# Of base() in configs/serve_rewards.py.
SERVER_RANGES = {
    "host": text(),
    "port": PORT,
    "rewards": names(),
    "options.*": options(),
    "device": device(),
    "devices.*": device(),
    "batch_size": integer(0),
    "deadline": positive(),
    "retries": integer(0),
    "limits.body_mib": positive(),
    "limits.held_mib": positive(),
    "limits.images": integer(1),
    "limits.waiting": integer(1),
    "limits.batch": integer(1),
    "limits.gather": number(0),
    "limits.upload": positive(),
}

# Folders that are created if they do not exist, by default in the user's home.
CACHES = ("compilation_cache", "prompts.cache")


# -- Checks


def wrong_values(config: ConfigDict, ranges: Mapping[str, Range] = RANGES) -> list[str]:
    """Return one line for each value out of its range, with key, value and what is allowed."""
    problems = []
    for pattern, allowed in {**_sections(ranges), **ranges}.items():
        for key, value in _values(config, pattern.split("."), "config"):
            if not allowed.holds(value):
                problems.append(f"{key} is {shown(value)}; expected {allowed.words}")

    return problems + _impossible_caches(config, [key for key in CACHES if key in ranges])


def range_of(key: str, ranges: Mapping[str, Range]) -> Range | None:
    """Return the range of a key or section, such as "reward.fn.clip_score", or None."""
    for pattern, allowed in {**_sections(ranges), **ranges}.items():
        if pattern.count(".") == key.count(".") and fnmatchcase(key, pattern):
            return allowed
    return None


def takes_new_names(key: str, ranges: Mapping[str, Range]) -> bool:
    """Return whether the value of a key is a mapping whose names the user chooses."""
    sections = [pattern.partition(".*")[0] for pattern in ranges if "*" in pattern]
    return key in sections or range_of(key, ranges) not in (None, MAPPING)


def shown(value: Any) -> str:
    """Return a value as a config file would have it, in one line."""
    if value is MISSING:
        return "missing"
    return repr(value.to_dict() if isinstance(value, ConfigDict) else value)


def _sections(ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Return the range of everything that contains keys."""
    parents = {}
    for pattern in ranges:
        parts = pattern.split(".")
        for end in range(1, len(parts)):
            parents[".".join(parts[:end])] = MAPPING
    return parents


def _values(tree: Any, pattern: Sequence[str], key: str) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) for every key that the pattern, split at its dots, stands for."""
    if not pattern:
        yield key, tree
    elif is_mapping(tree):
        name, *rest = pattern
        for child in list(tree) if name == "*" else [name]:
            yield from _values(tree.get(child, MISSING), rest, f"{key}.{child}")


def _impossible_caches(config: ConfigDict, keys: Sequence[str]) -> list[str]:
    """Return lines about the folders at these keys that this user cannot create."""
    problems = []
    homeless = []
    for key in keys:
        value = dict(_values(config, key.split("."), "")).get(f".{key}")
        folder = os.fspath(expand_home(value)) if isinstance(value, str) else ""
        if folder.startswith("~"):
            homeless.append(key)
        elif folder and not os.path.exists(folder):
            parents = [str(parent) for parent in Path(folder).absolute().parents]
            parent = next(filter(os.path.exists, parents))
            if not (os.path.isdir(parent) and os.access(parent, os.W_OK)):
                problems.append(
                    f"config.{key} is {value!r}, which cannot be created: this user cannot write "
                    f"into {parent}"
                )

    if homeless:
        names = " and ".join(f"config.{key}" for key in homeless)
        flags = " ".join(f"--config.{key}=FOLDER" for key in homeless)
        problems.append(
            f"{names}: '~' is the user's home folder, and this user has none; set HOME, or name "
            f"other folders: {flags}"
        )
    return problems
