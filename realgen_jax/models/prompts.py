"""The embeddings of a model's prompts, made by its family's text encoders."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from realgen_jax.hosts import process_index
from realgen_jax.models.family import Family
from realgen_jax.models.loading import find_family
from realgen_jax.text_cache import TextCache, ensure_encoded


def check_max_tokens(family: Family, max_tokens: int) -> None:
    """Raise ValueError if config.prompts.max_tokens is more than the model was trained to read."""
    if max_tokens > family.text_limit:
        raise ValueError(
            f"config.prompts.max_tokens is {max_tokens}; expected at most {family.text_limit}, as "
            f"many as {family.published[0].name} reads"
        )


def embed_prompts(
    prompts: Sequence[str],
    pretrained: Any,
    settings: Any,
    command: Sequence[str],
    model: str = "",
) -> TextCache:
    """Return the complete cache of these prompts and of the family's negative prompt, if any.

    The first process prints a line if prompts are longer than settings.max_tokens.

    pretrained: config.pretrained; settings: config.prompts; command: the encoding program, as for
    `ensure_encoded`; model: a pipeline folder that replaces the config's. Raises FileNotFoundError
    or ValueError for a folder that does not hold a model of a known family, ValueError for a
    max_tokens that it does not read.
    """
    if model:
        pretrained = ConfigDict({**pretrained.to_dict(), "model": model})
    family = find_family(pretrained)
    check_max_tokens(family, settings.max_tokens)
    texts = list(prompts)
    if family.negative_prompt is not None:
        texts.append(family.negative_prompt)
    cache = ensure_encoded(texts, pretrained.model, family.encoders, settings, command)

    message = cache.cut_message(settings.max_tokens)
    if message and process_index() == 0:
        print(message)
    return cache
