"""What a resumed run needs, written by Orbax in the background: the training state and the run's metadata.

A checkpoint is a folder named after its epoch. Orbax commits it by a rename; SHA256SUMS, the digests of all its files
(`sha256sum -c` reads them too), is added last and makes it complete, since Orbax restores flipped bits without a word.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from realgen_jax.hosts import process_index, wait_for_all
from realgen_jax.objectives.grpo import TrainState

SUMS, META = "SHA256SUMS", "meta.json"
BARRIER_SECONDS = 300  # that hosts wait for one another while saving


class SaveError(RuntimeError):
    """A checkpoint could not be written. The older ones are as they were."""


class RestoreError(ValueError):
    """A checkpoint holds other arrays than asked for."""


def _epochs(folder: Path) -> list[int]:
    """Epochs of the committed checkpoints, complete or not, oldest first."""
    return (
        sorted(int(f.name) for f in folder.iterdir() if f.name.isdigit()) if folder.is_dir() else []
    )


def _sums(checkpoint: Path) -> dict[str, str]:
    """{file: SHA-256} of everything in a checkpoint but SHA256SUMS."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.name != SUMS)

    def digest(file: Path) -> str:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:  # hashing runs beside Python
        return dict(
            zip(
                (f.relative_to(checkpoint).as_posix() for f in files),
                pool.map(digest, files),
                strict=True,
            )
        )


