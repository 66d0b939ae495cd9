"""The plan of an evaluation: which pictures to generate or read, by entry and prompt set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from realgen_jax.realbench.entries import Weights, find_pictures, weights_of
from realgen_jax.realbench.picture_files import Slot, missing_pictures
from realgen_jax.realbench.results import Entry, Problem, PromptSet


@dataclass(frozen=True)
class Task:
    """The pictures of one entry and prompt set.

    texts: what is drawn for each line, the prompts or their rewrites. Scores are always those of
    the prompts.
    """

    entry: Entry
    prompt_set: PromptSet
    texts: Sequence[str]
    folder: Path  # folder of the generated pictures and of scores.jsonl
    weights: Weights | None  # weights that generate the pictures; None: they are read
    files: Mapping[Slot, Path] = field(default_factory=dict)  # existing pictures to read
    missing: np.ndarray = field(
        default_factory=lambda: np.zeros(0, bool)
    )  # to make, [lines * copies]

    @property
    def count(self) -> int:
        """How many pictures there will be."""
        return len(self.files) if self.weights is None else len(self.missing)


def plan_tasks(
    config: ConfigDict, entries: Sequence[Entry], sets: Sequence[PromptSet], folder: Path
) -> tuple[list[Task], list[Problem]]:
    """Return the tasks by entry and set, and the problems with the pictures to read.

    Raises ValueError for entries without weights or pictures. Nothing is written.
    """
    pictures_of_set = len(sets[0].prompts) * config.evaluate.images_per_prompt
    tasks = []
    problems = []
    for entry in entries:
        entry_folder = folder / "evaluation" / entry.name
        weights = weights_of(entry, config.pretrained) if entry.is_generated else None
        pictures = {}
        if weights is None:
            pictures, entry_problems = find_pictures(entry, sets)
            problems += entry_problems

        for prompt_set in sets:
            task = Task(
                entry=entry,
                prompt_set=prompt_set,
                texts=prompt_set.prompts,
                folder=entry_folder / prompt_set.name,
                weights=weights,
                files=pictures.get(prompt_set.name, {}),
                missing=np.zeros(0 if weights is None else pictures_of_set, bool),
            )
            tasks.append(task)
    return tasks, problems


def find_missing(task: Task, copies: int) -> Task:
    """Return the task with `missing` updated from the files on disk."""
    if task.weights is None:
        return task
    lines = len(task.prompt_set.prompts)
    return replace(task, missing=missing_pictures(task.folder, lines, copies))
