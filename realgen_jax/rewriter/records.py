"""rewrites.jsonl in a run's folder: rewrites of its evaluations and epochs, with their pictures."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from realgen_jax.files import read_jsonl, write_image, write_whole

FILE = "rewrites.jsonl"
PICTURES = "samples/rewrites"  # folder of the pictures, in the run's folder
SIDE = 384  # pixels; the longest side of a picture that is kept
KINDS = ("eval", "train")
ENTRIES = {
    "epoch": int,
    "kind": str,
    "prompt": str,
    "rewrite": str,
    "usable": bool,
    "reward": (int, float),
    "picture": (str, type(None)),
}


@dataclass(frozen=True)
class Record:
    """One rewrite. picture: a file in the run's folder, or None."""

    epoch: int
    kind: str  # eval: with the likeliest tokens; train: several of a prompt, sampled as in training
    prompt: str
    rewrite: str
    usable: bool
    reward: float
    picture: str | None


def keep_records(
    run: Path,
    epoch: int,
    kind: str,
    prompts: Sequence[str],
    rewrites: Sequence[str],
    usable: Sequence[bool],
    rewards: Sequence[float],
    pictures: np.ndarray,
) -> None:
    """Add n rewrites to a run's file, and the pictures of the first ones to its folder.

    pictures: uint8 [m, 3, h, w] of the first m <= n rewrites. A run that was resumed repeats an
    epoch: what the file has of this epoch and later ones is replaced.
    """
    folder = run / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str | None] = [None] * len(prompts)
    for number, pixels in enumerate(pictures):
        names[number] = f"{PICTURES}/{epoch:06}_{kind}_{number:04}.png"
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        write_image(run / names[number], image)

    file = run / FILE
    kept = [
        record
        for record in read_records(file)
        if record.epoch < epoch or (record.epoch == epoch and record.kind != kind)
    ]
    rows = zip(prompts, rewrites, usable, rewards, names, strict=True)
    new = [
        Record(epoch, kind, prompt, rewrite, bool(good), float(reward), name)
        for prompt, rewrite, good, reward, name in rows
    ]
    write_whole(file, "".join(json.dumps(asdict(record)) + "\n" for record in [*kept, *new]))


def read_records(file: Path) -> list[Record]:
    """Read rewrites.jsonl, [] if there is none. Raises ValueError naming a line that is wrong."""
    records = []
    for line, row in enumerate(read_jsonl(file), start=1):
        is_right = isinstance(row, dict) and all(
            name in row and isinstance(row[name], kinds) for name, kinds in ENTRIES.items()
        )
        if not is_right or row["kind"] not in KINDS:
            raise ValueError(
                f"{file}, line {line}, is no rewrite; expected the entries {', '.join(ENTRIES)}"
            )
        records.append(Record(**{name: row[name] for name in ENTRIES}))
    return records
