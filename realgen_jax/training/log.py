"""The output of a run: metrics.jsonl, TensorBoard, pictures and the terminal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Group
from rich.live import Live
from rich.progress import Progress
from rich.text import Text

from realgen_jax.advantages import zero_spread
from realgen_jax.files import append, read_jsonl, write_image, write_whole
from realgen_jax.training.constant_rewards import CONSTANT_EPOCHS, ConstantRewards
from realgen_jax.training.pictures import break_rows, picture_grid
from realgen_jax.training.progress import plain_console, progress_columns
from realgen_jax.training.tensorboard import Board
from realgen_jax.training.wandb_run import WandbLog


class RunLog:
    """The records in a run's folder, and its progress bar.

    Args:
      folder: the run's folder.
      config: the run's config; written to config.json.
      start: the number of epochs that a resumed run has already finished.
      epochs: the total number of epochs.
      wandb_run: also log to this run of Weights & Biases; None for none.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        start: int,
        epochs: int,
        wandb_run: Any | None = None,
    ):
        self.folder = folder
        self.console = plain_console()
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")

        # Records. A resumed run overwrites those of the epochs that it repeats.
        self._metrics_file = folder / "metrics.jsonl"
        _keep_rows_before(self._metrics_file, start)
        append(self._metrics_file, "")  # it exists from the start
        self._board = Board(folder / "tensorboard", start + 1 if start else None)
        self._wandb = WandbLog(wandb_run, self.warn)

        # The progress bar, with the figures of the last epoch below it. Next to the bar, they would
        # not fit on a narrow terminal.
        self._progress = Progress(*progress_columns(), console=self.console)
        self._task = self._progress.add_task("epoch", total=epochs, completed=start)
        self._epochs = epochs
        self._constant = ConstantRewards(read_jsonl(self._metrics_file))
        self._figures = ""
        self._held_out: dict[str, float] = {}  # scores of the last evaluation
        self._live = Live(
            get_renderable=lambda: Group(self._progress, self._figures), console=self.console
        )

    def __enter__(self) -> "RunLog":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.stop()
        self._board.close()
        self._wandb.close()

    def say(self, text: str | Text) -> None:
        """Print a line."""
        self.console.print(text, soft_wrap=True)

    def warn(self, text: str, title: str = "warning") -> None:
        """Print a line that starts with a title in red."""
        self.say(Text.assemble((title, "bold red"), f" {text}"))

    def metrics(self, kind: str, epoch: int, values: Mapping[str, float]) -> None:
        """Record one row. kind: "train" or "eval"; epoch: the number of finished epochs."""
        row = {"kind": kind, "epoch": epoch}
        for key, value in values.items():
            row[key] = float(f"{value:.8g}")
        append(self._metrics_file, json.dumps(row) + "\n")

        figures = {f"{kind}/{key}": value for key, value in values.items()}
        self._board.scalars(figures, epoch)
        self._wandb.figures(figures, epoch)

    def progress(self, epoch: int, figures: Mapping[str, str]) -> None:
        """Move the progress bar; without a terminal, print a line instead."""
        self._figures = "  ".join(f"{name} {value}" for name, value in figures.items())
        self._progress.update(self._task, completed=epoch)
        if not self.console.is_terminal:
            self.say(f"epoch {epoch}/{self._epochs}  {self._figures}")

    def train(
        self,
        epoch: int,
        scores: Mapping[str, np.ndarray],
        reward: np.ndarray,
        steps: Mapping[str, float],
        seconds: Mapping[str, float],
        pictures: int,
        details: Mapping[str, float],
    ) -> None:
        """Record a training epoch and show its main figures.

        Args:
          epoch: the number of finished epochs.
          scores: each trained reward's scores, [groups, size].
          reward: their weighted mean, [groups, size].
          steps: the columns about its optimizer steps, as `step_columns` returns them.
          seconds: the time of each phase; they add up to the epoch's time.
          pictures: the number of the epoch's pictures.
          details: further columns, such as "seconds/scoring/NAME" and "learning/NAME/KEY".
        """
        row = {**score_columns(scores, reward), **steps, **details}
        row |= {f"seconds/{phase}": value for phase, value in seconds.items()}
        row |= {f"memory/{place}": size for place, size in memory().items()}
        row["reward_wait_share"] = seconds["reward_wait"] / sum(seconds.values())
        row["images_per_second"] = pictures / sum(seconds.values())
        self.metrics("train", epoch, row)
        for name in self._constant.add(row):
            self._warn_of_constant(name, scores[name])

        figures = {"reward": f"{row['reward']:.3f}"}
        if len(scores) > 1:
            for name in scores:
                figures[short_name(name)] = f"{row[f'reward/{name}']:.3f}"
        for key, value in details.items():
            if key.startswith("learning/") and "accuracy" in key:
                figures[short_name(key.removeprefix("learning/"))] = f"{value:.2f}"
        if "first_ratio_deviation" in row:
            figures["|ratio-1|"] = f"{row['first_ratio_deviation']:.0e}"
        figures["img/s"] = f"{row['images_per_second']:.1f}"
        if self._held_out:
            held_out = [f"{short_name(name)} {score:.3f}" for name, score in self._held_out.items()]
            figures["| last evaluation:"] = ", ".join(held_out)
        self.progress(epoch, figures)

    def _warn_of_constant(self, name: str, scores: np.ndarray) -> None:
        """Warn of a reward whose scores do not differ within a group."""
        self.warn(
            f"the reward {name} cannot tell the pictures of a prompt apart: for {CONSTANT_EPOCHS} "
            f"epochs each of them got the same score (now {scores.min():.4g} to "
            f"{scores.max():.4g}), so nothing is learned from it; check its options and its weights"
        )

    def evaluation(
        self,
        epoch: int,
        start: Mapping[str, float],
        now: Mapping[str, float],
        trained: Sequence[str],
        correlation: Mapping[str, float],
    ) -> None:
        """Print the figures of an evaluation.

        Args:
          epoch: the number of finished epochs.
          start: the figures of the run's first evaluation; `now` itself if this is the first.
          now: the figures of this evaluation.
          trained: the names of the figures that are trained on; the others are checks.
          correlation: of each held-out reward with the trained one, over pictures.
        """
        # The progress bar repeats the held-out rewards until the next evaluation.
        self._held_out = {name: now[name] for name in correlation}

        def describe(name: str) -> str:
            text = f"{short_name(name)} "
            if now is not start and name in start:
                text += f"{start[name]:.3f} -> "
            text += f"{now[name]:.3f}"
            if name in correlation:
                text += f" (r {correlation[name]:+.2f})"
            return text

        checks = [name for name in now if name not in trained]
        self.say(Text(f"evaluation, epoch {epoch}", "bold"))
        self.say(f"  {'trained on':<12}{'   '.join(map(describe, trained))}")
        self.say(f"  {'checks':<12}{'   '.join(map(describe, checks))}")
        if correlation and now is start:
            self.say("  r: correlation with the reward over pictures")

    def pictures(
        self,
        name: str,
        epoch: int,
        rows: Sequence[np.ndarray],
        captions: Sequence[Sequence[str]],
        columns: int = 8,
    ) -> Path:
        """Save a picture grid as `samples/<name>.png` and return the file.

        Args:
          name: the file's name without suffix.
          epoch: the number of finished epochs.
          rows: uint8 [n, 3, h, w] each; the i-th pictures of all rows are aligned in a column.
          captions: n captions for each row.
          columns: rows break after this many pictures.
        """
        grid = picture_grid(*break_rows(rows, captions, columns))
        file = self.folder / "samples" / f"{name}.png"
        write_image(file, grid)
        self._board.picture(name, np.asarray(grid), epoch)
        self._wandb.picture(name, grid, epoch)
        return file


