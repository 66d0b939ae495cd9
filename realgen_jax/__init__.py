"""Reinforcement learning that makes text-to-image flow models photorealistic, in JAX.

The usual entry points are the programs in scripts/. From Python:

    from realgen_jax import load_model, make_mesh

    mesh = make_mesh(data=-1, fsdp=1, tensor=1, devices=jax.devices())
    model = load_model(config.pretrained, size=(1024, 1024), mesh=mesh)

Names are imported on first use, so programs that do not need JAX do not load it. The package
imports neither torch nor reward_bridge: callers pass in the rewards and judges.
"""

import importlib
from typing import Any

_MODULES = {
    # Models and their trainable parts.
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
    "ADVANTAGES": "advantages",
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
