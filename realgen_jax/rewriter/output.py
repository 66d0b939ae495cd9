"""A file of rewritten prompts that is written in parts, and can be continued.

OUT                  .jsonl, {"prompt": what is drawn, "original": the user's prompt} a line
OUT.manifest.json    what determines its content
OUT.part             rewrites of an unfinished OUT, one a line
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from realgen_jax.files import append, drop_incomplete_line, read_jsonl, write_whole
from realgen_jax.rewriter.writer import Rewrite

KEPT = 1  # stream of the root key that chooses the lines which stay as they are; 0: rewrites
WRITTEN = 0


@dataclass(frozen=True)
class Line:
    """One line of the output: a prompt's line and copy, and whether it is to be rewritten."""

    number: int
    copy: int
    rewritten: bool


def plan_lines(prompts: int, copies: int, keep: float, key: jax.Array) -> list[Line]:
    """Return the output's lines. The share `keep` of them, drawn with the key, is not rewritten."""
    count = prompts * copies
    kept = round(keep * count)
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, KEPT), count))
    chosen = set(order[:kept].tolist())
    return [Line(i // copies, i % copies, i not in chosen) for i in range(count)]


class Output:
    """An output file, new or unfinished."""

    def __init__(self, file: Path, manifest: Mapping[str, Any], remake: bool):
        """manifest: all that determines the content; only JSON's values.

        remake: replace what was made with another manifest. Otherwise, raises FileExistsError for
        it, and for a file of unknown origin.
        """
        self.file = file
        self._manifest_file = file.with_name(file.name + ".manifest.json")
        self._part = file.with_name(file.name + ".part")
        exists = self.file.exists() or self._part.exists()
        difference = _difference(self._manifest_file, manifest)
        if exists and difference and not remake:
            raise FileExistsError(
                f"{file} was made {difference}; choose another --out, or --remake to replace it"
            )
        if difference:
            self.file.unlink(missing_ok=True)
            self._part.unlink(missing_ok=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._manifest_file, json.dumps(manifest, indent=2) + "\n")

    @property
    def is_whole(self) -> bool:
        """Whether there is nothing left to do."""
        return self.file.exists()

    def resume(self, batch: int, total: int) -> list[Rewrite]:
        """Return the rewrites that are there, of `total`, without an incomplete batch."""
        drop_incomplete_line(self._part)
        rows = read_jsonl(self._part)
        if len(rows) < total:
            rows = rows[: len(rows) // batch * batch]
        if self._part.exists():
            write_whole(self._part, "".join(map(_line, rows)))
        return [Rewrite(row["text"], row["usable"]) for row in rows]

    def add(self, rewrites: Iterable[Rewrite]) -> None:
        """Keep the next rewrites."""
        append(self._part, "".join(_line(asdict(rewrite)) for rewrite in rewrites))

    def finish(
        self, lines: Sequence[Line], prompts: Sequence[str], rewrites: Sequence[Rewrite]
    ) -> None:
        """Write the file. rewrites: of the lines that are rewritten, in order.

        A rewrite that cannot be drawn is not written; the user's prompt stands in its place.
        """
        left = iter(rewrites)
        rows = []
        for line in lines:
            original = prompts[line.number]
            prompt = original
            if line.rewritten:
                rewrite = next(left)
                prompt = rewrite.text if rewrite.usable else original
            rows.append(_line({"prompt": prompt, "original": original}))
        write_whole(self.file, "".join(rows))
        self._part.unlink(missing_ok=True)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _difference(file: Path, manifest: Mapping[str, Any]) -> str:
    """How a manifest on disk differs from this one, or "" if it does not."""
    if not file.exists():
        return "in an unknown way (it has no manifest)"
    try:
        before = json.loads(file.read_bytes())
    except ValueError:
        return f"in an unknown way ({file} is damaged)"
    now = json.loads(json.dumps(manifest))
    changes = [
        f"{name} {before.get(name)!r} then and {value!r} now"
        for name, value in now.items()
        if before.get(name) != value
    ]
    return f"with other settings: {', '.join(changes)}" if changes else ""
