"""Digests of what a run reads. They are kept with it, and compared before it goes on."""

from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from realgen_jax.files import content_digest, expand_home
from realgen_jax.models.loading import model_files
from realgen_jax.training.run import reports


def input_digests(config: ConfigDict) -> dict[str, str]:
    """Return {key of the config: digest of what it names} for the model and the prompts.

    Large files are sampled (`content_digest`), so this takes a second or two for FLUX.1-dev. Raises
    ValueError or OSError if the model is incomplete.
    """
    # The model.
    pretrained = config.pretrained
    files: dict[str, list[Path]] = {"pretrained.model": model_files(pretrained)}
    for name in ("transformer", "vae", "lora"):
        if pretrained[name]:
            files[f"pretrained.{name}"] = [expand_home(pretrained[name])]

    # The language model.
    if config.stage == "rewriter":
        for name in ("path", "adapter"):
            if config.rewriter[name]:
                files[f"rewriter.{name}"] = [expand_home(config.rewriter[name])]

    # The prompts; those of the report, if there will be one.
    prompts = {f"prompts.{name}": config.prompts[name] for name in ("train", "test")}
    if reports(config):
        for name, file in config.evaluate.prompts.items():
            prompts[f"evaluate.prompts.{name}"] = file
    for key, file in prompts.items():
        if expand_home(file).is_file():  # what is missing is reported when it is read
            files[key] = [expand_home(file)]

    return {key: content_digest(paths) for key, paths in files.items()}


def check_unchanged(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise ValueError, naming the keys, if digests differ from those at the start of a run."""
    changed = [f"config.{key}" for key, digest in now.items() if before.get(key) != digest]
    if changed:
        raise ValueError(
            f"the content of what {', '.join(changed)} names has changed since this run started"
        )
