"""Low-rank adapters (LoRA, arXiv 2106.09685): attachment, initialisation and export."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from realgen_jax.files import write_whole
from realgen_jax.nn.convert import Table
from realgen_jax.nn.layers import Linear
from realgen_jax.nn.names import Shares
from realgen_jax.nn.stored import write_tensors

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
    window: tuple[int, int] | None = None  # of a convolution

    def view(self) -> np.ndarray:
        """The factor in its array: A [in, r] or B [r, out]; torch's layout is its transpose."""
        array = np.asarray(self.variable.get_value())
        if self.layer is not None:
            array = array[self.layer]
        return array[:, self.part] if self.letter == "A" else array[self.part]

    def torch(self) -> np.ndarray:
        """A [r, in] or B [out, r]; [r, channels, *window] and [out, r, 1, 1] of a convolution."""
        array = self.view().T
        if self.window is not None:
            window = self.window if self.letter == "A" else (1, 1)
            array = array.reshape(len(array), -1, *window)
        return np.ascontiguousarray(array)


def factors(adapters: nnx.State, table: Table) -> dict[str, Factor]:
    """{"torch module.lora_A" or "….lora_B": factor} of all adapters, by diffusers' names."""
    found = {}
    for path, variable in nnx.to_flat_state(adapters):
        *target, name = map(str, path)
        letter = name[-1].upper()
        window = table.windows.get(".".join(target))
        stacked = len(variable.shape) == 4
        for layer in range(variable.shape[0]) if stacked else (None,):
            for number, part in enumerate(table.rows[".".join(target)]):
                module = part.module.format(layer + part.first) if stacked else part.module
                found[f"{module}.lora_{letter}"] = Factor(variable, layer, number, letter, window)
    return found


def lora_tensors(adapters: nnx.State, table: Table) -> dict[str, np.ndarray]:
    """{"torch module.lora_A" or "….lora_B": array}, in torch's layout (Factor.torch)."""
    hosts = jax.tree.map(np.asarray, adapters)
    return {name: factor.torch() for name, factor in factors(hosts, table).items()}


def lora_changes(
    adapters: nnx.State, config: LoraConfig
) -> Callable[[str, int], np.ndarray | None]:
    """Return (path of a projection, layer) -> alpha / r A B, [in, out], or None without adapters.

    The parts of a fused projection are side by side.
    """
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for path, variable in nnx.to_flat_state(adapters):
        *target, name = map(str, path)
        pairs.setdefault(".".join(target), {})[name] = np.asarray(variable.get_value())
    scale = np.float32(config.alpha / config.rank)

    def change(target: str, layer: int) -> np.ndarray | None:
        if target not in pairs:
            return None
        a, b = (pairs[target][name] for name in ("lora_a", "lora_b"))
        if a.ndim == 4:
            a, b = a[layer], b[layer]
        return scale * np.concatenate([a[:, part] @ b[part] for part in range(len(b))], axis=1)

    return change


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
        tensors.items(),
        # One entry only: safetensors does not keep the order of several.
        {"lora_adapter_metadata": json.dumps(header)},
    )


def save_peft(
    folder: str | Path,
    adapters: nnx.State,
    config: LoraConfig,
    table: Table,
    base: str,
    task: str | None = None,
) -> None:
    """Write a folder for peft's `PeftModel.from_pretrained`: the factors, with the scale alpha / r.

    base: name or folder of the model that the adapters belong to. task: peft's name of what the
    model is for, or None.
    """
    tensors = {}
    targets = set()
    for name, array in lora_tensors(adapters, table).items():
        targets.add(name.rpartition(".lora_")[0])
        tensors[f"base_model.model.{name}.weight"] = array

    settings = {
        "peft_type": "LORA",
        "task_type": task,
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
    write_tensors(folder / PEFT_FILE, tensors, tensors.items(), {"format": "pt"})
    write_whole(folder / PEFT_CONFIG, json.dumps(settings, indent=2) + "\n")


def save_comfyui(
    file: str | Path,
    adapters: nnx.State,
    config: LoraConfig,
    table: Table,
    shares: Mapping[str, Shares],
) -> None:
    """Write a file under ComfyUI's own names of the modules, with the scale alpha / r in B.

    shares: {ComfyUI's module: what it holds of diffusers'}, as `shares` (names.py) returns them. A
    fused module's A are one below the other and its B are blocks, so that its rank is the sum.
    Equal A are written once.
    """
    trained = lora_tensors(adapters, table)
    scale = np.float32(config.alpha / config.rank)
    tensors = {}
    for module, content in shares.items():
        downs: list[np.ndarray] = []
        ups: list[np.ndarray] = []
        for share in content.shares:
            if f"{share.module}.lora_A" not in trained:
                continue
            a, b = (trained[f"{share.module}.lora_{letter}"] for letter in "AB")
            a, b = (factor.reshape(len(factor), -1) for factor in (a, b))

            # B's rows, at their places in the fused module.
            up = np.zeros((content.rows, b.shape[1]), np.float32)
            end = 0
            for start, stop in share.spans:
                begin = end
                end = begin + stop - start
                up[start:stop] = scale * b[begin:end]

            # Beside the others, or added to those of an equal A.
            equal = [index for index, down in enumerate(downs) if np.array_equal(down, a)]
            if equal:
                ups[equal[0]] += up
            else:
                downs.append(a)
                ups.append(up)
        if downs:
            tensors[f"diffusion_model.{module}.lora_A.weight"] = np.concatenate(downs)
            tensors[f"diffusion_model.{module}.lora_B.weight"] = np.concatenate(ups, axis=1)
    write_tensors(Path(file), tensors, tensors.items(), {"format": "pt"})
