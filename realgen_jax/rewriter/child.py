"""Rewrites from scripts/rewrite.py in a process of its own, whose memory is free afterwards."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realgen_jax.data import read_prompts
from realgen_jax.files import write_whole
from realgen_jax.process import run_child

BATCH = 32  # most prompts of one call


@dataclass(frozen=True)
class RewriteProgram:
    """How to call the program.

    command: such as [sys.executable, "scripts/rewrite.py"]. pipeline, max_tokens: the image model's
    folder, and what it reads (config.prompts). compilation_cache: of the config. remake: replace
    rewrites that were made with other settings. quiet: print errors and progress only.
    """

    command: Sequence[str]
    pipeline: str
    max_tokens: int
    compilation_cache: str
    remake: bool
    quiet: bool = False

    def rewrite(self, rewriter: str | Path, prompts: Sequence[str], folder: Path) -> list[str]:
        """Return the most probable rewrite of each prompt, or the prompt if it cannot be drawn.

        They are kept in folder/rewrites.jsonl, and read from there the next time. Raises
        ChildProcessError if the program fails.
        """
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts]
        write_whole(folder / "prompts.jsonl", "".join(lines))
        options: dict[str, Any] = {
            "rewriter": rewriter,
            "prompts": folder / "prompts.jsonl",
            "out": folder / "rewrites.jsonl",
            "pipeline": self.pipeline,
            "max_tokens": self.max_tokens,
            "keep": 0,
            "temperature": 0,
            "batch": min(BATCH, len(prompts)),
            "compilation_cache": self.compilation_cache,
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        for name in ("remake", "quiet"):
            if getattr(self, name):
                words.append(f"--{name}")
        if run_child([*self.command, *words]):
            raise ChildProcessError(f"the prompts were not rewritten by {rewriter} (see above)")
        return read_prompts(folder / "rewrites.jsonl")
