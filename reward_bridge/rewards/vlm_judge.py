"""P(yes) by a vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang, ...)."""

from collections.abc import Sequence

import torch

from reward_bridge.rewards.yes_no import YesNoJudge


class VlmJudge(YesNoJudge):
    """Asks a yes/no question about each picture. The score is P(yes) of the answer's first word."""

    name = "vlm_judge"
    asks = (
        "Is this picture a real photograph, taken by a camera, rather than a computer-generated "
        "image? Answer with one word, yes or no."
    )

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """uint8 [n, 3, h, w] and n prompts -> float32 [n]. Raises as `ask` does."""
        return self.ask_each(images, prompts)
