"""Human preference score v2.1 (arXiv 2306.09341)."""

from collections.abc import Sequence

import torch

from reward_bridge.rewards.clip import (
    clean,
    cosine,
    image_features,
    load_openai,
    load_tokenizer,
    text_features,
)
from reward_bridge.weights import find, read


class HPSv2:
    """Cosine of image and prompt by open_clip's ViT-H-14, fine-tuned on people's rankings.

    Scores are about 0.3.

    path: HPS_v2.1_compressed.pt (xswu/HPSv2 on Hugging Face) or its folder.
    tokenizer: a folder with CLIP's tokenizer; by default the file's own folder.

    Pictures are resized as by PIL. The authors' package (hpsv2 1.2) resizes the float tensor,
    bicubic. With torchvision 0.17 and later (RealGen has 0.21) that is antialiased and differs only
    by PIL's rounding and clipping to 8 bits: scores move by at most 0.8 % of their spread. Before
    0.17 it is not antialiased: scores move by up to 13 %. (Measured on 15 photographs of 512 pixels
    with a ViT with random weights.)
    """

    def __init__(
        self, device: str, path: str, tokenizer: str | None = None, dtype: str = "float32"
    ):
        file = find(path, "hpsv2.path", "HPS_v2.1_compressed.pt")
        self.model = load_openai(read(file), file, (80, 64), "gelu", device, dtype)
        folder = tokenizer or str(file.parent)
        self.tokenizer = load_tokenizer(folder, "hpsv2.tokenizer", self.model)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        prompts = [clean(prompt) for prompt in prompts]
        text = text_features(self.model, self.tokenizer, prompts)
        return cosine(image_features(self.model, images), text)
