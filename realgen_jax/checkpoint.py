"""What a resumed run needs, kept by Orbax: the training state, the data's position and the run's metadata."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from realgen_jax.grpo import TrainState


def _tree(state: TrainState) -> dict[str, Any]:
    pure = {"trainable": nnx.to_pure_dict(state.trainable), "ema": nnx.to_pure_dict(state.ema)}
    return {**pure, "opt_state": state.opt_state, "step": state.step}


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them. Writing happens in the background."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def newest(self) -> int | None:
        """The epoch of the newest complete checkpoint; waits for one that is being written."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def save(self, epoch: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Save after `epoch` epochs; meta is JSON. Returns once the arrays are copied."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(_tree(state)), meta=ocp.args.JsonSave(meta))
        self._manager.save(epoch, args=args)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, its arrays placed as those of `like` are, and its metadata."""
        epoch = self.newest()
        if epoch is None:
            raise FileNotFoundError(f"{self.folder} holds no complete checkpoint; start without --resume")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(like))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
        found = self._manager.restore(epoch, args=args)
        tree = found["state"]
        trainable, ema = jax.tree.map(lambda a: a, like.trainable), jax.tree.map(lambda a: a, like.ema)
        nnx.replace_by_pure_dict(trainable, tree["trainable"])
        nnx.replace_by_pure_dict(ema, tree["ema"])
        return TrainState(trainable, ema, tree["opt_state"], tree["step"]), found["meta"]

    def close(self) -> None:
        """Wait for the last save."""
        self._manager.wait_until_finished()
        self._manager.close()
