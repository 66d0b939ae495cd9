"""When a run saves, what a checkpoint contains besides arrays, and how failed saves are handled."""

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import grain
import jax
import numpy as np

from realgen_jax.checkpoint import SaveError, read_meta
from realgen_jax.training import learning
from realgen_jax.training.log import NoLog, RunLog
from realgen_jax.training.preemption import Preemption
from realgen_jax.training.run import Run
from realgen_jax.update import TrainState


@dataclass(frozen=True)
class Snapshot:
    """The contents of a checkpoint: the state after `epoch` epochs, and JSON metadata."""

    epoch: int
    state: TrainState
    meta: dict[str, Any]


class Saver:
    """Saves and restores one run. `history` is the state kept between evaluations."""

    def __init__(self, run: Run, data: grain.DatasetIterator, log: RunLog | NoLog):
        self.run = run
        self.data = data
        self.log = log
        self.history: dict[str, Any] = {}

    def restore(self, epoch: int, state: TrainState) -> TrainState:
        """Return a checkpoint's state; also restore prompt order, history and rewards."""
        run = self.run
        restored = run.checkpoints.restore(epoch, state)
        meta = read_meta(run.checkpoints.folder, epoch)
        self.history = meta["history"]
        self.data.set_state(meta["data"])

        # Keep the batch sizes that fit into memory: other batch sizes round scores differently.
        current = run.scorer.batch_sizes
        for name, size in meta["batch_sizes"].items():
            limits = [limit for limit in (size, current[name]) if limit]
            current[name] = min(limits, default=0)
        learning.restore(run.learning, run.checkpoints, epoch, self.log.warn)
        return restored

    def snapshot(self, epoch: int, state: TrainState) -> Snapshot:
        """Snapshot the run as it is now. The config contains the seed, the root of all keys."""
        meta = {
            "data": self.data.get_state(),
            "history": copy.deepcopy(self.history),
            "config": self.run.config.to_dict(),
            "digests": dict(self.run.digests),
            "batch_sizes": dict(self.run.scorer.batch_sizes),
        }
        return Snapshot(epoch, state, meta)

    def save_if_due(self, epoch: int, state: TrainState) -> None:
        """Save every `save_freq` epochs and at the end, and report a failure of an earlier save."""
        config = self.run.config
        if epoch % config.save_freq == 0 or epoch == config.num_epochs:
            self.save(self.snapshot(epoch, state))
        self.tolerate(self.run.checkpoints.raise_if_failed)

    def save(self, snapshot: Snapshot) -> None:
        """Start writing a checkpoint, once the previous one has been written."""
        checkpoints = self.run.checkpoints
        files = learning.files(self.run.learning)
        self.tolerate(checkpoints.wait)
        self.tolerate(
            lambda: checkpoints.save(snapshot.epoch, snapshot.state, snapshot.meta, files)
        )

    def leave(self, snapshot: Snapshot, preemption: Preemption) -> None:
        """Save the state from the start of this epoch, unless already saved, and say so."""
        preemption.reached()
        if self.run.checkpoints.begun != snapshot.epoch:
            self.save(snapshot)
        self.run.checkpoints.wait()
        self.log.say(
            f"stopped by {preemption.name}, saved after {snapshot.epoch} epochs; {self._go_on()}"
        )

    def lost(self) -> str:
        """Return what to tell about a run that ends now, without another save."""
        newest = self.run.checkpoints.newest()
        if newest is None:
            return "stopped; nothing was saved, so that all that was trained is lost"
        return f"stopped; what was trained after epoch {newest} is lost; {self._go_on()}"

    def _go_on(self) -> str:
        return f"to go on: --config.run_name={self.run.folder.name} --resume"

    def wait(self) -> None:
        """Wait for the save in progress."""
        self.tolerate(self.run.checkpoints.wait)

    @partial(jax.profiler.annotate_function, name="checkpoint")
    def tolerate(self, action: Callable[[], None]) -> None:
        """Run `action`; on a failed save, stop or warn as `config.save_failure` says."""
        try:
            action()
        except SaveError as error:
            if self.run.config.save_failure == "stop":
                raise
            self.log.warn(f"{error}; the run goes on (config.save_failure)")


def stop_if_not_finite(values: Mapping[str, float], epoch: int, phase: str, run: Run) -> None:
    """Raise FloatingPointError if a value is not finite, naming epoch, phase and values."""
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if not bad:
        return
    with contextlib.suppress(SaveError):
        run.checkpoints.wait()
    newest = run.checkpoints.newest()
    resume = "there is no checkpoint yet"
    if newest:
        resume = f"--resume goes on from the newest good checkpoint, epoch {newest}"
    raise FloatingPointError(
        f"epoch {epoch}, {phase}: {', '.join(bad)} not finite; {resume} "
        f"({run.checkpoints.folder}). If it happens again, lower "
        "config.train.learning_rate or config.sample.noise_level"
    )
