"""Win rates within a prompt's pictures, judged two by two by a vision-language model."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from reward_bridge.groups import win_rates
from reward_bridge.rewards.yes_no import YesNoJudge


class PairwiseJudge(YesNoJudge):
    """The share of the other pictures of its prompt that a picture beats.

    Each question shows two pictures; "yes" means that the first one wins. Every pair is asked in
    both orders and each order is half of the outcome, so a preference for a place cancels: size x
    (size - 1) questions a prompt. With `refusal_score=0.5`, a refusal is undecided. Source:
    CodeGoat24/Pref-GRPO, which asks in one order.
    """

    name = "pairwise_judge"
    asks = (
        'Two pictures were made for this prompt: "{prompt}". Is the first picture more like a real '
        "photograph, taken by a camera, than the second one? Answer with one word, yes or no."
    )
    shown = 2

    def score_groups(self, images: torch.Tensor, prompts: Sequence[str], size: int) -> torch.Tensor:
        """uint8 [groups * size, 3, h, w] -> float32 [groups * size]. Raises as `ask` does."""
        pictures = images.permute(0, 2, 3, 1).cpu().numpy()
        pairs = list(itertools.permutations(range(size), 2))

        # Ask about all groups at once.
        questions = []
        for start in range(0, len(pictures), size):
            for first, second in pairs:
                pair = (pictures[start + first], pictures[start + second])
                questions.append((pair, prompts[start]))
        answers = self.ask(questions).numpy().reshape(-1, len(pairs))

        # first_wins [groups, first, second]: 1, 0, or 0.5 where an answer does not decide.
        first_wins = np.full((len(answers), size, size), 0.5)
        first_wins[:, *np.transpose(pairs)] = (np.sign(answers - 0.5) + 1) / 2
        outcome = (first_wins + 1 - np.swapaxes(first_wins, 1, 2)) / 2
        return torch.from_numpy(win_rates(outcome)).float().flatten()
