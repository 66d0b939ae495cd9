"""The strength of a LoRA: what peft, diffusers and the trainers state of it beside its factors."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realgen_jax.nn.lora import PEFT_CONFIG, PEFT_FILE
from realgen_jax.nn.tensors import Tensors, read_json

# Entries of peft's config that change more than the product B A; they must be off.
VARIANTS = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# How the factors may have started; the other ways of peft change the model's own weights too.
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def module_scales(
    tensors: Tensors, ranks: Mapping[str, int], alpha_keys: Mapping[str, str], merge: str
) -> dict[str, float]:
    """{module: factor of B A} by peft's config, the file's header, or tensors named ".alpha"."""
    alphas = _alpha_tensors(tensors, ranks, alpha_keys)
    source, settings = _settings(tensors, bool(alphas))
    _check_settings(source, settings, merge)
    scales = {}
    for module, rank in ranks.items():
        if _stated(source, settings, "rank_pattern", "r", module) not in (None, rank):
            raise ValueError(f"{module} in {tensors.path} has rank {rank}, unlike in {source}")
        alpha = _stated(source, settings, "alpha_pattern", "lora_alpha", module)
        if alpha is not None and alphas.get(module, alpha) != alpha:
            raise ValueError(
                f"{source} has alpha {alpha:g} for {module}, but {alpha_keys[module]} is "
                f"{alphas[module]:g}"
            )
        if alpha is None:
            alpha = alphas.get(module, float(rank))
        if not 0 < alpha < math.inf:
            raise ValueError(f"{source} has alpha {alpha:g} for {module}; expected above 0")
        scales[module] = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    return scales


def _alpha_tensors(
    tensors: Tensors, ranks: Mapping[str, int], alpha_keys: Mapping[str, str]
) -> dict[str, float]:
    """{module: alpha} of the tensors named ".alpha"."""
    alphas = {}
    for module, key in alpha_keys.items():
        value = tensors.read(key)
        if module not in ranks or value.size != 1:
            raise ValueError(
                f"{tensors.path} holds {key} of shape {value.shape}; expected one number for a "
                "module with lora_A and lora_B"
            )
        alphas[module] = float(value.reshape(()))
    return alphas


def _settings(tensors: Tensors, has_alphas: bool) -> tuple[Path, dict[str, Any]]:
    """peft's config of the LoRA and the file that holds it; {} if nothing is stated.

    peft writes a file beside its own tensors, whose names begin with "base_model.model."; diffusers
    an entry of the header, for the transformer and the text encoders together.
    """
    file = tensors.path
    config = file.with_name(PEFT_CONFIG)
    header = tensors.metadata().get("lora_adapter_metadata")
    pefts = any(key.startswith("base_model.model.") for key in tensors.keys())  # noqa: SIM118
    if pefts or file.name == PEFT_FILE:
        if config.exists():
            settings = read_json(config)
            if settings.get("lora_alpha") is None:
                raise ValueError(f"{config} lacks lora_alpha")
            return config, settings
        if not header and not has_alphas:
            raise FileNotFoundError(f"{config} is missing; it states the alpha of {file.name}")

    try:
        entries = json.loads(header or "{}")
    except ValueError as error:
        raise ValueError(f"lora_adapter_metadata of {file} is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise ValueError(f"lora_adapter_metadata of {file} is no JSON object")
    own = {}
    for name, value in entries.items():
        part, _, rest = name.rpartition(".")
        if part in ("", "transformer"):
            own[rest] = value
    if own and own.get("lora_alpha") is None:
        raise ValueError(f"lora_adapter_metadata of {file} lacks lora_alpha")
    return file, own


def _check_settings(source: Path, settings: Mapping[str, Any], merge: str) -> None:
    """Raise ValueError for a LoRA that is more than a product B A on the model's own weights."""
    if settings.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{source} has peft_type {settings['peft_type']!r}; expected 'LORA'")
    for name in VARIANTS:
        if settings.get(name):
            raise ValueError(
                f"{source} has {name} {settings[name]!r}: "
                f"{'a DoRA' if name == 'use_dora' else 'it'} is not read; {merge}"
            )
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{source} has bias {settings['bias']!r}, which is not read; {merge}")
    if settings.get("init_lora_weights") not in STARTS:
        raise ValueError(
            f"{source} has init_lora_weights {settings['init_lora_weights']!r}, which changes the "
            "model's own weights; convert it to a plain LoRA with peft's "
            "path_initial_model_for_weight_conversion"
        )


def _stated(
    source: Path, settings: Mapping[str, Any], patterns: str, default: str, module: str
) -> float | None:
    """A module's alpha or rank in peft's config; None if it states none.

    It is that of the first pattern which matches the module's whole name or its end. A pattern is a
    regular expression, as in peft.
    """
    value = settings.get(default)
    try:
        for pattern, own_value in (settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                value = own_value
                break
        return None if value is None else float(value)
    except (re.error, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{patterns} or {default} in {source} is invalid: {error}") from error
