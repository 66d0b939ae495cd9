"""What a run leaves and shows: config.json, metrics.jsonl, TensorBoard events, picture grids, and the terminal."""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from realgen_jax.objectives.grpo import zero_spread

TILE = 192  # a picture's side in a grid, at least
# What a resumed run may change: where and how long it runs, not what it computes, but for the rounding of another mesh
# or a moved reward.
FREE_KEYS = (
    "run_name", "run_root", "num_epochs", "save_freq", "eval_freq", "num_checkpoint_limit", "save_failure",
    "preemption_grace", "wandb_project", "profile.*", "compilation_cache", "mesh.*", "prompts.cache", "prompts.device",
    "reward.deadline", "reward.retries", "reward.stop_*",
    "reward.batch_size", "reward.device", "reward.devices.*", "reward.share_gpu", "reward.options.*.servers",
    "reward.options.*.deadline", "reward.options.*.attempts", "reward.options.*.token_env",
    "reward.adversarial.*.deadline", "evaluate.*",
)  # fmt: skip


def run_folder(root: str, name: str, preset: str, resume: bool) -> Path:
    """root/<name>, by default preset, date and time; to resume, by default the preset's latest run.

    A fresh run refuses a folder that holds one, a resumed run needs it.
    """
    if resume and not name:
        runs = [file.parent for file in Path(root).glob(f"{preset}-*/config.json")]
        if not runs:
            raise FileNotFoundError(
                f"{root}/ holds no run of preset {preset!r} to resume; name it: --config.run_name="
            )
        return max(runs, key=lambda folder: folder.stat().st_mtime)
    folder = Path(root) / (name or f"{preset}-{datetime.now():%Y%m%d-%H%M%S}")
    if resume and not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} is no run that could be resumed: it has no config.json")
    if not resume and (folder / "config.json").exists():
        raise FileExistsError(
            f"{folder} exists; go on with that run with --resume, or choose another --config.run_name"
        )
    return folder


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """A line for each key in which two configs (as JSON) differ: those a resumed run may change, and the others."""
    before, now = _flat(before), _flat(json.loads(json.dumps(now)))
    free, others = [], []
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            lines = free if any(fnmatchcase(key, pattern) for pattern in FREE_KEYS) else others
            lines.append(f"  config.{key}: {before.get(key)!r} then, {now.get(key)!r} now")
    return free, others


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder, creating it; raises FileExistsError where another process does. The lock ends with the
    process, however that ends. A folder in which nothing came about is removed again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(
                f"{folder} is in use: a run of this name is going on; wait for its end, or choose another "
                "--config.run_name"
            ) from error
        try:
            yield
        finally:
            if [entry.name for entry in folder.iterdir()] == ["lock"]:
                (folder / "lock").unlink()
                folder.rmdir()


def write_whole(file: Path, text: str) -> None:
    """Write a text file so that whoever opens it, after a kill too, finds the old text or the new one."""
    part = file.with_name(file.name + ".part")
    part.write_text(text)
    part.replace(file)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


