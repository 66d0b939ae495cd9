"""Low-rank adapters (arXiv 2106.09685) on the projections that RealGen trains, and their files."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from safetensors.numpy import save_file

from realgen_jax.models.flux.tables import DIFFUSERS
from realgen_jax.models.flux.transformer import Cond, FluxConfig, FluxTransformer
from realgen_jax.nn.convert import Tensors, abstract
from realgen_jax.nn.layers import Linear
from realgen_jax.rollout import Velocity

# RealGen's targets (SPEC: attention projections of all blocks, feed-forwards of the double blocks). Its suffix rule
# "attn.to_q" also hits the single blocks, but not their proj_mlp and proj_out.
TARGETS = (
    "double.img.qkv", "double.img.proj", "double.img.mlp.fc1", "double.img.mlp.fc2",
    "double.txt.qkv", "double.txt.proj", "double.txt.mlp.fc1", "double.txt.mlp.fc2", "single.qkv",
)  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """Rank r, alpha (the product is scaled by alpha / r) and peft's name for the start of A; B starts at zero."""

    rank: int = 64
    alpha: float = 128.0
    init: str = "gaussian"


def _gaussian(key: Array, shape: tuple[int, ...], rank: int) -> Array:
    """peft's "gaussian": standard deviation 1 / r."""
    return jax.random.normal(key, shape) / rank


def _kaiming(key: Array, shape: tuple[int, ...], rank: int) -> Array:
    """peft's default, uniform with bound 1 / sqrt(in). shape is [layers, in, groups, r]."""
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / np.sqrt(shape[1])


INITS = {"gaussian": _gaussian, "kaiming": _kaiming}


def _linear(model: FluxTransformer, path: str) -> Linear:
    module = model
    for name in path.split("."):
        module = getattr(module, name)
    return module


def with_lora(model: FluxTransformer, config: LoraConfig, key: Array) -> FluxTransformer:
    """Attach float32 adapters to every target of `model`, in place, and return it."""
    for i, path in enumerate(TARGETS):
        linear = _linear(model, path)
        layers, n_in, *parts, n_out = linear.kernel.shape
        parts = parts or [1]
        a = INITS[config.init](
            jax.random.fold_in(key, i), (layers, n_in, *parts, config.rank), config.rank
        )
        linear.lora_a = nnx.LoRAParam(a)
        linear.lora_b = nnx.LoRAParam(jnp.zeros((layers, *parts, config.rank, n_out)))
        linear.lora_scale = config.alpha / config.rank
    return model


def init_lora(model: FluxConfig, config: LoraConfig, key: Array) -> nnx.State:
    """The adapters' first state. Same key, same state, whatever the mesh."""
    if config.init not in INITS:
        raise ValueError(f"lora init is {config.init!r}; choose one of {', '.join(INITS)}")

    @jax.jit
    def create(key: Array) -> nnx.State:
        return nnx.state(with_lora(FluxTransformer(model, nnx.Rngs(0)), config, key), nnx.LoRAParam)

    return create(key)


def _modules(adapters: nnx.State) -> dict[str, tuple[nnx.Variable, int, int]]:
    """{diffusers module: (the array that holds its factor, layer, group)}, keyed with ".lora_A" or ".lora_B"."""
    found = {}
    for path, variable in nnx.to_flat_state(adapters):
        *target, factor = map(str, path)
        for layer in range(variable.shape[0]):
            for group, part in enumerate(DIFFUSERS[".".join(target)]):
                found[f"{part.module.format(layer)}.lora_{factor[-1].upper()}"] = (
                    variable,
                    layer,
                    group,
                )
    return found


def _pick(array: np.ndarray, layer: int, group: int, factor: str) -> np.ndarray:
    """The view of one module's factor: A [in, r] or B [r, out]. Torch's layout is its transpose."""
    return array[layer, :, group] if factor == "A" else array[layer, group]


def lora_tensors(adapters: nnx.State) -> dict[str, np.ndarray]:
    """{diffusers module.lora_A or .lora_B: array in torch's layout}, A [r, in] and B [out, r]."""
    hosts = {id(v): np.asarray(v.get_value()) for _, v in nnx.to_flat_state(adapters)}
    return {
        name: np.ascontiguousarray(_pick(hosts[id(variable)], layer, group, name[-1]).T)
        for name, (variable, layer, group) in _modules(adapters).items()
    }


def save_lora(file: str | Path, adapters: nnx.State, config: LoraConfig) -> None:
    """Write `pytorch_lora_weights.safetensors` as diffusers' `load_lora_weights` reads it, alpha included."""
    tensors = lora_tensors(adapters)
    names = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    metadata = {
        "transformer.r": config.rank,
        "transformer.lora_alpha": config.alpha,
        "transformer.target_modules": names,
    }
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"transformer.{name}.weight": array for name, array in tensors.items()},
        file,
        metadata={
            "lora_adapter_metadata": json.dumps(metadata)
        },  # one entry: safetensors shuffles several
    )


