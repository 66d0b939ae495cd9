"""Build a model from the files that `config.pretrained` names, or from its sizes alone."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from realgen_jax.models import FAMILIES, get_family
from realgen_jax.models.family import Family, Published
from realgen_jax.models.model import Model
from realgen_jax.models.sources import (
    load_transformer,
    pipeline_class,
    transformer_config,
    transformer_source,
    vae_source,
)
from realgen_jax.models.trainable import AllWeights, Trainable
from realgen_jax.nn.convert import Sharding, abstract, check_keys, fill, with_shardings
from realgen_jax.nn.layers import Fixed
from realgen_jax.nn.quantized_files import check_quantized
from realgen_jax.nn.tensors import Tensors, config_from, has_weights, read_json
from realgen_jax.nn.tokens import PATCH
from realgen_jax.nn.vae import Autoencoder, VaeConfig
from realgen_jax.nn.vae_files import load_vae, vae_config, vae_tensors
from realgen_jax.sharding import param_sharding, replicated, to_host

# Sections of the config with the size of pictures.
ROLLOUTS = "config.sample"
EVALUATIONS = "config.evaluate.sample"


def find_family(pretrained: Any) -> Family:
    """Return the family of `config.pretrained.model`, by "_class_name" in its model_index.json.

    Raises FileNotFoundError for a missing folder and ValueError for an unknown pipeline class.
    """
    if not sizes_on_disk(pretrained):
        raise FileNotFoundError(missing_model(pretrained))
    return get_family(pipeline_class(Path(pretrained.model)))


def model_folders(family: Family) -> list[str]:
    """Return the subfolders of a model, other than the transformer, that determine its pictures."""
    tokenizers = sorted({encoder.tokenizer for encoder in family.encoders})
    encoders = sorted({encoder.model for encoder in family.encoders})
    return ["vae", "scheduler", *tokenizers, *encoders]


def model_files(pretrained: Any) -> list[Path]:
    """Return the files and folders in `config.pretrained.model` that determine its pictures.

    What `config.pretrained.transformer` and `config.pretrained.vae` replace is not among them.
    Raises FileNotFoundError if one of them is missing.
    """
    names = ["model_index.json", *model_folders(find_family(pretrained))]
    if not pretrained.transformer:
        names.append("transformer")
    if pretrained.vae:
        names.remove("vae")
        names.append("vae/config.json")
    paths = [Path(pretrained.model) / name for name in names]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing; expected a pipeline folder of diffusers; download the whole "
                "folder"
            )
    return paths


def missing_model(pretrained: Any) -> str:
    """Say what to do about a missing model folder."""
    family, _ = default_model(pretrained)
    if not pretrained.model:
        return f"config.pretrained.model is empty; expected a {family.pipeline} folder of diffusers"
    text = (
        f"config.pretrained.model is {str(pretrained.model)!r}, which holds no model_index.json; "
        f"expected a {family.pipeline} folder of diffusers"
    )
    return f"{text}. {family.download}" if family.download else text


def default_model(pretrained: Any) -> tuple[Family, Published]:
    """Return the family and the published model that `config.pretrained.family` names.

    They stand for a model that is not on disk. Raises ValueError for an unknown name.
    """
    pipeline, _, name = pretrained.family.partition(":")
    if pipeline not in FAMILIES:
        raise ValueError(
            f"config.pretrained.family is {pretrained.family!r}; choose from {', '.join(FAMILIES)}"
        )
    family = get_family(pipeline)
    for published in family.published:
        if name in ("", published.name):
            return family, published
    names = [f"{pipeline}:{published.name}" for published in family.published]
    raise ValueError(
        f"config.pretrained.family is {pretrained.family!r}; choose from {', '.join(names)}"
    )


def sizes_on_disk(pretrained: Any) -> bool:
    """Return whether the model is on disk, so that its sizes can be read."""
    folder = Path(pretrained.model)
    return bool(pretrained.model) and (folder / "model_index.json").exists()


def size_of(sample: Any) -> tuple[int, int]:
    """Return the (width, height) of config.sample or config.evaluate.sample, in pixels."""
    return sample.width, sample.height


def rollout_sizes(sample: Any) -> dict[str, tuple[int, int]]:
    """Return the sizes of config.sample by their keys, those of rollouts in the order of epochs."""
    if not sample.buckets:
        return {ROLLOUTS: size_of(sample)}
    return {f"{ROLLOUTS}.buckets[{i}]": tuple(size) for i, size in enumerate(sample.buckets)}


def load_model(
    pretrained: Any,
    size: tuple[int, int],
    mesh: Mesh,
    trainable: Trainable | None = None,
    key: str = ROLLOUTS,
) -> Model:
    """Load the model that `config.pretrained` names, for pictures of size (width, height).

    size: in pixels. key: the section of the config that it comes from, for errors. Raises
    FileNotFoundError for missing files and ValueError for files that do not fit. Where shapes are
    enough to tell, this happens before any weight is read.
    """
    family = find_family(pretrained)
    model = abstract_model(pretrained, size, mesh, trainable, key)
    folder = Path(pretrained.model)
    source = transformer_source(pretrained)
    overrides = config_overrides(family, pretrained, model.height, model.width)

    _, params = load_transformer(
        family,
        source,
        folder / "transformer",
        weight_sharding(family, mesh, pretrained.offload),
        **overrides,
    )
    _, vae_params = load_vae(
        vae_source(pretrained),
        folder / "vae",
        _vae_sharding(mesh, pretrained.offload),
        dtype=model.vae.dtype,
    )
    return replace(model, params=params, vae_params=vae_params)


def abstract_model(
    pretrained: Any,
    size: tuple[int, int],
    mesh: Any,
    trainable: Trainable | None = None,
    key: str = ROLLOUTS,
) -> Model:
    """Return the model without weights; its leaves are jax.ShapeDtypeStructs with shardings.

    Sizes are read from the folder's config.json files or the single file's header. If the model is
    not on disk, they are those of the published model of `config.pretrained.family`. `mesh` may be
    an AbstractMesh. Raises the errors of `load_model`; weights may be absent, but those that are
    there must have the transformer's names.
    """
    on_disk = sizes_on_disk(pretrained)
    family = find_family(pretrained) if on_disk else default_model(pretrained)[0]
    folder = Path(pretrained.model)

    # The autoencoder, which determines the number of image tokens.
    autoencoder = {"dtype": jnp.dtype(pretrained.vae_dtype), "tile": pretrained.vae_tile}
    vae = VaeConfig(**autoencoder)
    if on_disk:
        source = vae_source(pretrained)
        vae = vae_config(folder / "vae" if source.is_file() else source, **autoencoder)
        if has_weights(source):
            tensors, table = vae_tensors(source, vae)
            check_keys(tensors, abstract(Autoencoder, vae)[1], table)
    width, height = _size_in_tokens(vae, size, key)

    # The transformer and the schedule.
    overrides = config_overrides(family, pretrained, height, width)
    if on_disk:
        source = transformer_source(pretrained)
        config, table = transformer_config(family, source, folder / "transformer", **overrides)
        if has_weights(source):
            check_quantized(Tensors(source), family.Module, config, table)
        schedule = _schedule(family, folder)
    else:
        _, published = default_model(pretrained)
        config = family.Config(**{**published.sizes, **overrides})
        schedule = family.Schedule(**published.schedule)

    return Model(
        params=with_shardings(
            abstract(family.Module, config)[1], weight_sharding(family, mesh, pretrained.offload)
        ),
        vae_params=with_shardings(
            abstract(Autoencoder, vae)[1], _vae_sharding(mesh, pretrained.offload)
        ),
        family=family,
        config=config,
        vae=vae,
        schedule=schedule,
        trainable=trainable or AllWeights(),
        height=height,
        width=width,
        mesh=mesh,
    )


def with_size(model: Model, pretrained: Any, size: tuple[int, int], key: str) -> Model:
    """Return a loaded model for pictures of another size, with the same weights in memory.

    Arrays that are no weights (nn.layers.Fixed) may depend on the size; they are read again. size,
    key: as for `load_model`, whose errors are raised.
    """
    other = abstract_model(pretrained, size, model.mesh, model.trainable, key)
    params = model.params
    fixed = nnx.filter_state(other.params, Fixed)
    if jax.tree.leaves(fixed):
        source = transformer_source(pretrained)
        overrides = config_overrides(model.family, pretrained, other.height, other.width)
        base = Path(pretrained.model) / "transformer"
        _, table = transformer_config(model.family, source, base, **overrides)
        sharding = weight_sharding(model.family, model.mesh, pretrained.offload)
        own = fill(Tensors(source), fixed, table, sharding)
        params = nnx.merge_state(nnx.filter_state(params, nnx.Param), own)
    return replace(other, params=params, vae_params=model.vae_params)


def load_tuned(model: Model, pretrained: Any) -> nnx.State:
    """Return the weights of `pretrained.transformer` as the trained state of a loaded model.

    Sampling can then take them in some steps and the model's own in others. Raises the errors of
    `load_transformer`, and ValueError for a transformer of other sizes.
    """
    overrides = config_overrides(model.family, pretrained, model.height, model.width)
    sharding = weight_sharding(model.family, model.mesh, pretrained.offload)
    source = transformer_source(pretrained)
    base = Path(pretrained.model) / "transformer"
    config, params = load_transformer(model.family, source, base, sharding, **overrides)
    if config != model.config:
        raise ValueError(
            f"{source} has other sizes than the base model, which takes the last steps "
            "(config.evaluate.sample.tuned_share)"
        )
    return nnx.filter_state(params, nnx.Param)


def weight_sharding(family: Family, mesh: Any, offload: bool) -> Sharding:
    """Return (path, shape) -> where a weight of the transformer is.

    offload: whether the blocks' kernels are in host memory. mesh: may be an AbstractMesh. Raises
    ValueError for a family that has no blocks; the function raises the errors of `param_sharding`
    and `to_host`.
    """
    sharding = param_sharding(mesh, family.rules)
    if not offload:
        return sharding
    if not family.blocks:
        raise ValueError(
            f"config.pretrained.offload is True, which {family.pipeline} does not support; "
            "expected False"
        )

    def offloaded(path: str, shape: tuple[int, ...]) -> Any:
        where = sharding(path, shape)
        is_kernel = path.partition(".")[0] in family.blocks and path.endswith(".kernel")
        return to_host(where) if is_kernel else where

    return offloaded


def _vae_sharding(mesh: Any, offload: bool) -> Sharding:
    """Where the autoencoder is: on every device, or in host memory for them."""
    everywhere = to_host(replicated(mesh)) if offload else replicated(mesh)
    return lambda path, shape: everywhere


def _schedule(family: Family, folder: Path) -> Any:
    file = folder / "scheduler" / "scheduler_config.json"
    entries = [field.name for field in fields(family.Schedule)]
    return config_from(family.Schedule, file, read_json(file), family.schedule_entries, entries)


def config_overrides(family: Family, pretrained: Any, height: int, width: int) -> dict[str, Any]:
    """Return the fields of a family's Config that are not sizes in a file."""
    overrides = {"remat": pretrained.remat}
    for name in ("dtype", "param_dtype"):
        overrides[name] = jnp.dtype(pretrained[name])
    names = {field.name for field in fields(family.Config)}
    if "quantization" in names:
        overrides["quantization"] = pretrained.quantization
    elif pretrained.quantization:
        raise ValueError(
            f"config.pretrained.quantization is {pretrained.quantization!r}, which "
            f"{family.pipeline} does not support; expected ''"
        )
    if "image_size" in names:
        overrides["image_size"] = (height, width)
    return overrides


def _size_in_tokens(vae: VaeConfig, size: tuple[int, int], key: str) -> list[int]:
    """Return (width, height) in tokens. Raises ValueError for pixels that are no whole tokens."""
    side = PATCH * 2 ** (len(vae.block_out_channels) - 1)
    tokens = []
    for name, pixels in zip(("width", "height"), size, strict=True):
        if pixels < side or pixels % side:
            raise ValueError(f"{key}.{name} is {pixels}; expected a multiple of {side} pixels")
        tokens.append(pixels // side)
    return tokens