class RunLog:
    """The files of one run folder and its progress bar. Rows of metrics.jsonl carry "epoch" and a "kind"."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], start: int, epochs: int, wandb_project: str
    ):
        self.folder, self.console = folder, Console(highlight=False)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")
        self._file = _rows_before(folder / "metrics.jsonl", start).open("a")
        self._board = SummaryWriter(
            str(folder / "tensorboard"), purge_step=start + 1 if start else None
        )
        self._held_out: dict[str, float] = {}
        self._wandb = None
        if wandb_project:
            import wandb

            self._wandb = wandb.init(
                project=wandb_project,
                name=folder.name,
                id=folder.name,
                config=dict(config),
                resume="allow",
            )
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, TextColumn("left"), console=self.console)
        self._task = self._progress.add_task("epoch", total=epochs, completed=start)
        self._figures = ""  # of the last epoch, under the bar: beside it they would squeeze it off a narrow terminal
        self._live = Live(
            get_renderable=lambda: Group(self._progress, self._figures), console=self.console
        )

    def __enter__(self) -> "RunLog":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.stop()
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def metrics(self, kind: str, epoch: int, values: Mapping[str, float]) -> None:
        """One row: kind is "train" or "eval", epoch counts finished epochs."""
        row = {"kind": kind, "epoch": epoch, **{k: float(f"{v:.8g}") for k, v in values.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for key, value in values.items():
            self._board.add_scalar(f"{kind}/{key}", value, epoch)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{key}": value for key, value in values.items()}, step=epoch)

    def progress(self, epoch: int, figures: Mapping[str, str]) -> None:
        """Move the bar; where there is no terminal, a line instead."""
        self._figures = "  ".join(f"{name} {value}" for name, value in figures.items())
        self._progress.update(self._task, completed=epoch)
        if not self.console.is_terminal:
            self.console.print(
                f"epoch {epoch}/{int(self._progress.tasks[0].total)}  {self._figures}",
                soft_wrap=True,
            )

    def train(
        self,
        epoch: int,
        scores: Mapping[str, np.ndarray],
        reward: np.ndarray,
        steps: Sequence[Mapping],
        seconds: Mapping[str, float],
        scoring: Mapping[str, float],
        learnt: Mapping[str, float],
    ) -> None:
        """An epoch's row. scores [groups, size] by reward, their weighted mean `reward`, each optimizer step's metrics,
        seconds by phase, which add up to the epoch, the seconds that each reward was at work meanwhile, and what those
        that learn have found. There are no steps where the generator rests for them.
        """
        flat = {name: zero_spread(r.astype(np.float64)) for name, r in scores.items()}
        std = {name: r.std(axis=1).mean() for name, r in scores.items()}
        row = {f"reward/{name}": r.mean() for name, r in scores.items()}
        row |= {f"reward_std/{name}": value for name, value in std.items()}
        row |= {f"zero_spread/{name}": groups.mean() for name, groups in flat.items()}
        row |= {
            "reward": reward.mean(),
            "reward_std": reward.std(axis=1).mean(),
            "steps": len(steps),
        }
        row["zero_spread"] = np.logical_and.reduce(
            list(flat.values())
        ).mean()  # groups that teach nothing
        if min(std.values()) > 0:
            row["std_ratio"] = max(std.values()) / min(std.values())
        for name in steps[0] if steps else ():
            values = [float(step[name]) for step in steps]
            row[name] = max(values) if name == "ratio_deviation" else np.mean(values)
        if steps:  # before any weight moved: rounding alone
            row["first_ratio_deviation"] = float(steps[0]["ratio_deviation"])
        row |= learnt
        row |= {f"seconds/{name}": s for name, s in {**seconds, **scoring}.items()}
        row |= {f"memory/{where}": used for where, used in memory().items()}
        row["reward_wait_share"] = seconds["reward_wait"] / sum(seconds.values())
        row["images_per_second"] = reward.size / sum(seconds.values())
        self.metrics("train", epoch, row)
        figures = {"reward": f"{row['reward']:.3f}"}
        figures |= {
            short_name(name): f"{row[f'reward/{name}']:.3f}" for name in scores if len(scores) > 1
        }
        figures |= {
            short_name(key.removeprefix("learning/")): f"{learnt[key]:.2f}"
            for key in learnt
            if "accuracy" in key
        }
        figures |= {"|ratio-1|": f"{row['first_ratio_deviation']:.0e}"} if steps else {}
        figures["img/s"] = f"{row['images_per_second']:.1f}"
        if self._held_out:
            shown = ", ".join(
                f"{short_name(name)} {value:.3f}" for name, value in self._held_out.items()
            )
            figures |= {"| last evaluation:": shown}
        self.progress(epoch, figures)

    def evaluation(
        self,
        epoch: int,
        start: Mapping[str, float],
        now: Mapping[str, float],
        trained: Sequence[str],
        correlation: Mapping[str, float],
        drift: Sequence[str],
    ) -> None:
        """An evaluation's figures beside those of the start: what is trained on, then the checks, and a warning where
        `drift` names any of these. `correlation` is that of held-out rewards, which the progress bar repeats, with the
        reward, picture by picture.
        """
        self._held_out = {name: now[name] for name in correlation}
        self.say(f"[bold]evaluation, epoch {epoch}[/bold]")
        for label, names in (
            ("trained on", trained),
            ("checks", [name for name in now if name not in trained]),
        ):
            before = ["" if now is start else f"{start[name]:.3f} -> " for name in names]
            after = [
                f" (r {correlation[name]:+.2f})" if name in correlation else "" for name in names
            ]
            shown = (
                f"{short_name(n)} {old}{now[n]:.3f}{r}"
                for n, old, r in zip(names, before, after, strict=True)
            )
            self.say(f"  {label:<12}{'   '.join(shown)}")
        if correlation and now is start:
            self.say("  r: correlation with the reward, picture by picture")
        if drift:
            self.say(
                f"[bold red]warning[/bold red] the reward rises while this gets worse: {', '.join(drift)}"
            )

    def pictures(
        self,
        name: str,
        epoch: int,
        rows: Sequence[np.ndarray],
        captions: Sequence[Sequence[str]],
        columns: int = 8,
    ) -> Path:
        """Save `samples/<name>.png`. rows: arrays uint8 [n, 3, h, w] that stand under one another, picture by picture;
        captions: one text a picture for each of them. Lines break after `columns` pictures.
        """
        lines, texts = [], []
        for first in range(0, len(rows[0]), columns):
            lines += [row[first : first + columns] for row in rows]
            texts += [caption[first : first + columns] for caption in captions]
        grid = picture_grid(lines, texts)
        file = self.folder / "samples" / f"{name}.png"
        grid.save(file)
        self._board.add_image(name, np.asarray(grid), epoch, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(grid)}, step=epoch)
        return file


class NoLog:
    """In place of a RunLog in every process but the first: says, draws and writes nothing."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *error: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def memory() -> dict[str, int]:
    """Bytes in use now: of the host by this process (where /proc tells) and of its first device by live arrays."""
    used, status, device = {}, Path("/proc/self/status"), jax.local_devices()[0]
    if status.exists():
        used["host"] = 1024 * int(status.read_text().split("VmRSS:")[1].split()[0])
    statistics = device.memory_stats()  # None on a CPU
    arrays = (
        shard
        for array in jax.live_arrays()
        for shard in array.addressable_shards
        if shard.device == device
    )
    used["device"] = (
        statistics["bytes_in_use"] if statistics else sum(shard.data.nbytes for shard in arrays)
    )
    return used


