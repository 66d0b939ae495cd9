"""Low-rank adapters (LoRA, arXiv 2106.09685): attachment, initialisation and files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from realgen_jax.files import write_tensors
from realgen_jax.nn.convert import Table
from realgen_jax.nn.layers import Linear
from realgen_jax.nn.tensors import Tensors

PEFT_FILE = "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


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
    """peft's default, uniform with bound 1 / sqrt(in). shape is [layers, in, parts, r]."""
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / np.sqrt(shape[1])


INITS = {"gaussian": _gaussian, "kaiming": _kaiming}


def with_lora(
    network: nnx.Module, targets: Sequence[str], config: LoraConfig, key: Array
) -> nnx.Module:
    """Attach float32 adapters to the target projections of `network`, in place, and return it.

    Targets are dotted paths of stacked Linear modules, kernels [layers, in, (parts,) out].
    """
    for number, path in enumerate(targets):
        linear = _submodule(network, path)
        layers, n_in, *parts, n_out = linear.kernel.shape
        parts = parts or [1]

        start = INITS[config.init]
        shape = (layers, n_in, *parts, config.rank)
        linear.lora_a = nnx.LoRAParam(start(jax.random.fold_in(key, number), shape, config.rank))
        linear.lora_b = nnx.LoRAParam(jnp.zeros((layers, *parts, config.rank, n_out)))
        linear.lora_scale = config.alpha / config.rank
    return network


def _submodule(network: nnx.Module, path: str) -> Linear:
    module = network
    for name in path.split("."):
        module = getattr(module, name)
    return module


# -- Files. An adapter is a pair of factors, A [r, in] and B [out, r] in torch's layout.


@dataclass(frozen=True)
class _Factor:
    """The location of one module's factor in our arrays: array, layer and part."""

    variable: nnx.Variable
    layer: int
    part: int
    letter: str  # A or B

    def view(self, array: np.ndarray) -> np.ndarray:
        """The factor in `array`: A [in, r] or B [r, out]; torch's layout is its transpose."""
        if self.letter == "A":
            return array[self.layer, :, self.part]
        return array[self.layer, self.part]


def _factors(adapters: nnx.State, table: Table) -> dict[str, _Factor]:
    """{"torch module.lora_A" or "….lora_B": factor} of all adapters, by diffusers' names."""
    factors = {}
    for path, variable in nnx.to_flat_state(adapters):
        *target, name = map(str, path)
        letter = name[-1].upper()
        for layer in range(variable.shape[0]):
            for number, part in enumerate(table.rows[".".join(target)]):
                module = part.module.format(layer + part.first)
                factors[f"{module}.lora_{letter}"] = _Factor(variable, layer, number, letter)
    return factors


def lora_tensors(adapters: nnx.State, table: Table) -> dict[str, np.ndarray]:
    """{"torch module.lora_A" or "….lora_B": array}, A [r, in] and B [out, r]."""
    hosts = {}
    for _, variable in nnx.to_flat_state(adapters):
        hosts[id(variable)] = np.asarray(variable.get_value())

    tensors = {}
    for name, factor in _factors(adapters, table).items():
        view = factor.view(hosts[id(factor.variable)])
        tensors[name] = np.ascontiguousarray(view.T)
    return tensors


def save_lora(folder: str | Path, adapters: nnx.State, config: LoraConfig, table: Table) -> None:
    """Write a file for diffusers' `load_lora_weights`, with rank and alpha in its header."""
    tensors = lora_tensors(adapters, table)
    modules = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    header = {
        "transformer.r": config.rank,
        "transformer.lora_alpha": config.alpha,
        "transformer.target_modules": modules,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(
        folder / DIFFUSERS_FILE,
        {f"transformer.{name}.weight": array for name, array in tensors.items()},
        # One entry only: safetensors does not keep the order of several.
        {"lora_adapter_metadata": json.dumps(header)},
    )


def _lora_file(path: Path) -> Path:
    """The LoRA's file: `path` itself, or the file in a peft or diffusers folder."""
    if path.is_dir():
        for name in (PEFT_FILE, DIFFUSERS_FILE):
            if (path / name).exists():
                return path / name
        raise FileNotFoundError(
            f"{path} holds neither {PEFT_FILE} (peft) nor {DIFFUSERS_FILE} (diffusers)"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a LoRA file or folder")
    return path


def _stated_alpha(path: Path, file: Path, tensors: Tensors) -> float | None:
    """The alpha stated by the files: in peft's config, the header, or tensors named ".alpha"."""
    if path.is_dir() and file.name == PEFT_FILE:
        return float(json.loads((path / "adapter_config.json").read_text())["lora_alpha"])
    header = tensors.metadata().get("lora_adapter_metadata")
    if header:
        return float(json.loads(header)["transformer.lora_alpha"])

    alphas = {float(tensors.read(key)) for key in tensors.keys() if key.endswith(".alpha")}  # noqa: SIM118
    if len(alphas) > 1:
        raise ValueError(
            f"{file} has different alphas for different modules ({sorted(alphas)}); expected one"
        )
    return alphas.pop() if alphas else None


def _lora_names(tensors: Tensors) -> dict[str, str]:
    """{"torch module.lora_A" or "….lora_B": the file's key}."""
    names = {}
    for key in sorted(tensors.keys()):
        name = key.removeprefix("base_model.model.").removeprefix("transformer.")
        if not name.endswith(".alpha"):
            names[name.removesuffix(".weight").removesuffix(".default")] = key
    return names


def read_lora_config(path: str | Path) -> LoraConfig:
    """Return rank and alpha of a LoRA file or folder; only the file's header is read.

    Without a stated alpha, alpha = rank, as in diffusers. Raises FileNotFoundError, or ValueError
    for a file without adapters.
    """
    path = Path(path)
    file = _lora_file(path)
    tensors = Tensors(file)
    keys = [key for name, key in _lora_names(tensors).items() if name.endswith(".lora_A")]
    if not keys:
        raise ValueError(
            f"{file} holds no key that ends in .lora_A.weight; expected a LoRA of the transformer"
        )
    rank = tensors.shape(keys[0])[0]
    alpha = _stated_alpha(path, file, tensors)
    return LoraConfig(rank, float(rank) if alpha is None else alpha)


def read_lora(path: str | Path, like: nnx.State, table: Table) -> nnx.State:
    """Return the adapters of a peft folder (RealGen's published format) or a diffusers file.

    like: the adapters' abstract state for the file's rank. Raises ValueError naming the first
    module that is missing, unknown or of another shape.
    """
    file = _lora_file(Path(path))
    tensors = Tensors(file)
    names = _lora_names(tensors)
    adapters = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), like)
    factors = _factors(adapters, table)

    missing = sorted(factors.keys() - names.keys())
    if missing:
        raise ValueError(
            f"{file} lacks {missing[0]} ({len(missing)} modules in all); "
            "a LoRA here covers every target"
        )
    unknown = sorted(names.keys() - factors.keys())
    if unknown:
        raise ValueError(
            f"{file} holds {unknown[0]} ({len(unknown)} in all), which this model does not target"
        )

    for name, factor in factors.items():
        tensor = tensors.read(names[name])
        view = factor.view(factor.variable.get_value())
        if tensor.T.shape != view.shape:
            raise ValueError(f"{name} in {file} has shape {tensor.shape}; expected {view.T.shape}")
        view[:] = tensor.T
    return jax.tree.map(jnp.asarray, adapters)
