"""RealGen's stages one after another: train the rewriter, rewrite, train the image model, compare.

    python scripts/run_stages.py --name demo                        the embedded models
    python scripts/run_stages.py --name big \\
        --rewriter configs/rewriter_grpo.py:flux_rewriter_8xh200 \\
        --image configs/flux_grpo.py:flux_dev_8xh200 --to_image=--config.num_epochs=500

    runs/NAME/rewriter/       the run of stage 1; its rewriter/ has the weights
    runs/NAME/prompts.jsonl   its training prompts, rewritten; the share --keep of them is not
    runs/NAME/image/          the run of stage 2, on these prompts; its report compares the config's
                              model (base), with the rewriter, with the trained weights, with both

The image model of both stages is that of the rewriter's config. The same command continues after
an interruption: parts that are done are skipped. docs/rewriter.md has more.
"""

from realgen_jax import process

process.begin(__name__)  # before the imports that take seconds

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realgen_jax.config_files import load_config
from realgen_jax.files import write_whole
from realgen_jax.process import run_child
from realgen_jax.rewriter.files import FILE as REWRITER_FILE

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """One of the programs that are called. result: a file that it leaves when it is done."""

    name: str
    command: Sequence[str]
    result: Path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--name", required=True, help="folder in --run_root")
    add("--run_root", default="runs", help="parent of the run folders")
    add("--rewriter", default="configs/rewriter_grpo.py", help="config of stage 1")
    add("--image", default="configs/flux_grpo.py", help="config of stage 2 and of the comparison")
    add("--keep", type=float, default=0.25, help="share of the prompts that are not rewritten")
    add("--per_prompt", type=int, default=1, help="rewrites of each prompt for stage 2")
    add("--seed", type=int, default=0, help="root of the rewrites' noise")
    for name, program in (
        ("to_rewriter", "train.py in stage 1"),
        ("to_image", "train.py in stage 2 and evaluate.py, such as --to_image=--config.seed=1"),
        ("to_evaluate", "evaluate.py, such as --to_evaluate=--judge=embedded"),
    ):
        add(f"--{name}", action="append", default=[], help=f"an argument for {program}; repeatable")
    args = parser.parse_args()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", args.name):
        parser.error(f"--name is {args.name!r}; expected letters, digits, '.', '_', '+', '-'")
    return args


def program(script: str, *words: Any) -> list[str]:
    """The command line of a program in this folder."""
    return [sys.executable, str(HERE / script), *map(str, words)]


def train_rewriter(args: argparse.Namespace, folder: Path) -> Part:
    """Stage 1."""
    command = program(
        "train.py",
        f"--config={args.rewriter}",
        f"--config.run_root={folder}",
        "--config.run_name=rewriter",
        "--auto_resume",
        *args.to_rewriter,
    )
    return Part("the rewriter", command, folder / "rewriter" / "rewriter" / REWRITER_FILE)


def rewrite(args: argparse.Namespace, folder: Path, stage: dict[str, Any]) -> Part:
    """The prompts of stage 2. stage: the config of stage 1, as its run has it."""
    out = folder / "prompts.jsonl"
    command = program(
        "rewrite.py",
        f"--rewriter={folder / 'rewriter' / 'rewriter'}",
        f"--prompts={stage['prompts']['train']}",
        f"--out={out}",
        f"--pipeline={stage['pretrained']['model']}",
        f"--max_tokens={stage['prompts']['max_tokens']}",
        f"--keep={args.keep}",
        f"--per_prompt={args.per_prompt}",
        f"--seed={args.seed}",
    )
    return Part("the prompts", command, out)


def image_words(args: argparse.Namespace, folder: Path, stage: dict[str, Any]) -> list[str]:
    """The arguments that stage 2 and the comparison share."""
    return [
        f"--config={args.image}",
        f"--config.pretrained.model={stage['pretrained']['model']}",
        f"--config.prompts.max_tokens={stage['prompts']['max_tokens']}",
        f"--config.run_root={folder}",
        "--config.run_name=image",
        *args.to_image,
    ]


