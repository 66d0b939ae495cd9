"""How well a picture shows the text that its prompt quotes (Flow-GRPO's OCR reward, 2505.05470)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


class Ocr:
    """1 - min(d, n) / n, where d is the edit distance from the text that is read to the quoted one.

    The quoted text, of n letters, is what stands in the prompt's first pair of double quotes. Both
    texts are compared without spaces and in lower case, and d is 0 where the quoted text is a part
    of what is read. The lines of a picture are read by PP-OCR, from top to bottom; the models come
    with the package rapidocr and run on the CPU.

    Flow-GRPO: the same formula, with PaddleOCR's English models.
    """

    packages = ("rapidocr", "onnxruntime", "rapidfuzz")
    extra = "ocr"

    def __init__(self, device: str):
        # Imported here because only this reward needs the extra's packages.
        from rapidfuzz.distance import Levenshtein
        from rapidocr import RapidOCR

        self.reader = RapidOCR(params={"Global.log_level": "critical", "Global.use_cls": False})
        self.distance = Levenshtein.distance

    @staticmethod
    def check_prompt(prompt: str, options: Mapping[str, Any]) -> None:
        """Raise ValueError for a prompt without a quoted text."""
        quoted_text(prompt)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """uint8 [n, 3, h, w] and n prompts -> float32 [n], 0 to 1."""
        wanted = [squeeze(quoted_text(prompt)) for prompt in prompts]
        scores = []
        for picture, text in zip(images.permute(0, 2, 3, 1).cpu().numpy(), wanted, strict=True):
            blue_first = picture[:, :, ::-1].copy()
            lines = self.reader(blue_first).txts or ()
            scores.append(self._score(squeeze("".join(lines)), text))
        return torch.tensor(scores, dtype=torch.float32)

    def _score(self, read: str, wanted: str) -> float:
        distance = 0 if wanted in read else self.distance(read, wanted)
        return 1 - min(distance, len(wanted)) / len(wanted)


def quoted_text(prompt: str) -> str:
    """Return the text in the first pair of double quotes. Raises ValueError if there is none."""
    match = QUOTED.search(prompt)
    text = (match[1] or match[2] or "") if match else ""
    if not squeeze(text):
        raise ValueError(
            f"the prompt {prompt!r} quotes no text; expected the text that the picture shall show "
            'in double quotes, as in: a shop sign that says "Open"'
        )
    return text


def squeeze(text: str) -> str:
    """Return a text without spaces, in lower case."""
    return text.replace(" ", "").lower()
