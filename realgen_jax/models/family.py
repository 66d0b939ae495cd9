"""The interface of a model family: a folder of realgen_jax/models and an entry in FAMILIES."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flax import nnx

from realgen_jax.models.formats import DIFFUSERS, Format
from realgen_jax.nn.convert import Table
from realgen_jax.sharding import Rules


@dataclass(frozen=True)
class Encoder:
    """A text encoder, and the arrays that it writes to the embedding cache.

    arrays: their names, in the order in which the recipe returns them. recipe: a key of RECIPES in
    reward_bridge/text_recipes.py. tokenizer, model: subfolders of the pipeline. padding: the piece
    that the tokenizer must pad with, where the states of the padding are used; "" for any.
    """

    arrays: tuple[str, ...]
    recipe: str
    tokenizer: str
    model: str
    padding: str = ""


@dataclass(frozen=True)
class Published:
    """A published model: its name, and fields of Config and Schedule other than their defaults."""

    name: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Family:
    """Everything the programs need from a model family. Fields are values and plain functions.

    pipeline: the "_class_name" of its model_index.json; transformer: that of
        transformer/config.json.
    published: the published models. The first is assumed where no model is on disk.
    Config: dataclass of the transformer's sizes under diffusers' names, with num_attention_heads,
        and dtype, param_dtype and remat; with quantization, if the Module can hold quantised
        weights (nn/quantize.py).
    Module: Module(config, rngs) is the network, (x [n, s, c], sigma float32 [n], cond, height,
        width, mesh) -> velocity float32 [n, s, c]. If Config has a field image_size, it is set to
        (height, width) of the run's pictures.
    Schedule: dataclass of the entries of scheduler_config.json, with sigmas(steps, image_tokens)
        -> float32 [steps + 1] from 1 to 0. schedule_entries: the only values that its other entries
        may have.
    table(config): how diffusers' transformer/ fills the network. config_entries: the entries of its
        config.json other than the sizes, whose values are the only ones that the network computes.
    lora_targets(config): paths of the projections that get adapters. rules: how parameters are
        sharded. blocks: the modules that nn.stack.scan_blocks runs, whose kernels may be in host
        memory.
    encoders: the text encoders that scripts/encode_prompts.py runs, and the arrays they write to
        the cache.
    text_tokens(max_tokens): text tokens of a prompt in the network. text_limit: largest max_tokens.
    cond(arrays, guidance): the network's conditioning, a pytree whose leaves have one row per
        image slot. arrays: {array of the cache: [n, ...]}, guidance float32 [n].
    cond_shapes(config, n, max_tokens, dtype): the same as jax.ShapeDtypeStructs; dtype is that of
        the embeddings.
    single_table(config): how the publisher's single file fills the network, which ComfyUI reads
        too; None if there is no such file. lora_tables: further names, in LoRAs only.
    single_config(tensors, base, **overrides): the Config that the shapes in such a file say; base:
        the config.json of config.pretrained.model's transformer, or {}. None: all sizes are base's.
    diffusers_key: how a key begins that only files with diffusers' names have.
    other_models: {key, or word in a file's name, of a relative's file: the relative}.
    cost: the module with the family's formulas for operations and bytes (cost.py).
    download: how to get the published model, for error messages.
    negative_prompt, guidance_offset: classifier-free guidance (guidance.py) with the scale
        guidance_scale + guidance_offset. If negative_prompt is None there is none, and guidance is
        only an input of the network.
    form: how the trained part is written to files.
    """

    pipeline: str
    transformer: str
    published: tuple[Published, ...]
    Config: type
    Module: type[nnx.Module]
    Schedule: type
    table: Callable[[Any], Table]
    lora_targets: Callable[[Any], tuple[str, ...]]
    rules: Rules
    encoders: tuple[Encoder, ...]
    text_tokens: Callable[[int], int]
    cond: Callable[[Mapping[str, Any], Any], Any]
    cond_shapes: Callable[[Any, int, int, Any], Any]
    cost: Any
    download: str = ""
    text_limit: int = 512
    negative_prompt: str | None = None
    guidance_offset: float = 0.0
    config_entries: Mapping[str, Any] = field(default_factory=dict)
    schedule_entries: Mapping[str, Any] = field(default_factory=dict)
    single_table: Callable[[Any], Table] | None = None
    lora_tables: tuple[Table, ...] = ()
    single_config: Callable[..., Any] | None = None
    diffusers_key: str = "transformer_blocks."
    other_models: Mapping[str, str] = field(default_factory=dict)
    form: Format = DIFFUSERS
    blocks: tuple[str, ...] = ()

    def other_tables(self, config: Any) -> tuple[Table, ...]:
        """The namings other than `table` that LoRAs have."""
        single = (self.single_table(config),) if self.single_table else ()
        return (*single, *self.lora_tables)
