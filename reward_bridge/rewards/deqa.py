"""A picture's quality by a chat model, as DeQA-Score reads it (arXiv 2501.11561; Q-Align)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from reward_bridge.rewards.chat_judge import ChatJudge, Refusal
from reward_bridge.rewards.yes_no import (
    FIRST_TOKENS,
    FIRST_TOKENS_PLACE,
    LEAST_MASS,
    SPACES,
    top_tokens,
)

LEVELS = {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0}
LEAST_LETTERS = 2  # of a word's first token, in vocabularies that split the word


class Deqa(ChatJudge):
    """The expected level, 1 to 5, over five words for it: sum of p(word) level / sum of p(word).

    The probabilities are those of the answer's first word, among the 20 most likely tokens, in
    upper or lower case. A token is also counted where it is the beginning of a word, as "ex" of
    "excellent"; no two of the words begin alike. The prompt is not used.

    Differences from DeQA-Score: the question is ours and asks for one word, while DeQA-Score's
    model continues a sentence; a word without a token among the 20 has probability 0.
    """

    name = "deqa"
    asks = (
        "How good is the technical quality of this picture, its sharpness, noise, exposure and "
        "artifacts? Answer with one of these words: excellent, good, fair, poor, bad."
    )
    expected = "one of " + ", ".join(LEVELS)
    needs = "the first token's log-probabilities"
    place = FIRST_TOKENS_PLACE
    sampling = FIRST_TOKENS

    def read(self, choice: Mapping[str, Any]) -> float:
        """The expected level of a choice. Raises as `ChatJudge.read` does."""
        tokens = top_tokens(choice)
        mass, level = expected_level(tokens)
        if mass < LEAST_MASS:
            beginnings = [token for token, _ in tokens[:5]]
            raise Refusal(
                f"began its answer with one of {beginnings}, and the five words have a "
                f"probability of {mass:.2g} together, less than {LEAST_MASS}"
            )
        return level

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """uint8 [n, 3, h, w] and n prompts -> float32 [n]. Raises as `ask` does."""
        return self.ask_each(images, prompts)


def expected_level(tokens: Sequence[tuple[str, float]]) -> tuple[float, float]:
    """Return the probability of all five words together, and the level expected among them.

    tokens: (token, log-probability). The level is NaN if no token belongs to a word.
    """
    levels = []
    logs = []
    for token, log in tokens:
        letters = token.strip(SPACES).lower()
        for word, level in LEVELS.items():
            if len(letters) >= LEAST_LETTERS and word.startswith(letters):
                levels.append(level)
                logs.append(log)
    if not levels:
        return 0.0, float("nan")
    logs = torch.tensor(logs, dtype=torch.float64)
    level = logs.softmax(0) @ torch.tensor(levels, dtype=torch.float64)
    return logs.logsumexp(0).exp().item(), level.item()
