"""P(real) by Effort (arXiv 2411.15633): CLIP ViT-L/14 with trained residuals in its projections.

Only the last singular directions of the attention projections were trained. RealGen evaluates with
Effort and never trains on it. Source: YZY-stack/Effort-AIGI-Detection, effort_detector.py.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionModel
from transformers.initialization import no_init_weights

from reward_bridge.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    normalize,
    resize,
)
from reward_bridge.rewards.mixture import set_gates, tensor_shape, use_experts
from reward_bridge.rewards.omniaid import clip_config
from reward_bridge.weights import Table, find, load_strict, read, rename, torch_dtype

STATISTICS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "clip": (CLIP_MEAN, CLIP_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
TABLE: Table = (
    # The main bases, which only a loss needs and some files lack, and the buffer 0, 1, 2, ...
    (r".*\.([SUV]_r|position_ids)", None),
    (r"backbone\.(.+)\.([USV])_residual", r"tower.\1.\2_experts.0"),
    (r"backbone\.(.+)", r"tower.\1"),
    (r"(head\..+)", r"\1"),
)


class Effort:
    """P(real) = softmax(logits)[0], where logits are linear in the class token after the last norm.

    A projection is W + U diag(S) V. Pictures are resized to the model's size, bilinear; the aspect
    ratio is not kept. Three programs preprocess pictures in three different ways. `normalize`
    selects one of them, including its resize:
    "imagenet": RealGen's evaluation (eval/model-eval/eval/effort_eval.py), antialiased, not rounded
        to 8 bits;
    "none": RealGen's scorer (flow_grpo/effort_scorer.py), like PIL;
    "clip": Effort's own (DeepfakeBench/training/demo.py), not antialiased, like OpenCV except for
        its rounding.
    """

    def __init__(
        self,
        device: str,
        path: str,
        normalize: str = "imagenet",
        heads: int | None = None,
        dtype: str = "float32",
    ):
        if normalize not in STATISTICS:
            raise ValueError(
                f"got effort.normalize {normalize!r}; expected one of {', '.join(STATISTICS)}"
            )
        self.normalize = normalize
        self.dtype = torch_dtype(dtype)

        file = find(path, "effort.path", "effort_clip_L14_trainOn_sdv14.pth")
        state = rename(read(file), TABLE, file)
        config = clip_config(state, heads, "effort", file)
        rank_key = "tower.encoder.layers.0.self_attn.q_proj.S_experts.0"
        rank = tensor_shape(state, rank_key, file)[0]

        with no_init_weights():  # all weights are loaded next
            tower = use_experts(CLIPVisionModel(config), 1, rank)
        model = nn.ModuleDict({"tower": tower, "head": nn.Linear(config.hidden_size, 2)})
        self.size = config.image_size
        self.model = load_strict(model, state, file).to(device)
        tower.to(self.dtype)
        set_gates(tower, torch.ones(1, 1, device=device))  # one expert, always on

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, h, w] -> the tower's input, [n, 3, size, size]."""
        size = (self.size, self.size)
        if self.normalize == "none":
            x = resize(images, size, "bilinear")
        else:
            antialias = self.normalize == "imagenet"
            x = F.interpolate(
                images.float(), size, mode="bilinear", antialias=antialias, align_corners=False
            )
        return normalize(x, *STATISTICS[self.normalize], self.dtype)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        features = self.model["tower"](self.pixels(images)).pooler_output
        return self.model["head"](features.float()).softmax(-1)[:, 0]
