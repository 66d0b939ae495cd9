"""Tiny learners of every kind, on random weights."""

import torch
import transformers

from reward_bridge.learners import make_learner
from tests.helpers.random_detectors import HEADS, SIZE, make_case, save
from tests.helpers.tiny_clips import write_folder

SMALL = {**HEADS, "resize_first": 56}


def make(kind, folder, **options):
    """A tiny learner of each kind on random weights; a kind's second word picks LoRA files."""
    name = kind.split()[0]
    if name.startswith("omniaid"):
        case = make_case(name, lora="lora" in kind)
        if name == "omniaid_dino":
            options = {"size": SIZE, **options}
        torch.manual_seed(7)
        for key in case.state:  # as the SVD leaves them
            if key.endswith(("U_r", "V_r")):
                basis = torch.linalg.qr(torch.randn(32, 32)).Q[:, :29]
                case.state[key] = basis if key.endswith("U_r") else basis.T.contiguous()
        options = {**save(case.state, folder), **SMALL, **options}
    elif name == "dino_discriminator":
        options = {"path": str(write_dinov2(folder)), "size": 42, "patches": 5, **options}
    elif name == "pickscore":
        write_folder(folder)
        options = {"path": str(folder), **options}
    return make_learner(name, "cpu", options)


def write_dinov2(folder):
    torch.manual_seed(3)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "mlp_ratio": 2,
        "image_size": 42,
    }
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, patch_size=14)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder
