"""Low-rank adapters (LoRA, arXiv 2106.09685): attachment, initialisation and export."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from realgen_jax.files import write_tensors, write_whole
from realgen_jax.nn.convert import Table
from realgen_jax.nn.layers import Linear

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class LoraConfig:
    """Rank r, alpha (the product is scaled by alpha / r) and peft's name for the init of A.

    B is initialised to zero. Raises ValueError for values that cannot train.
    """

    rank: int = 64
    alpha: float = 128.0
    init: str = "gaussian"

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"lora_rank is {self.rank}; expected 1 or more")
        if self.alpha <= 0:
            raise ValueError(f"lora_alpha is {self.alpha:g}; expected a number above 0")
        if self.init not in INITS:
            raise ValueError(f"lora_init is {self.init!r}; choose one of {', '.join(INITS)}")


def _gaussian(key: Array, shape: tuple[int, ...], rank: int) -> Array:
    """peft's "gaussian": standard deviation 1 / r."""
    return jax.random.normal(key, shape) / rank


def _kaiming(key: Array, shape: tuple[int, ...], rank: int) -> Array:
    """peft's default, uniform with bound 1 / sqrt(in). shape is [..., in, parts, r]."""
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / np.sqrt(shape[-3])


INITS = {"gaussian": _gaussian, "kaiming": _kaiming}


def with_lora(
    network: nnx.Module, targets: Mapping[str, int], config: LoraConfig, key: Array
) -> nnx.Module:
    """Attach float32 adapters to the target projections of `network`, in place, and return it.

    targets: {dotted path of a Linear module: the number of its parts with factors of their own}.
    """
    for number, (path, parts) in enumerate(targets.items()):
        linear = _submodule(network, path)
        stack = linear.stack
        n_in = math.prod(linear.shape_in)
        n_out = math.prod(linear.shape_out) // parts

        start = INITS[config.init]
        shape_a = (*stack, n_in, parts, config.rank)
        linear.lora_a = nnx.LoRAParam(start(jax.random.fold_in(key, number), shape_a, config.rank))
        linear.lora_b = nnx.LoRAParam(jnp.zeros((*stack, parts, config.rank, n_out)))
        linear.lora_scale = config.alpha / config.rank
    return network


def _submodule(network: nnx.Module, path: str) -> Linear:
    module = network
    for name in path.split("."):
        module = getattr(module, name)
    return module


# -- A module's pair of factors in torch's layout, A [r, in] and B [out, r].


@dataclass(frozen=True)
class Factor:
    """The location of one module's factor in our arrays: array, layer (None: no stack), part."""

    variable: nnx.Variable
    layer: int | None
    part: int
    letter: str  # A or B

    def view(self) -> np.ndarray:
        """The factor in its array: A [in, r] or B [r, out]; torch's layout is its transpose."""
        array = np.asarray(self.variable.get_value())
        if self.layer is not None:
            array = array[self.layer]
        return array[:, self.part] if self.letter == "A" else array[self.part]


def factors(adapters: nnx.State, table: Table) -> dict[str, Factor]:
    """{"torch module.lora_A" or "….lora_B": factor} of all adapters, by diffusers' names."""
    found = {}
    for path, variable in nnx.to_flat_state(adapters):
        *target, name = map(str, path)
        letter = name[-1].upper()
        stacked = len(variable.shape) == 4
        for layer in range(variable.shape[0]) if stacked else (None,):
            for number, part in enumerate(table.rows[".".join(target)]):
                module = part.module.format(layer + part.first) if stacked else part.module
                found[f"{module}.lora_{letter}"] = Factor(variable, layer, number, letter)
    return found


def lora_tensors(adapters: nnx.State, table: Table) -> dict[str, np.ndarray]:
    """{"torch module.lora_A" or "….lora_B": array}, A [r, in] and B [out, r]."""
    hosts = jax.tree.map(np.asarray, adapters)
    tensors = {}
    for name, factor in factors(hosts, table).items():
        tensors[name] = np.ascontiguousarray(factor.view().T)
    return tensors


def save_lora(folder: str | Path, adapters: nnx.State, config: LoraConfig, table: Table) -> None:
    """Write a file for diffusers' `load_lora_weights`.

    B holds the scale alpha / rank, so that the LoRA has its trained strength wherever it is loaded:
    ComfyUI, and diffusers before 0.35, do not read alpha from the header. The alpha that the header
    states is the rank, a scale of 1.
    """
    tensors = {}
    modules = []
    for name, array in lora_tensors(adapters, table).items():
        module, _, letter = name.rpartition(".lora_")
        if letter == "A":
            modules.append(module)
        else:
            array = array * np.float32(config.alpha / config.rank)
        tensors[f"transformer.{name}.weight"] = array

    header = {
        "transformer.r": config.rank,
        "transformer.lora_alpha": config.rank,
        "transformer.target_modules": modules,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(
        folder / DIFFUSERS_FILE,
        tensors,
        # One entry only: safetensors does not keep the order of several.
        {"lora_adapter_metadata": json.dumps(header)},
    )


def save_peft(
    folder: str | Path, adapters: nnx.State, config: LoraConfig, table: Table, base: str
) -> None:
    """Write a folder for peft's `PeftModel.from_pretrained`: the factors, with the scale alpha / r.

    base: name or folder of the model that the adapters belong to.
    """
    tensors = {}
    targets = set()
    for name, array in lora_tensors(adapters, table).items():
        module = name.rpartition(".lora_")[0]
        targets.add(module.rpartition(".")[2])
        tensors[f"base_model.model.{name}.weight"] = array

    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(targets),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / PEFT_FILE, tensors, {"format": "pt"})
    write_whole(folder / PEFT_CONFIG, json.dumps(settings, indent=2) + "\n")
