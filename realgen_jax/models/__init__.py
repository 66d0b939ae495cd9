"""Model families, one folder each, selected by "_class_name" in a model's model_index.json."""

import importlib
from typing import Any

# A new family is one folder and one line here: pipeline class of diffusers -> "module:Family".
FAMILIES = {
    "FluxPipeline": "realgen_jax.models.flux.family:FLUX",
    "StableDiffusion3Pipeline": "realgen_jax.models.sd3.family:SD3",
    "ZImagePipeline": "realgen_jax.models.zimage.family:Z_IMAGE",
}


def get_family(pipeline: str) -> Any:
    """Return the Family (family.py) of a pipeline class in FAMILIES, importing it on first use."""
    module, _, name = FAMILIES[pipeline].partition(":")
    return getattr(importlib.import_module(module), name)
