"""Rewards that read a number from 1 to 5 in what a chat model writes about a picture.

The instructions are ours. Where a model was trained on an instruction of its own, the option
`question` can hold that one, with `{prompt}` where the prompt belongs.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from reward_bridge.rewards.chat_judge import ChatJudge, Question, Refusal

LEAST, MOST = 1.0, 5.0
NUMBER = r"\d+(?:\.\d+)?"
WRITTEN_TOKENS = 512  # enough for an explanation before the number


class RatingJudge(ChatJudge):
    """Reads a rating in each answer's text. An answer without one is a refusal.

    The score is the rating divided by `divide_by`.
    """

    needs = "a text"
    place = "choices[0].message.content"
    sampling: Mapping[str, Any] = {"max_tokens": WRITTEN_TOKENS, "temperature": 0}
    divide_by = 1.0

    @staticmethod
    def rating(text: str) -> float | None:
        """The rating in a text, or None."""
        raise NotImplementedError

    def read(self, choice: Mapping[str, Any]) -> float:
        """The score of a choice. Raises as `ChatJudge.read` does."""
        text = choice["message"]["content"]
        if not isinstance(text, str):
            raise TypeError(f"the content is {text!r}")
        rating = self.rating(text)
        if rating is None:
            raise Refusal(f"answered {text[:200]!r}, which has no rating: {self.expected}")
        return rating / self.divide_by

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """uint8 [n, 3, h, w] and n prompts -> float32 [n]. Raises as `ask` does."""
        return self.ask_each(images, prompts)


class UnifiedReward(RatingJudge):
    """How well a picture fits its prompt and how good it is, 0.2 to 1, by UnifiedReward.

    The rating after "Final Score:", divided by 5 as in Flow-GRPO (arXiv 2503.05236). Differences
    from Flow-GRPO: the instruction is ours, and pictures keep their size (theirs are resized to
    512 x 512); an answer without a rating is a refusal (theirs scores 0).
    """

    name = "unifiedreward"
    asks = (
        "This picture was made for a caption. Judge two things. Does it show what the caption "
        "says: the objects, their properties and how they relate? And is it a good picture: sharp, "
        "detailed, natural in its colours, pleasing to look at? Give one score for both, from 1 "
        "(worst) to 5 (best), and write it as 'Final Score: ' and the number.\n"
        "Caption: [{prompt}]"
    )
    expected = "'Final Score: ' and a number from 1 to 5"
    divide_by = MOST

    @staticmethod
    def rating(text: str) -> float | None:
        """The number after "Final Score:", if it is between 1 and 5."""
        return in_range(re.search(rf"final\s+score\W{{0,6}}({NUMBER})", text, re.IGNORECASE))


class QwenVlScore(RatingJudge):
    """A picture's aesthetic quality, 0.2 to 1, by Qwen2.5-VL or another chat model.

    The rating in <Score> tags, divided by 5 as in Flow-GRPO's `qwenvl`. The prompt is not used.
    Differences from Flow-GRPO: the instruction is ours, ratings may have decimals, and an answer
    without a rating is a refusal (theirs scores 0).
    """

    name = "qwen_vl_score"
    asks = (
        "Rate how beautiful and well made this picture is, on a scale from 1 to 5. 1: hardly "
        "anything can be recognised; blurred, noisy, badly lit. 2: clear faults in focus, light or "
        "composition. 3: an ordinary picture without large faults. 4: sharp, well lit and well "
        "composed. 5: the work of a master in light, colour and composition. Give your reasons in "
        "one sentence, then the number as <Score>3</Score>."
    )
    expected = "a number from 1 to 5 in <Score> tags"
    divide_by = MOST

    @staticmethod
    def rating(text: str) -> float | None:
        """The number in <Score> tags, if it is between 1 and 5."""
        return in_range(re.search(rf"<score>\s*({NUMBER})\s*</score>", text, re.IGNORECASE))


class VisualQualityR1(RatingJudge):
    """A picture's quality, 1 to 5, after a chain of thought that is sampled (arXiv 2505.14460).

    RealGen-V2's fourth reward, by VisualQuality-R1-7B. Each answer is drawn from the 50 most likely
    tokens; `request={"n": 4}` averages four answers, and `request={"top_k": None}` is for endpoints
    that do not know top_k. The seed of a request is a checksum of picture and prompt, so an
    endpoint that honours it answers the same again. The prompt is not shown to the model.

    Differences from RealGen-V2: the instruction is ours, and an answer without a number is a
    refusal (theirs scores 1; `refusal_score=1.0` does so here too).
    """

    name = "visualquality_r1"
    asks = (
        "Assess the quality of this picture. How good is it overall? Think about it first, inside "
        "<think> </think>. Then rate it with one number from 1 (very poor) to 5 (excellent), with "
        "two decimals, inside <answer> </answer>."
    )
    expected = "a number in <answer> tags"
    sampling: Mapping[str, Any] = {"max_tokens": WRITTEN_TOKENS, "temperature": 1.0, "top_k": 50}

    @staticmethod
    def rating(text: str) -> float | None:
        """The first number in the last <answer> tags, or in a text without them; 1 to 5."""
        answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        match = re.search(NUMBER, answers[-1] if answers else text)
        return None if match is None else min(max(float(match[0]), LEAST), MOST)

    def _body(self, question: Question) -> dict[str, Any]:
        """The request, with a seed of its own."""
        pictures, prompt = question
        seed = zlib.crc32(prompt.encode())
        for picture in pictures:
            seed = zlib.crc32(picture.tobytes(), seed)
        return {**super()._body(question), "seed": seed & 0x7FFFFFFF}


def in_range(match: re.Match | None) -> float | None:
    """The number of a match's first group, or None without a match or outside 1 to 5."""
    if match is None:
        return None
    number = float(match[1])
    return number if LEAST <= number <= MOST else None
