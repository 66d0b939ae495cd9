"""Image-text alignment for long prompts, by Long-CLIP (arXiv 2403.15378)."""

from collections.abc import Sequence
from pathlib import Path

import torch

from reward_bridge.rewards.clip import (
    clean,
    image_features,
    load_openai,
    load_tokenizer,
    text_features,
)
from reward_bridge.weights import State, find, read

# Text positions kept from the original CLIP; later ones were interpolated and trained.
KEPT = 20
POSITIONS = "positional_embedding"
TRAINED_POSITIONS = "positional_embedding_res"


class LongClip:
    """Dot product of the features, not normalised, divided by `divide_by`.

    path: longclip-L.pt (BeichenZhang/LongCLIP-L on Hugging Face) or its folder.
    tokenizer: a folder with CLIP's vocab.json and merges.txt; by default the file's own folder.
    divide_by: 100 in RealGen's training reward, 1 in its evaluation.

    Prompts are cut after 248 tokens.
    """

    def __init__(
        self,
        device: str,
        path: str,
        tokenizer: str | None = None,
        divide_by: float = 100.0,
        dtype: str = "float32",
    ):
        file = find(path, "longclip.path", "longclip-L.pt", "*.pt", "*.safetensors")
        state = merge_positions(read(file), file)
        self.model = load_openai(state, file, (64, 64), "quick_gelu", device, dtype)
        folder = tokenizer or str(file.parent)
        self.tokenizer = load_tokenizer(folder, "longclip.tokenizer", self.model)
        self.divide_by = divide_by

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        prompts = [clean(prompt) for prompt in prompts]
        text = text_features(self.model, self.tokenizer, prompts)
        return (image_features(self.model, images) * text).sum(-1) / self.divide_by


def merge_positions(state: State, file: Path) -> dict[str, torch.Tensor]:
    """Merge the two tables of text positions, [n, width] each, into one.

    Raises ValueError if one is missing.
    """
    if POSITIONS not in state or TRAINED_POSITIONS not in state:
        raise ValueError(
            f"{file} lacks {POSITIONS} or {TRAINED_POSITIONS}, so it is not a Long-CLIP; set "
            "config.reward.options.longclip.path to longclip-L.pt"
        )
    merged = dict(state)
    trained = merged.pop(TRAINED_POSITIONS)
    merged[POSITIONS] = torch.cat([state[POSITIONS][:KEPT], trained[KEPT:]])
    return merged
