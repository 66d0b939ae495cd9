"""Text-to-image flow models made photorealistic by reinforcement learning, in JAX.

The programs in scripts/ are the usual way in. From Python:

    from realgen_jax import load_model, make_mesh

    mesh = make_mesh(data=-1, fsdp=1, tensor=1, devices=jax.devices())
    model = load_model(config.pretrained, resolution=1024, mesh=mesh)

Names are imported when they are used, so that programs which need no JAX do not load it. The
package imports neither torch nor reward_bridge: it is handed its rewards and judges.
"""

import importlib
from typing import Any

_MODULES = {
    # Models and what is trained of them.
    "FAMILIES": "models",
    "Family": "models.family",
    "Model": "models.model",
    "load_model": "models.loading",
    "abstract_model": "models.loading",
    "Lora": "models.trainable",
    "AllWeights": "models.trainable",
    # Sampling.
    "Plan": "rollout",
    "Trajectory": "rollout",
    "make_plan": "rollout",
    "sample": "rollout",
    # Training.
    "OBJECTIVES": "objectives",
    "make_objective": "objectives",
    "group_advantages": "advantages",
    "TrainState": "update",
    "Batch": "update",
    "Objective": "update",
    # The machine.
    "make_mesh": "sharding",
    "Checkpoints": "checkpoint",
    "TextCache": "text_cache",
    # Configs.
    "base": "config",
    "adversary": "config",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'realgen_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"realgen_jax.{_MODULES[name]}"), name)
