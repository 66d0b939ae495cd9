"""How a trained part is written to files: as diffusers reads it, or as transformers and peft do."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from realgen_jax.hosts import process_index
from realgen_jax.nn.export import save_folder, to_torch
from realgen_jax.nn.lora import LoraConfig, save_lora, save_peft
from realgen_jax.nn.lora_files import MERGE, MERGE_PEFT, MERGED
from realgen_jax.nn.tensors import read_json

# Fields of a family's Config that are not in config.json.
NOT_SIZES = ("dtype", "param_dtype", "remat", "quantization", "image_size")

# Files of a language model's folder, other than its weights, that belong to an exported folder too.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Format:
    """How the trained part of a kind of model is written; `model` is the model it belongs to.

    save_adapters(model, folder, adapters, LoRA config): called by the first process. save_weights(
    model, folder, weights): called by all processes. For error messages: merge, what to do with a
    LoRA that is not read; merge_read, with one that is read but cannot be trained on; start, the
    option that names adapters to start from; weights, the one that names weights.
    """

    save_adapters: Callable[[Any, Path, nnx.State, LoraConfig], None]
    save_weights: Callable[[Any, Path, nnx.State], None]
    merge: str
    merge_read: str
    start: str
    weights: str


def file_config(family: Any, config: Any) -> dict[str, Any]:
    """The transformer's config.json as diffusers writes it."""
    entries = {"_class_name": family.transformer, **family.config_entries}
    for name, value in asdict(config).items():
        if name not in NOT_SIZES:
            entries[name] = value
    return entries


def _save_diffusers_lora(model: Any, folder: Path, adapters: nnx.State, lora: LoraConfig) -> None:
    save_lora(folder, adapters, lora, model.family.table(model.config))


def _save_diffusers_weights(model: Any, folder: Path, weights: nnx.State) -> None:
    """Write `folder`/transformer."""
    config = file_config(model.family, model.config)
    table = model.family.table(model.config)
    save_folder(Path(folder) / "transformer", to_torch(weights, table), config)


DIFFUSERS = Format(
    save_adapters=_save_diffusers_lora,
    save_weights=_save_diffusers_weights,
    merge=MERGE,
    merge_read=f"merge it with scripts/export.py --merge {MERGED}",
    start="config.pretrained.lora",
    weights="a transformer with config.pretrained.transformer",
)


def _save_peft_lora(model: Any, folder: Path, adapters: nnx.State, lora: LoraConfig) -> None:
    table = model.family.table(model.config)
    save_peft(folder, adapters, lora, table, model.folder, "CAUSAL_LM")


def _save_transformers_weights(model: Any, folder: Path, weights: nnx.State) -> None:
    """Write a whole Hugging Face folder: weights, and the other files of the folder loaded from."""
    folder = Path(folder)
    source = Path(model.folder)
    config = read_json(source / "config.json")
    config.pop("torch_dtype", None)  # the name of "dtype" before transformers 5
    config["dtype"] = "float32"
    table = model.family.table(model.config)
    save_folder(folder, to_torch(weights, table), config, stem="model")

    if process_index() == 0:
        for name in COMPANIONS:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)


TRANSFORMERS = Format(
    save_adapters=_save_peft_lora,
    save_weights=_save_transformers_weights,
    merge=MERGE_PEFT,
    merge_read=MERGE_PEFT,
    start="config.rewriter.adapter",
    weights="a folder with config.rewriter.path",
)
