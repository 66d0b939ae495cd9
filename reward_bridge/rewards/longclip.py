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
from reward_bridge.weights import find, read

KEPT = 20  # text positions that stay those of the CLIP it was tuned from; the later ones were stretched and trained


def merge_positions(state: dict[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    """The two tables of text positions, [n, width] each, into one. Raises ValueError where one is missing."""
    tables = [state.get(name) for name in ("positional_embedding", "positional_embedding_res")]
    if any(table is None for table in tables):
        raise ValueError(
            f"{file} lacks positional_embedding or positional_embedding_res, so it is no Long-CLIP; "
            "set config.reward.options.longclip.path to longclip-L.pt"
        )
    merged = {**state, "positional_embedding": torch.cat([tables[0][:KEPT], tables[1][KEPT:]])}
    del merged["positional_embedding_res"]
    return merged


class LongClip:
    """Dot product of the features, not normalised, over `divide_by`: RealGen's training reward; evaluation uses 1.

    `path` is longclip-L.pt (BeichenZhang/LongCLIP-L on Hugging Face) or its folder; `tokenizer` a folder with CLIP's
    vocab.json and merges.txt, the file's own by default. Prompts have 248 tokens at most, the rest is cut.
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
        self.tokenizer = load_tokenizer(
            tokenizer or str(file.parent), "longclip.tokenizer", self.model
        )
        self.divide_by = divide_by

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        text = text_features(self.model, self.tokenizer, [clean(prompt) for prompt in prompts])
        return (image_features(self.model, images) * text).sum(-1) / self.divide_by
