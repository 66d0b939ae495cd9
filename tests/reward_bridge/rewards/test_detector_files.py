"""Weight files of detectors that do not fit are refused, with the reason."""

import pytest
import torch

from reward_bridge.rewards import make_reward
from tests.helpers.random_detectors import (
    HEADS,
    SIZE,
    make_case,
    save,
)
from tests.helpers.random_effort import effort_case


@pytest.mark.parametrize("kind", ["omniaid", "omniaid_dino", "effort"])
def test_files_that_do_not_fit_are_refused(kind, tmp_path):
    state = effort_case()[2] if kind == "effort" else make_case(kind).state
    layer = {
        "omniaid": "encoder_layers.1",
        "omniaid_dino": "layer.1",
        "effort": "backbone.encoder.layers.1",
    }[kind]
    norm = f"{layer}.{'norm2' if kind == 'omniaid_dino' else 'layer_norm2'}.weight"
    options = {**HEADS, "size": SIZE} if kind == "omniaid_dino" else HEADS

    def refused(message, change=None, drop=(), **more):
        changed = {
            key: value for key, value in {**state, **(change or {})}.items() if key not in drop
        }
        with pytest.raises(ValueError, match=message):
            make_reward(kind, "cpu", {**save(changed, tmp_path), **options, **more})

    refused(r"1 keys missing, such as 'tower\..*norm2\.weight'", drop=[norm])
    refused(r"1 unexpected keys, such as 'tower\..*9'", {f"{layer}.mlp.9": torch.ones(1)})
    refused(
        r"1 keys that do not belong to this model, such as 'text\.x'", {"text.x": torch.ones(1)}
    )
    refused(r"norm2\.weight has shape \(7,\), expected \(32,\)", {norm: torch.ones(7)})
    refused(
        r"lacks tower\.embeddings\.patch_embedding.*another detector",
        drop=[k for k in state if "patch_emb" in k],
    )
    refused(
        rf"5 heads do not divide the width 32; set config\.reward\.options\.{kind}\.heads", heads=5
    )
    with pytest.raises(FileNotFoundError, match=rf"set config\.reward\.options\.{kind}\.path"):
        make_reward(kind, "cpu", {"path": str(tmp_path)})
