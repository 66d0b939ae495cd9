"""The interface of a model family: a folder of realgen_jax/models and an entry in FAMILIES."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flax import nnx

from realgen_jax.nn.convert import Table
from realgen_jax.sharding import Rules


@dataclass(frozen=True)
class Encoder:
    """A text encoder, and the array that it writes to the embedding cache.

    array: the array's name. recipe: a function of scripts/encode_prompts.py. tokenizer, model:
    subfolders of the pipeline.
    """

    array: str
    recipe: str
    tokenizer: str
    model: str


@dataclass(frozen=True, eq=False)
class Family:
    """Everything the programs need from a model family. Fields are values and plain functions.

    pipeline: the "_class_name" of its model_index.json; transformer: that of
        transformer/config.json.
    published: name of the published model whose sizes are the defaults of Config.
    Config: dataclass of the transformer's sizes under diffusers' names, with num_attention_heads,
        and dtype, param_dtype and remat.
    Module: Module(config, rngs) is the network, (x [n, s, c], sigma float32 [n], cond, height,
        width, mesh) -> velocity float32 [n, s, c]. Guidance happens inside.
    Schedule: dataclass of the entries of scheduler_config.json, with sigmas(steps, image_tokens)
        -> float32 [steps + 1] from 1 to 0. schedule_entries: the only values that its other entries
        may have.
    table(config): how diffusers' transformer/ fills the network. config_entries: the entries of its
        config.json other than the sizes, whose values are the only ones that the network computes.
    lora_targets: paths of the projections that get adapters. rules: how parameters are sharded.
    encoders: the text encoders that scripts/encode_prompts.py runs, and the arrays they write to
        the cache.
    text_shapes(config, max_tokens): {array of the cache: its shape for one prompt}.
    cond(arrays, negative, guidance): the network's conditioning, a pytree whose leaves have one row
        per image slot. arrays and negative: {array of the cache: [n, ...]}, guidance float32 [n].
        negative is None unless the family has a negative_prompt.
    single_file(tensors, **overrides): (config, table) of the publisher's single file, or None.
    cost: the module with the family's formulas for operations and bytes (cost.py).
    download: how to get the published model, for error messages.
    """

    pipeline: str
    transformer: str
    published: str
    Config: type
    Module: type[nnx.Module]
    Schedule: type
    table: Callable[[Any], Table]
    lora_targets: tuple[str, ...]
    rules: Rules
    encoders: tuple[Encoder, ...]
    text_shapes: Callable[[Any, int], dict[str, tuple[int, ...]]]
    cond: Callable[[Mapping[str, Any], Mapping[str, Any] | None, Any], Any]
    cost: Any
    download: str = ""
    negative_prompt: str | None = None
    config_entries: Mapping[str, Any] = field(default_factory=dict)
    schedule_entries: Mapping[str, Any] = field(default_factory=dict)
    single_file: Callable[..., tuple[Any, Table]] | None = None