def _read(path: Path) -> tuple[dict[str, np.ndarray], float | None]:
    """{module.lora_A or .lora_B: array} of a peft folder or a diffusers file, and its alpha if it says one."""
    folder_config = None
    if path.is_dir():
        peft, diffusers = (
            path / "adapter_model.safetensors",
            path / "pytorch_lora_weights.safetensors",
        )
        if not peft.exists() and not diffusers.exists():
            raise FileNotFoundError(
                f"{path} holds neither {peft.name} (peft) nor {diffusers.name} (diffusers)"
            )
        if peft.exists():
            folder_config = json.loads((path / "adapter_config.json").read_text())
        path = peft if peft.exists() else diffusers
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a LoRA file or folder")
    tensors = Tensors(path)
    found, alphas = {}, set()
    for key in sorted(tensors.keys()):
        name = key.removeprefix("base_model.model.").removeprefix("transformer.")
        value = tensors.read(key)
        if name.endswith(".alpha"):
            alphas.add(float(value))
        else:
            found[name.removesuffix(".weight").removesuffix(".default")] = value
    if folder_config is not None:
        alphas = {float(folder_config["lora_alpha"])}
    elif metadata := tensors.metadata().get("lora_adapter_metadata"):
        alphas = {float(json.loads(metadata)["transformer.lora_alpha"])}
    if len(alphas) > 1:
        raise ValueError(
            f"{path} has different alphas for different modules ({sorted(alphas)}); expected one"
        )
    return found, alphas.pop() if alphas else None


def load_lora(path: str | Path, model: FluxConfig) -> tuple[LoraConfig, nnx.State]:
    """Read adapters from a peft folder (RealGen's published form) or a diffusers file.

    Rank and alpha are the file's; a file that states no alpha means alpha = rank, as diffusers reads it. Raises
    ValueError naming the first module that is missing, unknown or of another shape.
    """
    path = Path(path)
    found, alpha = _read(path)
    first = next((v for k, v in found.items() if k.endswith(".lora_A")), None)
    if first is None:
        raise ValueError(
            f"{path} holds no key that ends in .lora_A.weight; expected a LoRA for the FLUX transformer"
        )
    config = LoraConfig(
        rank=first.shape[0], alpha=float(first.shape[0]) if alpha is None else alpha
    )
    adapters = jax.tree.map(
        lambda x: np.empty(x.shape, np.float32),
        jax.eval_shape(lambda: init_lora(model, config, jax.random.key(0))),
    )
    modules = _modules(adapters)
    if missing := sorted(modules.keys() - found.keys()):
        raise ValueError(
            f"{path} lacks {missing[0]} ({len(missing)} modules in all); a LoRA here covers every target"
        )
    if unknown := sorted(found.keys() - modules.keys()):
        raise ValueError(
            f"{path} holds {unknown[0]} ({len(unknown)} in all), which is none of the targets of this model"
        )
    for name, (variable, layer, group) in modules.items():
        view = _pick(variable.get_value(), layer, group, name[-1])
        if found[name].T.shape != view.shape:
            raise ValueError(
                f"{name} in {path} has shape {found[name].shape}; expected {view.T.shape}"
            )
        view[:] = found[name].T
    return config, jax.tree.map(jnp.asarray, adapters)


def make_velocity(
    model: FluxConfig, lora: LoraConfig | None, height: int, width: int, mesh: Mesh | None = None
) -> Velocity:
    """velocity(params, trainable, x, sigma, cond) for pictures of height x width patches (16 pixels each).

    With adapters, `trainable` is their state and None means the base model. Without (full fine-tuning), `trainable` is
    the transformer's whole state and None means `params`, a frozen copy. Activations lie on `mesh` if there is one.
    """
    if mesh is not None and model.num_attention_heads % mesh.shape["tensor"]:
        raise ValueError(
            f"num_attention_heads {model.num_attention_heads} does not divide by mesh axis "
            f"tensor={mesh.shape['tensor']}; attention is split by whole heads"
        )
    base, _ = abstract(FluxTransformer, model)
    adapted = base
    if lora is not None:
        build = lambda: with_lora(FluxTransformer(model, nnx.Rngs(0)), lora, jax.random.key(0))  # noqa: E731
        adapted = nnx.split(nnx.eval_shape(build))[0]

    def velocity(
        params: nnx.State, trainable: nnx.State | None, x: Array, sigma: Array, cond: Cond
    ) -> Array:
        if trainable is None:
            return nnx.merge(base, params)(x, sigma, cond, height, width, mesh)
        states = (trainable,) if lora is None else (params, trainable)
        return nnx.merge(adapted, *states)(x, sigma, cond, height, width, mesh)

    return velocity
