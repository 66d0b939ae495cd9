"""A tiny random Effort detector, as a module and under the published names."""

import copy

import torch

from tests.helpers.random_detectors import PROJECTIONS, WIDTH, make_tower


def effort_case(rank=1, bases=True):
    """The tower with its residuals added in, and the same under the published names."""
    torch.manual_seed(2)
    tower, head = make_tower("omniaid"), [0.3 * torch.randn(2, WIDTH), torch.randn(2)]
    state, dense = dict(zip(("head.weight", "head.bias"), head, strict=True)), tower.state_dict()
    for key, value in copy.deepcopy(dense).items():
        if not key.endswith(PROJECTIONS):
            state[f"backbone.{key}"] = value
            continue
        base = f"backbone.{key.removesuffix('.weight')}"
        u, s, v = torch.randn(WIDTH, rank), torch.rand(rank), torch.randn(rank, WIDTH) / 4
        dense[key] = value + u @ torch.diag(s) @ v
        state |= {f"{base}.weight_main": value, f"{base}.U_residual": u, f"{base}.S_residual": s}
        state[f"{base}.V_residual"] = v
        if bases:
            state |= {f"{base}.U_r": torch.ones(WIDTH, 31), f"{base}.V_r": torch.ones(31, WIDTH)}
            state[f"{base}.S_r"] = torch.ones(31)
    tower.load_state_dict(dense)
    return tower, head, state
