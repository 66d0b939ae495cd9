"""What the rewards say of pictures: scored while others are made or read, and kept, so that nothing is scored twice."""

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict

from realgen_jax.realbench.pictures import Picture
from realgen_jax.realbench.results import Problem, PromptSet, Scored
from reward_bridge.bridge import RewardBridge, RewardError

AHEAD = 2  # batches that wait for their scores
NO_MATTER = (
    "deadline",
    "attempts",
    "token_env",
)  # options of a reward that do not change its scores


def reward_keys(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, str]:
    """{reward: what its kept scores are filed under}, a digest of its name and options."""
    kept = {n: {k: v for k, v in options.get(n, {}).items() if k not in NO_MATTER} for n in names}
    return {n: _digest(json.dumps([n, kept[n]], sort_keys=True)) for n in names}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Kept:
    """The scores in a set's scores.jsonl, a line each, by picture, prompt and reward; a line that a kill cut off is
    dropped.
    """

    def __init__(self, file: Path, keys: Mapping[str, str]):
        self.file, self.keys, self._scores = file, keys, {}
        file.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_bytes().decode(errors="replace") if file.exists() else ""
        if text and not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            file.write_text(text)
        for line in text.splitlines():
            row = json.loads(line)
            self._scores[row["sha256"], row["prompt"], row["key"]] = row["score"]

    def get(self, picture: Picture, prompt: str) -> dict[str, float]:
        found = {
            name: self._scores.get((picture.sha256, _digest(prompt), key))
            for name, key in self.keys.items()
        }
        return {name: score for name, score in found.items() if score is not None}

    def add(
        self, pictures: Sequence[Picture], prompts: Sequence[str], scores: Mapping[str, np.ndarray]
    ) -> None:
        """Keep what is new."""
        lines = []
        for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
            for name in scores.keys() - self.get(picture, prompt).keys():
                row = {
                    "file": picture.file.name,
                    "sha256": picture.sha256,
                    "prompt": _digest(prompt),
                }
                row |= {"reward": name, "key": self.keys[name], "score": float(scores[name][i])}
                self._scores[row["sha256"], row["prompt"], row["key"]] = row["score"]
                lines.append(json.dumps(row) + "\n")
        with self.file.open("a") as file:
            file.write("".join(lines))


def score(
    entry: str,
    prompts: PromptSet,
    batches: Iterable[Sequence[Picture]],
    kept: Kept,
    bridge: RewardBridge,
    side: int,
    done: Callable[[int], None],
) -> tuple[list[Scored], list[Problem]]:
    """Every picture's scores, from `kept` or the bridge, and what is wrong with which picture. `side`: pixels that
    pictures should have; `done` hears how many are through.

    A batch is scored as a whole, by size, where anything of it is missing: a picture's scores do not depend on what was
    known before. Raises RewardError, which names the picture; what was scored until then is kept.
    """
    found, problems, waiting = [], [], deque()

    def settle(groups: list[tuple]) -> None:
        for group, texts, pending in groups:
            if pending is not None:
                try:
                    kept.add(group, texts, pending.result().rewards)
                except RewardError as error:
                    about = group if error.image is None else [group[error.image]]
                    files = " to ".join(
                        dict.fromkeys(str(picture.file) for picture in (about[0], about[-1]))
                    )
                    raise RewardError(f"{error}; {entry}, {prompts.name}: {files}") from error
            for picture, text in zip(group, texts, strict=True):
                height, width = picture.pixels.shape[1:]
                where = (
                    entry,
                    prompts.name,
                    *picture.slot,
                    picture.file,
                    picture.sha256,
                    width,
                    height,
                )
                found.append(Scored(*where, kept.get(picture, text)))
            done(len(group))

    for batch in batches:
        groups, good = [], []
        for picture in batch:
            if picture.pixels is None:
                problems.append(
                    Problem(entry, prompts.name, picture.file, "unreadable", picture.detail)
                )
                done(1)
                continue
            good.append(picture)
            height, width = picture.pixels.shape[1:]
            if (height, width) != (side, side):
                detail = f"{width} x {height} pixels; expected {side} x {side}"
                problems.append(Problem(entry, prompts.name, picture.file, "other size", detail))
        size = lambda picture: picture.pixels.shape  # noqa: E731
        for _, same in itertools.groupby(sorted(good, key=size), size):
            group = list(same)
            texts = [prompts.prompts[picture.slot[0]] for picture in group]
            known = [
                kept.get(picture, text).keys() for picture, text in zip(group, texts, strict=True)
            ]
            wanted = [name for name in kept.keys if any(name not in names for names in known)]
            pixels = (
                torch.from_numpy(np.stack([picture.pixels for picture in group]))
                if wanted
                else None
            )
            groups.append((group, texts, bridge.submit(pixels, texts, wanted) if wanted else None))
        waiting.append(groups)
        if len(waiting) > AHEAD:
            settle(waiting.popleft())
    for groups in waiting:
        settle(groups)
    return sorted(found, key=lambda one: (one.line, one.copy)), problems


def evaluation_options(config: ConfigDict) -> dict[str, Any]:
    """{reward: its options} of what `config.evaluate.scores` names."""
    options = config.reward.options.to_dict()
    return {name: options.get(name, {}) for name in config.evaluate.scores}
