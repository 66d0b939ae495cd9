"""The embeddings of a model's prompts, made by its family's text encoders."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from realgen_jax.models.loading import find_family
from realgen_jax.text_cache import TextCache, ensure_encoded


def embed_prompts(
    prompts: Sequence[str],
    pretrained: Any,
    settings: Any,
    command: Sequence[str],
    model: str = "",
) -> TextCache:
    """The complete cache of these prompts, and of the negative prompt where the family has one.

    pretrained: config.pretrained; settings: config.prompts; command: the program that encodes, as
    for `ensure_encoded`; model: another pipeline folder than that of the config. Raises
    FileNotFoundError or ValueError for a folder that is none of a known family.
    """
    if model:
        pretrained = ConfigDict({**pretrained.to_dict(), "model": model})
    family = find_family(pretrained)
    texts = list(prompts)
    if family.negative_prompt is not None:
        texts.append(family.negative_prompt)
    return ensure_encoded(texts, pretrained.model, family.encoders, settings, command)
