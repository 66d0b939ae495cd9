"""Model families, one folder each, picked by the "_class_name" of a model's model_index.json."""

import importlib
from typing import Any

# A new family is one folder and one line here: pipeline class of diffusers -> "module:Family".
FAMILIES = {
    "FluxPipeline": "realgen_jax.models.flux.family:FLUX",
}


def get_family(pipeline: str) -> Any:
    """The Family (family.py) of a pipeline class in FAMILIES, imported when it is asked for."""
    module, _, name = FAMILIES[pipeline].partition(":")
    return getattr(importlib.import_module(module), name)