def short_name(name: str) -> str:
    return name.removeprefix("embedded_").replace("_", " ")


def _rows_before(file: Path, epoch: int) -> Path:
    """Drop the rows that a resumed run will write again, and a line cut off by a kill."""
    if file.exists():
        kept = []
        for line in file.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if row["epoch"] < epoch or (row["kind"] == "train" and row["epoch"] == epoch):
                kept.append(line + "\n")
        write_whole(file, "".join(kept))
    return file


def picture_grid(rows: Sequence[np.ndarray], captions: Sequence[Sequence[str]]) -> Image.Image:
    """Pictures in rows, upsized to a readable side, each over its caption; long lines wrap."""
    height, width = rows[0].shape[2:]
    scale = max(1, -(-TILE // min(height, width)))
    tile_w, tile_h = width * scale, height * scale
    font = ImageFont.load_default(size=13)
    per_line = max(8, int(tile_w / font.getlength("n")))
    wrapped = [[_wrap(text, per_line) for text in line] for line in captions]
    heights = [tile_h + 17 * max((len(lines) for lines in row), default=0) + 16 for row in wrapped]
    columns = max(len(row) for row in rows)
    grid = Image.new("RGB", (columns * (tile_w + 8) + 8, sum(heights) + 8), "white")
    draw = ImageDraw.Draw(grid)
    for r, (pictures, texts) in enumerate(zip(rows, wrapped, strict=True)):
        for c, (pixels, lines) in enumerate(zip(pictures, texts, strict=True)):
            x, y = 8 + c * (tile_w + 8), 8 + sum(heights[:r])
            tile = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            grid.paste(tile.resize((tile_w, tile_h), Image.Resampling.BICUBIC), (x, y))
            for i, line in enumerate(lines):
                draw.text((x, y + tile_h + 4 + 17 * i), line, fill="black", font=font)
    return grid


def _wrap(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and len(line) + 1 + len(word) > width:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        lines.append(line)
    return lines[:8]
