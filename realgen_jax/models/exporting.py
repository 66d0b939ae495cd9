"""Write LoRAs, and weights with a LoRA merged, in the forms that other programs read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax import nnx

from realgen_jax.models.formats import file_config
from realgen_jax.models.loading import abstract_model, config_overrides, find_family
from realgen_jax.models.model import Model
from realgen_jax.models.sources import transformer_config, transformer_source
from realgen_jax.models.trainable import read_any_lora
from realgen_jax.nn.convert import Table, file_state
from realgen_jax.nn.export import TorchTensors, merged_tensors, save_folder
from realgen_jax.nn.lora import LoraConfig, lora_changes, save_comfyui, save_lora, save_peft
from realgen_jax.nn.names import shares
from realgen_jax.nn.quantize import FORMATS
from realgen_jax.nn.quantized_files import save_quantized
from realgen_jax.nn.stored import write_tensors
from realgen_jax.nn.tensors import Tensors
from realgen_jax.sharding import abstract_mesh


def export_lora(model: Model, file: str | Path, form: str, out: Path) -> None:
    """Write the adapters of any LoRA file in another form, a key of LORA_FORMS.

    model: may be abstract. Raises the errors of `read_any_lora`, ValueError if ComfyUI has no names
    of its own for the model.
    """
    lora, adapters = read_any_lora(model, file)
    LORA_FORMS[form](model, out, adapters, lora.config)


def _lora_of_diffusers(model: Model, out: Path, adapters: nnx.State, lora: LoraConfig) -> None:
    save_lora(out, adapters, lora, model.family.table(model.config))


def _lora_of_peft(model: Model, out: Path, adapters: nnx.State, lora: LoraConfig) -> None:
    base = model.family.published[0].name
    save_peft(out, adapters, lora, model.family.table(model.config), base)


def _lora_of_comfyui(model: Model, out: Path, adapters: nnx.State, lora: LoraConfig) -> None:
    state = file_state(model.family.Module, model.config)
    own = model.family.table(model.config)
    save_comfyui(out, adapters, lora, own, shares(state, own, _single_table(model)))


LORA_FORMS: dict[str, Callable[[Model, Path, nnx.State, LoraConfig], None]] = {
    "diffusers": _lora_of_diffusers,
    "peft": _lora_of_peft,
    "comfyui": _lora_of_comfyui,
}


def export_weights(
    model: Model, pretrained: Any, file: str | Path, form: str, out: Path, dtype: Any
) -> None:
    """Write the transformer that `pretrained` names with a LoRA merged, in a WEIGHT_FORMS form.

    The sum is taken in float32 and rounded once, to dtype. One tensor is in memory at a time. file:
    any LoRA file; "" for none. Raises the errors of `read_any_lora` and `load_transformer`.
    """
    # What is added to the weights.
    changes = _no_changes
    if file:
        lora, adapters = read_any_lora(model, file)
        changes = lora_changes(adapters, lora.config)

    # The file's own names, and those to write.
    family = model.family
    overrides = config_overrides(family, pretrained, model.height, model.width)
    source = transformer_source(pretrained)
    base = Path(pretrained.model) / "transformer"
    config, own = transformer_config(family, source, base, **overrides)
    state = file_state(family.Module, config)

    def tensors(table: Table) -> TorchTensors:
        return merged_tensors(Tensors(source), state, own, table, changes, dtype)

    WEIGHT_FORMS[form](model, out, tensors)


def write_quantized(pretrained: Any, size: tuple[int, int], folder: str | Path) -> None:
    """Write the transformer of `config.pretrained`, in its format, to a folder that loads it back.

    size: (width, height) of pictures in pixels, for arrays that depend on it. Raises ValueError if
    config.pretrained.quantization is empty, and the errors of `load_model`.
    """
    if not pretrained.quantization:
        names = ", ".join(FORMATS)
        raise ValueError(f"config.pretrained.quantization is ''; expected one of {names}")
    family = find_family(pretrained)
    config = abstract_model(pretrained, size, abstract_mesh(1, 1, 1, 1)).config

    source = transformer_source(pretrained)
    _, table = transformer_config(family, source, Path(pretrained.model) / "transformer")
    tables = table, family.table(config)
    entries = file_config(family, config)
    save_quantized(folder, Tensors(source), family.Module, config, tables, entries)


def _no_changes(target: str, layer: int) -> None:
    return None


def _weights_of_diffusers(
    model: Model, out: Path, tensors: Callable[[Table], TorchTensors]
) -> None:
    table = model.family.table(model.config)
    save_folder(out, tensors(table), file_config(model.family, model.config))


def _weights_of_comfyui(model: Model, out: Path, tensors: Callable[[Table], TorchTensors]) -> None:
    planned = tensors(_single_table(model))
    write_tensors(out, planned.shapes, planned, {"format": "pt"})


WEIGHT_FORMS: dict[str, Callable[[Model, Path, Callable[[Table], TorchTensors]], None]] = {
    "diffusers": _weights_of_diffusers,
    "comfyui": _weights_of_comfyui,
}


def _single_table(model: Model) -> Table:
    if model.family.single_table is None:
        raise ValueError(f"ComfyUI has no names of its own for a {model.family.pipeline}")
    return model.family.single_table(model.config)
