"""Score pictures in the background, and store the scores so that none is computed twice."""

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from realgen_jax.files import append, drop_incomplete_line, read_jsonl
from realgen_jax.realbench.interfaces import PendingScores, Scorer
from realgen_jax.realbench.picture_files import Picture
from realgen_jax.realbench.results import Problem, PromptSet, ScoredPicture
from realgen_jax.training.scoring import ScoringError

AHEAD = 2  # maximum number of batches waiting for their scores


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class ScoreStore:
    """The scores in a set's scores.jsonl, one per line, by picture, prompt and reward."""

    def __init__(self, file: Path, keys: Mapping[str, str]):
        """keys: {reward: a digest of all that its scores depend on}.

        Raises ValueError naming a bad line.
        """
        self.file = file
        self.keys = keys
        self._scores: dict[tuple[str, str, str], float] = {}

        file.parent.mkdir(parents=True, exist_ok=True)
        drop_incomplete_line(file)
        for number, row in enumerate(read_jsonl(file), start=1):
            try:
                self._scores[row["sha256"], row["prompt"], row["key"]] = float(row["score"])
            except (LookupError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{file}, line {number}, is not a score ({error!r}); remove that line"
                ) from None

    def get(self, picture: Picture, prompt: str) -> dict[str, float]:
        """Return {reward: score} of all stored scores of a picture."""
        digest = _digest(prompt)
        scores = {}
        for name, key in self.keys.items():
            score = self._scores.get((picture.sha256, digest, key))
            if score is not None:
                scores[name] = score
        return scores

    def add(
        self, pictures: Sequence[Picture], prompts: Sequence[str], scores: Mapping[str, np.ndarray]
    ) -> None:
        """Store the scores, {reward: float32 [n]}, that are not stored yet."""
        lines = []
        for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
            for name in scores.keys() - self.get(picture, prompt).keys():
                row = {
                    "file": picture.file.name,
                    "sha256": picture.sha256,
                    "prompt": _digest(prompt),
                    "reward": name,
                    "key": self.keys[name],
                    "score": float(scores[name][i]),
                }
                self._scores[row["sha256"], row["prompt"], row["key"]] = row["score"]
                lines.append(json.dumps(row) + "\n")
        append(self.file, "".join(lines))


@dataclass(frozen=True)
class _Group:
    """Pictures of one size that are scored together."""

    pictures: list[Picture]
    prompts: list[str]
    pending: PendingScores | None  # None: all their scores are stored


class PictureScorer:
    """Scores the pictures of one entry and prompt set.

    If any score is missing, all pictures of that size in the batch are scored together, so a
    picture's scores do not depend on which scores were stored before.
    """

    def __init__(
        self,
        entry: str,
        prompt_set: PromptSet,
        store: ScoreStore,
        scorer: Scorer,
        size: tuple[int, int],
    ):
        """size: (width, height) that pictures should have, in pixels."""
        self.entry = entry
        self.prompt_set = prompt_set
        self.store = store
        self.scorer = scorer
        self.size = size
        self.scored: list[ScoredPicture] = []
        self.problems: list[Problem] = []

    def score(self, batches: Iterable[Sequence[Picture]], advance: Callable[[int], None]) -> None:
        """Fill `scored` and `problems`; `advance` is called with the number of pictures done.

        Raises ScoringError naming the picture on which a reward failed; earlier scores stay stored.
        """
        waiting = deque()
        for batch in batches:
            readable = self._readable(batch)
            advance(len(batch) - len(readable))
            waiting.append(self._submit(readable))
            if len(waiting) > AHEAD:
                self._collect(waiting.popleft(), advance)
        for groups in waiting:
            self._collect(groups, advance)
        self.scored.sort(key=lambda picture: (picture.line, picture.copy))

    def _readable(self, batch: Sequence[Picture]) -> list[Picture]:
        """Return the pictures that can be scored, and record all problems with pictures."""
        readable = []
        for picture in batch:
            if picture.pixels is None:
                self._note(picture, "unreadable", picture.detail)
                continue
            readable.append(picture)
            height, width = picture.pixels.shape[1:]
            if (width, height) != self.size:
                expected = " x ".join(map(str, self.size))
                detail = f"{width} x {height} pixels; expected {expected}"
                self._note(picture, "other size", detail)
        return readable

    def _note(self, picture: Picture, kind: str, detail: str) -> None:
        problem = Problem(self.entry, self.prompt_set.name, picture.file, kind, detail)
        self.problems.append(problem)

    def _submit(self, pictures: Sequence[Picture]) -> list[_Group]:
        """Queue the missing scores, for all pictures of one size together."""

        def size(picture: Picture) -> tuple[int, ...]:
            return picture.pixels.shape

        groups = []
        for _, same_size in itertools.groupby(sorted(pictures, key=size), size):
            group = list(same_size)
            prompts = [self.prompt_set.prompts[picture.slot[0]] for picture in group]
            names = self._missing_rewards(group, prompts)
            pending = None
            if names:
                images = np.stack([picture.pixels for picture in group])
                pending = self.scorer.submit(images, prompts, names)
            groups.append(_Group(group, prompts, pending))
        return groups

    def _missing_rewards(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> list[str]:
        """The rewards for which at least one of these pictures has no score."""
        missing = set()
        for picture, prompt in zip(pictures, prompts, strict=True):
            missing |= self.store.keys.keys() - self.store.get(picture, prompt).keys()
        return [name for name in self.store.keys if name in missing]

    def _collect(self, groups: Sequence[_Group], advance: Callable[[int], None]) -> None:
        """Wait for the scores of a batch and store them."""
        for group in groups:
            if group.pending is not None:
                scores = self._result(group)
                self.store.add(group.pictures, group.prompts, scores)
            for picture, prompt in zip(group.pictures, group.prompts, strict=True):
                height, width = picture.pixels.shape[1:]
                line, copy = picture.slot
                scored = ScoredPicture(
                    entry=self.entry,
                    set=self.prompt_set.name,
                    line=line,
                    copy=copy,
                    file=picture.file,
                    sha256=picture.sha256,
                    width=width,
                    height=height,
                    scores=self.store.get(picture, prompt),
                )
                self.scored.append(scored)
            advance(len(group.pictures))

    def _result(self, group: _Group) -> Mapping[str, np.ndarray]:
        """The scores of a group. Raises ScoringError for an error that names an image."""
        try:
            return group.pending.result().rewards
        except Exception as error:
            if not hasattr(error, "image"):  # not about pictures: a bug
                raise
            files = [picture.file for picture in group.pictures]
            names = f"{files[0]} to {files[-1]}" if len(files) > 1 else str(files[0])
            if error.image is not None:
                names = str(files[error.image])
            message = f"{error}; {self.entry}, {self.prompt_set.name}: {names}"
            raise ScoringError(message) from error