def _text(sums: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def seal(checkpoint: Path) -> None:
    """Write the digests of a committed checkpoint, which is complete from then on."""
    part = checkpoint / (SUMS + ".part")
    part.unlink(missing_ok=True)
    text = _text(_sums(checkpoint))
    part.write_text(text)
    part.rename(checkpoint / SUMS)


def damage(checkpoint: Path) -> str:
    """What is wrong with a sealed checkpoint, by file; empty where it is as it was written."""
    now, written = _sums(checkpoint), (checkpoint / SUMS).read_bytes()
    if written == _text(now).encode():
        return ""
    before = {}
    for line in written.decode(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        before[name] = digest
    lost, changed = (
        sorted(before.keys() - now.keys()),
        sorted(n for n in now if before.get(n) != now[n]),
    )
    return ", ".join(
        [f"{name} has changed" for name in changed] + [f"{name} is missing" for name in lost]
        or [SUMS]
    )


def newest_good(folder: Path) -> tuple[int | None, list[str]]:
    """The epoch of the newest checkpoint whose files are all as they were written, and what was found on the way.

    Call while no run writes into `folder`. What a kill cut off is removed; a damaged checkpoint is moved aside, to
    damaged-EPOCH. Raises ValueError where there are checkpoints and all of them are damaged.
    """
    found, bad = [], False
    for part in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(part)
    for epoch in _epochs(folder):
        if not (folder / str(epoch) / SUMS).exists():
            shutil.rmtree(folder / str(epoch))
            found.append(f"checkpoint {epoch} was not finished; it is not used")
    for epoch in reversed(_epochs(folder)):
        checkpoint = folder / str(epoch)
        if wrong := damage(checkpoint):
            bad, aside = True, folder / f"damaged-{epoch}"
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            found.append(f"checkpoint {epoch} is damaged and was moved to {aside}: {wrong}")
        else:
            return epoch, found
    if bad:
        raise ValueError(
            "\n".join(
                [*found, f"no good checkpoint is left in {folder}; start again with another name"]
            )
        )
    return None, found


def read_meta(folder: Path, epoch: int) -> dict[str, Any]:
    """A checkpoint's metadata."""
    return json.loads((folder / str(epoch) / "meta" / META).read_text())


def _tree(state: TrainState) -> dict[str, Any]:
    pure = {"trainable": nnx.to_pure_dict(state.trainable), "ema": nnx.to_pure_dict(state.ema)}
    return {**pure, "opt_state": state.opt_state, "step": state.step}


class Checkpoints:
    """Saves and restores one run's checkpoints, of which the newest `keep` stay. On several hosts every process takes
    part and `folder` must be on a file system that all of them see; process 0 seals and removes.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder.absolute(), keep
        handler = ocp.CompositeCheckpointHandler(
            state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler(filename=META)
        )
        self._orbax = ocp.AsyncCheckpointer(
            handler, async_options=ocp.AsyncOptions(timeout_secs=BARRIER_SECONDS)
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self.begun: int | None = None  # the epoch of the newest save or restore

    def newest(self) -> int | None:
        """The epoch of the newest complete checkpoint."""
        return next(self._complete(), None)

    def _complete(self) -> Iterator[int]:
        return (
            epoch
            for epoch in reversed(_epochs(self.folder))
            if (self.folder / str(epoch) / SUMS).exists()
        )

    def save(
        self,
        epoch: int,
        state: TrainState,
        meta: dict[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Save after `epoch` epochs; meta is JSON, files (by their names in the checkpoint) are this process's own.
        Returns once the arrays are copied, the rest is done beside.

        Raises SaveError where this save could not begin, or the one before it failed.
        """
        self.wait()
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_tree(state)), meta=ocp.args.JsonSave(meta)
        )
        try:
            self._orbax.save(self.folder / str(epoch), args=args)
        except Exception as error:
            raise self._failed(epoch, error) from error
        self._pending, self.begun = self._thread.submit(self._finish, epoch, files or {}), epoch

    def _finish(self, epoch: int, files: Mapping[str, bytes]) -> None:
        try:
            self._orbax.wait_until_finished()
            for name, content in files.items():
                file = self.folder / str(epoch) / name
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(content)
            if files:
                wait_for_all(f"files of checkpoint {epoch}", BARRIER_SECONDS)
            if process_index() == 0:
                seal(self.folder / str(epoch))
                for old in list(self._complete())[self.keep :]:
                    # first what makes it complete: a kill in between leaves what is known to be unfinished
                    (self.folder / str(old) / SUMS).unlink()
                    shutil.rmtree(self.folder / str(old))
        except Exception as error:
            raise self._failed(epoch, error) from error

    def _failed(self, epoch: int, error: Exception) -> SaveError:
        """Free what the failed save has taken, and say what happened."""
        if process_index() == 0:
            for part in (
                self.folder / str(epoch),
                *self.folder.glob(f"{epoch}.orbax-checkpoint-tmp*"),
            ):
                if not (part / SUMS).exists():
                    shutil.rmtree(part, ignore_errors=True)
        self.begun, newest = None, self.newest()
        kept = (
            "there is no older one"
            if newest is None
            else f"the newest is still that of epoch {newest}"
        )
        lines = str(error).strip().splitlines()
        return SaveError(
            f"checkpoint {epoch} could not be saved in {self.folder}; {kept}. {lines[0] if lines else error!r}"
        )

    def wait(self) -> None:
        """Wait for the save that is being written. Raises SaveError, once, where it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def raise_if_failed(self) -> None:
        """As `wait`, without waiting."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def read(self, epoch: int, name: str) -> bytes | None:
        """One of the files saved with a checkpoint; None where it has none of this name."""
        file = self.folder / str(epoch) / name
        return file.read_bytes() if file.exists() else None

    def restore(self, epoch: int, like: TrainState) -> TrainState:
        """The state saved after `epoch` epochs, its arrays placed as those of `like` are, on whatever mesh.

        Raises RestoreError where the checkpoint holds other arrays.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(like))
        try:
            found = self._orbax.restore(
                self.folder / str(epoch),
                args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)),
            )
        except ValueError as error:
            raise RestoreError(
                f"checkpoint {epoch} in {self.folder} does not fit this config's weights and optimizer "
                f"({str(error).strip().splitlines()[0]}); train.lora, train.lora_rank and pretrained.model must stay"
            ) from error
        tree = found["state"]
        trainable, ema = (
            jax.tree.map(lambda a: a, like.trainable),
            jax.tree.map(lambda a: a, like.ema),
        )
        nnx.replace_by_pure_dict(trainable, tree["trainable"])
        nnx.replace_by_pure_dict(ema, tree["ema"])
        self.begun = epoch
        return TrainState(trainable, ema, tree["opt_state"], tree["step"])

    def close(self) -> None:
        """Wait for the last save, whose failure has been told by then or is raised here."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()
