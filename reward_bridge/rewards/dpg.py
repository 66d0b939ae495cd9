"""DPG-Bench: the share of a prompt's yes/no questions to which its picture answers yes (ELLA)."""

import csv
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from reward_bridge.rewards.yes_no import YesNoJudge
from reward_bridge.weights import expand_home

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "question_natural_language")


@dataclass(frozen=True)
class DpgQuestion:
    """A question about a picture. parents: the ids of questions that it makes no sense without."""

    number: int
    text: str
    parents: tuple[int, ...]


class Dpg(YesNoJudge):
    """The share of the prompt's questions that are answered with yes, 0 to 1.

    An answer is yes if P(yes) is above 0.5. A question counts as no if one that it depends on does,
    as "is the dog brown?" on "is there a dog?" (Davidsonian scene graphs, arXiv 2310.18235).

    prompts: DPG-Bench's dpg_bench.csv. Only its prompts can be scored. The other options are those
        of `vlm_judge`; `question` holds `{prompt}`, where the file's question is inserted.

    Differences from DPG-Bench: its answers are those of mPLUG-large, without probabilities.
    """

    name = "dpg"
    asks = "{prompt} Look at the picture and answer with one word, yes or no."

    def __init__(
        self,
        device: str,
        url: str,
        model: str,
        prompts: str,
        question: str | None = None,
        api_key_env: str | None = None,
        concurrency: int = 8,
        timeout: float = 30.0,
        attempts: int = 4,
        deadline: float = 100.0,
        refusal_score: float | None = None,
        max_refused: float = 0.1,
        request: Mapping[str, Any] | None = None,
    ):
        super().__init__(
            device, url, model, question, api_key_env, concurrency, timeout, attempts, deadline,
            refusal_score, max_refused, request,
        )  # fmt: skip
        self.questions = read_once(prompts)

    @staticmethod
    def check_prompt(prompt: str, options: Mapping[str, Any]) -> None:
        """Raise ValueError for a prompt that is not in the file `prompts`."""
        if "prompts" in options:
            questions_of(prompt, read_once(options["prompts"]))

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """uint8 [n, 3, h, w] and n prompts -> float32 [n]. Raises as `ask` does."""
        wanted = [questions_of(prompt, self.questions) for prompt in prompts]
        pictures = images.permute(0, 2, 3, 1).cpu().numpy()
        pairs = []
        for picture, questions in zip(pictures, wanted, strict=True):
            pairs += [((picture,), question.text) for question in questions]
        answers = (self.ask(pairs) > 0.5).tolist()

        scores = []
        for questions in wanted:
            own, answers = answers[: len(questions)], answers[len(questions) :]
            scores.append(share(questions, own))
        return torch.tensor(scores, dtype=torch.float32)


def share(questions: Sequence[DpgQuestion], answers: Sequence[bool]) -> float:
    """The share of questions answered with yes whose parents are so too, in the file's order.

    Parents that the file lacks are ignored.
    """
    holds: dict[int, bool] = {}
    for question, answer in zip(questions, answers, strict=True):
        holds[question.number] = answer
    for question in questions:
        if not all(holds.get(parent, True) for parent in question.parents):
            holds[question.number] = False
    return sum(holds.values()) / len(holds)


def questions_of(
    prompt: str, questions: Mapping[str, Sequence[DpgQuestion]]
) -> Sequence[DpgQuestion]:
    """A prompt's questions. Raises ValueError for an unknown prompt."""
    if prompt not in questions:
        raise ValueError(
            f"the prompt {prompt[:80]!r} is not in config.reward.options.dpg.prompts; there are "
            "questions only for prompts of that file"
        )
    return questions[prompt]


@functools.lru_cache(maxsize=4)
def read_once(file: str) -> dict[str, list[DpgQuestion]]:
    """Read dpg_bench.csv: {prompt: its questions}, in the file's order.

    Raises FileNotFoundError, or ValueError naming the first bad line.
    """
    path = expand_home(file)
    if not path.is_file():
        raise FileNotFoundError(
            f"config.reward.options.dpg.prompts is {file!r}, which does not exist; expected "
            "DPG-Bench's dpg_bench.csv"
        )
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{file} has no column {', '.join(missing)}; expected DPG-Bench's dpg_bench.csv"
            )
        questions: dict[str, list[DpgQuestion]] = {}
        items: dict[str, str] = {}  # of a prompt that several items have, the first one counts
        for row in reader:
            try:
                prompt, question = _question(row)
            except (ValueError, AttributeError) as error:
                raise ValueError(
                    f"{file}, line {reader.line_num}, is no question of DPG-Bench ({error})"
                ) from error
            if items.setdefault(prompt, row["item_id"]) == row["item_id"]:
                questions.setdefault(prompt, []).append(question)
    if not questions:
        raise ValueError(f"{file} is empty; expected DPG-Bench's dpg_bench.csv")
    return questions


def _question(row: Mapping[str, str]) -> tuple[str, DpgQuestion]:
    """The prompt and question of a row. A dependency of 0 stands for none."""
    prompt = row["text"].strip()
    text = row["question_natural_language"].strip()
    if not prompt or not text:
        raise ValueError("an empty text or question")
    parents = [int(parent) for parent in row["dependency"].split(",") if parent.strip()]
    return prompt, DpgQuestion(
        int(row["proposition_id"]), text, tuple(parent for parent in parents if parent)
    )