class NoLog:
    """A no-op RunLog, for all processes except the first."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *error: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def score_columns(scores: Mapping[str, np.ndarray], reward: np.ndarray) -> dict[str, float]:
    """Return the columns for an epoch's scores [groups, size] and their weighted mean `reward`.

    A group without spread has equal scores up to rounding and contributes no advantage.
    """
    means = {}
    spreads = {}
    without_spread = {}
    for name, values in scores.items():
        means[name] = values.mean()
        spreads[name] = values.std(axis=1).mean()
        without_spread[name] = zero_spread(values.astype(np.float64))

    columns = {f"reward/{name}": mean for name, mean in means.items()}
    columns |= {f"reward_std/{name}": spread for name, spread in spreads.items()}
    columns |= {f"zero_spread/{name}": flat.mean() for name, flat in without_spread.items()}
    columns["reward"] = reward.mean()
    columns["reward_std"] = reward.std(axis=1).mean()

    # Groups that no reward can tell apart
    columns["zero_spread"] = np.logical_and.reduce(list(without_spread.values())).mean()
    if min(spreads.values()) > 0:
        columns["std_ratio"] = max(spreads.values()) / min(spreads.values())
    return columns


def step_columns(
    steps: Sequence[Mapping[str, Any]], largest: Sequence[str] = ()
) -> dict[str, float]:
    """Return the columns for an epoch's optimizer steps.

    steps: the metrics of each step; empty if the generator was not trained. They are averaged,
    except that names in `largest` take the largest value. Those also get a separate column with the
    first step's value, which is computed before any weight has moved.
    """
    columns = {"steps": len(steps)}
    if not steps:
        return columns

    for name in steps[0]:
        values = [float(step[name]) for step in steps]
        columns[name] = max(values) if name in largest else np.mean(values)
        if name in largest:
            columns[f"first_{name}"] = values[0]
    return columns


def memory() -> dict[str, int]:
    """Return the bytes currently in use: host memory of this process, and its first device.

    Host memory is known on Linux only. For a device without memory statistics (the CPU), the value
    is the size of all live arrays.
    """
    used = {}
    status = Path("/proc/self/status")
    if status.exists():
        kibibytes = status.read_text().split("VmRSS:")[1].split()[0]
        used["host"] = 1024 * int(kibibytes)

    device = jax.local_devices()[0]
    statistics = device.memory_stats()
    if statistics:
        used["device"] = statistics["bytes_in_use"]
        return used

    used["device"] = 0
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            if shard.device == device:
                used["device"] += shard.data.nbytes
    return used


def short_name(name: str) -> str:
    """Return a reward's name as the terminal and reports show it."""
    return name.removeprefix("embedded_").replace("_", " ")


def _keep_rows_before(file: Path, epoch: int) -> None:
    """Remove the rows of metrics.jsonl that a run resumed at `epoch` will write again."""
    if not file.exists():
        return
    kept = []
    for row in read_jsonl(file):
        # A resumed run starts by repeating the evaluation of `epoch`, but not its training.
        trained = row["kind"] == "train" and row["epoch"] == epoch
        if row["epoch"] < epoch or trained:
            kept.append(json.dumps(row) + "\n")
    write_whole(file, "".join(kept))
