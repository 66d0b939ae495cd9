"""Qwen3 as a language model's family, and its config.json."""

from pathlib import Path
from typing import Any

from realgen_jax.models.language_family import LanguageFamily
from realgen_jax.models.qwen.tables import EMBEDDING, HEAD, LORA_TARGETS, RULES, TRANSFORMERS
from realgen_jax.models.qwen.transformer import Qwen3, Qwen3Config
from realgen_jax.nn.tensors import config_from, read_json

# Entries whose values are the only ones that the network computes.
FIXED = {
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "quantization_config": None,
}

# Entries that change nothing here: notes, sizes of what is not used, and generation's.
IGNORED = (
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "max_window_layers",
    "pad_token_id",
    "sliding_window",  # only used if use_sliding_window
    "torch_dtype",
    "transformers_version",
    "use_cache",
)

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "tie_word_embeddings",
)


def read_config(folder: Path, **overrides: Any) -> Qwen3Config:
    """Return the sizes in a Hugging Face folder's config.json; overrides: fields of Qwen3Config.

    Raises FileNotFoundError if the file is missing, ValueError naming an entry of another model.
    """
    file = folder / "config.json"
    values = read_json(file)
    if values.get("model_type") != "qwen3":
        raise ValueError(f"{file} has model_type {values.get('model_type')!r}; expected 'qwen3'")

    # Layers that see a window only, and positions that are scaled for long texts.
    for kind in values.pop("layer_types", None) or ():
        if kind != "full_attention":
            raise ValueError(f"{file} has layer_types {kind!r}; expected 'full_attention' alone")
    values["rope_theta"] = _rope_theta(file, values)

    known = {name: value for name, value in values.items() if name not in IGNORED}
    return config_from(Qwen3Config, file, known, FIXED, REQUIRED, **overrides)


def _rope_theta(file: Path, values: dict[str, Any]) -> float | None:
    """Take the entries on rotary positions out of `values`, and return theta.

    transformers 5 writes all of them into rope_parameters; older versions rope_theta and
    rope_scaling.
    """
    parameters = {"rope_theta": values.pop("rope_theta", None)}
    for name in ("rope_scaling", "rope_parameters"):
        entries = dict(values.pop(name, None) or {})
        kind = entries.pop("rope_type", entries.pop("type", "default"))
        if kind != "default":
            raise ValueError(f"{file} has rope_type {kind!r} in {name}; expected 'default'")
        for key, value in entries.items():
            if key != "rope_theta" or parameters.get(key) not in (None, value):
                raise ValueError(
                    f"{file} has {key} {value!r} in {name}; expected rope_type 'default' and one "
                    "rope_theta"
                )
            parameters[key] = value
    return parameters["rope_theta"]


QWEN3 = LanguageFamily(
    name="qwen3",
    published="Qwen3-4B-Instruct-2507",
    Config=Qwen3Config,
    Module=Qwen3,
    read_config=read_config,
    table=lambda config: TRANSFORMERS,
    lora_targets=lambda config: LORA_TARGETS,
    rules=RULES,
    tied=(EMBEDDING, HEAD),
    download=(
        "run\n"
        "    hf download Qwen/Qwen3-4B-Instruct-2507 --local-dir models/Qwen3-4B-Instruct-2507\n"
        "and name the folder with --config.rewriter.path=models/Qwen3-4B-Instruct-2507"
    ),
)
