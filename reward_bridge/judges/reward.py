"""A reward as the judge: the picture with the higher score looks more like a photograph.

The verdict is written as the text that a chat model would answer, in the format that the question
asks for, so that it is parsed and stored like any other reply.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from reward_bridge.bridge import Reward
from reward_bridge.input_files import read_image
from reward_bridge.judges import Failures, Keep, Question, Say
from reward_bridge.rewards import make_reward

EMBEDDED = "embedded_held_out"  # the reward of `--judge embedded`
MARGIN = 0.01  # scores that differ by less are a tie
FORMATS = ("PNG", "JPEG", "WEBP")


class RewardJudge:
    """Scores both pictures in this process and prefers the higher score."""

    is_person = False

    def __init__(self, reward: str = EMBEDDED, device: str = "cpu", margin: float = MARGIN):
        self.name = reward
        self.device = device
        self.margin = margin

    def compare(
        self, questions: Sequence[Question], *, answered: int, keep: Keep, say: Say
    ) -> None:
        """Answer all questions and `keep` each verdict at once; say which questions failed.

        Raises ValueError if the reward cannot be built.
        """
        reward = make_reward(self.name, self.device, {})
        failures = Failures()
        for question in questions:
            try:
                pictures = [question.picture("first"), question.picture("second")]
            except ValueError as error:
                failures.reasons[str(error)] += 1
                continue

            try:
                scores = [score_picture(reward, decode_picture(data)) for data in pictures]
            except Exception as error:
                failures.stopped = f"the reward {self.name} failed: {error}"
                break

            reply = answer_for(question.text)(scores, self.margin)
            verdict = question.read(reply)
            keep(question, verdict or "unreadable", reply)
        failures.report(self.name, say)


def score_picture(reward: Reward, picture: np.ndarray) -> float:
    """uint8 [h, w, 3] -> its score. The reward sees no prompt."""
    with torch.inference_mode():
        return float(reward(torch.from_numpy(picture).permute(2, 0, 1)[None], [""])[0])


def decode_picture(data: bytes) -> np.ndarray:
    """A PNG, JPEG or WEBP file -> uint8 [h, w, 3]. Raises ValueError for anything else."""
    return np.array(read_image(data, FORMATS))


# -- The answer, in the format that the question asks for


def balanced_answer(scores: Sequence[float], margin: float) -> str:
    """The last line of protocol `balanced`. Equal scores and those within the margin are a tie."""
    difference = scores[0] - scores[1]
    if difference == 0 or abs(difference) < margin:
        verdict = "tie"
    elif difference > 0:
        verdict = "1"
    else:
        verdict = "2"
    return f"Verdict: {verdict}"


def realgen_answer(scores: Sequence[float], margin: float) -> str:
    """The two lines of protocol `realgen`, which has no ties.

    The higher score wins by any margin; equal scores get an answer that names neither picture.
    """
    difference = scores[0] - scores[1]
    if difference == 0:
        choice = "neither"
    elif difference > 0:
        choice = "Image 1"
    else:
        choice = "Image 2"
    return f"More Realistic Image: {choice}\nReason: scores of {scores[0]:.4f} and {scores[1]:.4f}."


Answer = Callable[[Sequence[float], float], str]
ANSWERS: dict[str, Answer] = {
    "verdict:": balanced_answer,
    "more realistic image:": realgen_answer,
}


def answer_for(text: str) -> Answer:
    """Return the answer format that a question's text asks for. Raises ValueError if unknown."""
    lower_case = text.lower()
    for words, answer in ANSWERS.items():
        if words in lower_case:
            return answer
    raise ValueError(f"the text asks for no known form of answer: {', '.join(ANSWERS)}")


def make_judge(settings: Any) -> RewardJudge:
    """The judge `embedded`. settings: config.evaluate.arena."""
    return RewardJudge()
