"""The files that `config.pretrained` names: which they are, and what a transformer's are."""

from pathlib import Path
from typing import Any

from flax import nnx

from realgen_jax.models import FAMILIES, get_family
from realgen_jax.models.family import Family
from realgen_jax.nn.convert import Sharding, Table
from realgen_jax.nn.quantized_files import load_quantized
from realgen_jax.nn.tensors import Tensors, config_from, read_config, read_json


def pipeline_class(folder: Path) -> str:
    """Return the "_class_name" of a pipeline folder, which must be one of FAMILIES.

    Raises FileNotFoundError for a folder without model_index.json, ValueError for another class.
    """
    index = folder / "model_index.json"
    if not index.exists():
        raise FileNotFoundError(f"{folder} holds no model_index.json of diffusers")
    pipeline = read_json(index).get("_class_name")
    if pipeline not in FAMILIES:
        raise ValueError(
            f'{index} has "_class_name" {pipeline!r}; expected a text-to-image pipeline, one of '
            f"{', '.join(FAMILIES)}{_relative(pipeline)}"
        )
    return pipeline


def _relative(pipeline: Any) -> str:
    """Name the family whose name begins an unknown pipeline's, as Flux does FluxKontextPipeline."""
    for known in FAMILIES:
        if str(pipeline).startswith(known.removesuffix("Pipeline")):
            names = [published.name for published in get_family(known).published]
            return (
                f". {pipeline} is another model, or takes more than text; take {' or '.join(names)}"
            )
    return ""


def transformer_source(pretrained: Any) -> Path:
    """Return the `transformer/` folder or single file that `config.pretrained` names.

    Raises ValueError if it lies in another kind of pipeline than `config.pretrained.model`. That is
    all that tells FLUX.1-Kontext from FLUX.1-dev: their transformers have the same sizes.
    """
    base = Path(pretrained.model)
    if not pretrained.transformer:
        return base / "transformer"

    source = Path(pretrained.transformer)
    if (source.parent / "model_index.json").exists():
        pipeline = pipeline_class(source.parent)
        if pipeline != pipeline_class(base):
            raise ValueError(
                f"config.pretrained.transformer is {str(source)!r}, which is part of a {pipeline}; "
                f"expected one for the {pipeline_class(base)} in {base}"
            )
    return source


def vae_source(pretrained: Any) -> Path:
    """Return the `vae/` folder or single file that `config.pretrained` names.

    Raises FileNotFoundError if there is no such file or folder.
    """
    if not pretrained.vae:
        return Path(pretrained.model) / "vae"
    source = Path(pretrained.vae)
    if not source.exists():
        raise FileNotFoundError(
            f"config.pretrained.vae is {str(source)!r}, which does not exist; expected a vae/ "
            "folder of diffusers, BFL's ae.safetensors or ComfyUI's file of a whole pipeline"
        )
    return source


def load_transformer(
    family: Family,
    path: str | Path,
    base: Path,
    sharding: Sharding = lambda path, shape: None,
    **overrides: Any,
) -> tuple[Any, nnx.State]:
    """Return config and weights of a diffusers `transformer/` folder or a single file.

    base, overrides: as in `transformer_config`.
    """
    config, table = transformer_config(family, path, base, **overrides)
    return config, load_quantized(Tensors(Path(path)), family.Module, config, table, sharding)


def transformer_config(
    family: Family, path: str | Path, base: Path, **overrides: Any
) -> tuple[Any, Table]:
    """Return config and table of a diffusers `transformer/` folder or a single file.

    A publisher's file has its sizes in its shapes, and what no shape says in the config.json of
    `base`, a `transformer/` folder. Other files have their sizes in the config.json beside them, or
    else in that of `base`. `overrides` are fields of the family's Config (dtype, ...).

    Raises FileNotFoundError for missing files and ValueError for those of another model.
    """
    path = Path(path)
    folder = path
    make_table = family.table
    if path.is_file():
        tensors = Tensors(path)
        _check_relatives(family, tensors)
        if not any(key.startswith(family.diffusers_key) for key in tensors.keys()):  # noqa: SIM118
            if family.single_table is None:
                raise ValueError(
                    f"{path} is a file; expected a {family.transformer} folder of diffusers"
                )
            make_table = family.single_table
            if family.single_config is not None:
                exists = (base / "config.json").exists()
                values = read_config(base, family.transformer) if exists else {}
                config = family.single_config(tensors, values, **overrides)
                return config, make_table(config)
        folder = path.parent if (path.parent / "config.json").exists() else base

    values = read_config(folder, family.transformer)
    fixed = family.config_entries
    file = folder / "config.json"
    config = config_from(family.Config, file, values, fixed, **overrides)
    return config, make_table(config)


def _check_relatives(family: Family, tensors: Tensors) -> None:
    """Raise ValueError for a file of another model, which a key or the file's name tells."""
    signs = tensors.keys()
    name = tensors.path.name.lower()
    for sign, relative in family.other_models.items():
        if sign in name or sign in signs:
            wanted = " or ".join(published.name for published in family.published)
            raise ValueError(
                f"{tensors.path} is {relative} ({sign}); expected {wanted} or a fine-tune of it"
            )