def train_image(args: argparse.Namespace, folder: Path, stage: dict[str, Any]) -> Part:
    """Stage 2, without its own report."""
    command = program(
        "train.py",
        *image_words(args, folder, stage),
        f"--config.prompts.train={folder / 'prompts.jsonl'}",
        "--config.evaluate.after_training=False",
        "--auto_resume",
    )
    return Part("the image model", command, folder / "image" / "lora")


def compare(args: argparse.Namespace, folder: Path, stage: dict[str, Any]) -> Part:
    """The report on base, rewriter, image model and both."""
    image = read_config(folder / "image")
    kind = "lora" if image["train"]["lora"] else "model"
    command = program(
        "evaluate.py",
        *image_words(args, folder, stage),
        f"--rewriter=rewriter={folder / 'rewriter' / 'rewriter'}",
        f"--{kind}=trained={folder / 'image' / 'lora'}",
        *args.to_evaluate,
    )
    return Part("the comparison", command, folder / "image" / "report" / "index.html")


def read_config(run: Path) -> dict[str, Any]:
    """The config of a run."""
    file = run / "config.json"
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); choose another --name") from error


class Done:
    """The parts that are done, in stages.json: {name: command}."""

    def __init__(self, folder: Path):
        self.file = folder / "stages.json"
        self.commands: dict[str, list[str]] = {}
        if self.file.exists():
            try:
                self.commands = dict(json.loads(self.file.read_bytes()))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{self.file} is damaged ({error}); choose another --name"
                ) from error

    def has(self, part: Part) -> bool:
        """Whether a part is done. Raises ValueError if that was with another command."""
        if part.name not in self.commands or not part.result.exists():
            return False
        before = self.commands[part.name][1:]
        now = list(part.command)[1:]
        if before != now:
            changes = [word for word in now if word not in before]
            lost = [word for word in before if word not in now]
            raise ValueError(
                f"{part.name}: done with {' '.join(lost) or 'fewer options'}, but is now asked "
                f"for with {' '.join(changes) or 'fewer options'}; choose another --name"
            )
        return True

    def add(self, part: Part) -> None:
        self.commands[part.name] = list(part.command)
        write_whole(self.file, json.dumps(self.commands, indent=2) + "\n")


def run_part(part: Part, done: Done) -> None:
    """Run a part, unless it is done. Raises ChildProcessError if it fails."""
    if done.has(part):
        print(f"{part.name}: done before")
        return
    print(f"{part.name}: {' '.join(part.command)}")
    if run_child(part.command):
        raise ChildProcessError(f"{part.name} failed (see above); the same command continues there")
    if not part.result.exists():
        raise ChildProcessError(f"{part.name} left no {part.result}; the same command continues")
    done.add(part)


def check_configs(args: argparse.Namespace) -> None:
    """Raise ValueError or FileNotFoundError for a config that is none, or of the other stage."""
    for option, stage in (("rewriter", "rewriter"), ("image", "diffusion")):
        config = load_config(getattr(args, option))
        if config.stage != stage:
            raise ValueError(
                f"--{option} is {getattr(args, option)}, whose config.stage is {config.stage!r}; "
                f"expected {stage!r}"
            )


def main() -> None:
    args = parse_args()
    folder = Path(args.run_root) / args.name
    process.when_stopped(lambda: "stopped; the same command continues")
    try:
        check_configs(args)
        folder.mkdir(parents=True, exist_ok=True)
        done = Done(folder)
        run_part(train_rewriter(args, folder), done)
        stage = read_config(folder / "rewriter")
        for part in (rewrite, train_image, compare):
            run_part(part(args, folder, stage), done)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"report: {folder / 'image' / 'report' / 'index.html'}")


if __name__ == "__main__":
    main()
