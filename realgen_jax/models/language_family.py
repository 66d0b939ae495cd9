"""The interface of a language model's family: a folder of realgen_jax/models, one in LANGUAGES."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flax import nnx

from realgen_jax.models.formats import TRANSFORMERS, Format
from realgen_jax.nn.convert import Table
from realgen_jax.sharding import Rules

# A new family is one folder and one line here: model_type of config.json -> "module:Family".
LANGUAGES = {"qwen3": "realgen_jax.models.qwen.family:QWEN3"}


@dataclass(frozen=True, eq=False)
class LanguageFamily:
    """Everything the programs need from a language model's family.

    name: the "model_type" of its config.json. published: the model that Config's defaults are,
        which is assumed where none is on disk.
    Config: dataclass of the sizes under transformers' names, with num_attention_heads,
        num_key_value_heads, tie_word_embeddings, dtype, param_dtype and remat.
    Module: Module(config, rngs) is the network, with the methods of models/qwen's Qwen3.
    read_config(folder, **overrides): a Config from the folder's config.json.
    table(config): how the folder's weights fill the network. tied: the names there of embedding and
        head, which are one array if tie_word_embeddings.
    lora_targets(config): paths of the projections that get adapters. rules: how parameters are
        sharded. form: how the trained part is written to files.
    download: how to get the published model, for error messages.
    """

    name: str
    published: str
    Config: type
    Module: type[nnx.Module]
    read_config: Callable[..., Any]
    table: Callable[[Any], Table]
    lora_targets: Callable[[Any], tuple[str, ...]]
    rules: Rules
    tied: tuple[str, str]
    download: str
    form: Format = TRANSFORMERS

    def other_tables(self, config: Any) -> tuple[Table, ...]:
        """The namings other than `table` that LoRAs have; there is only one."""
        return ()


def get_language(name: str) -> LanguageFamily:
    """Return the family of a model_type in LANGUAGES, importing it on first use."""
    module, _, attribute = LANGUAGES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
