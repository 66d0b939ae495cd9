"""Checkpoints of a run: arrays and metadata, written by Orbax in the background.

A checkpoint is a folder named after its epoch:

    state/         the arrays, by Orbax
    meta/          the metadata, meta.json
    rewards/ ...   files that the caller adds
    SHA256SUMS     the digests of all other files, as `sha256sum -c` reads them

Orbax commits the folder by a rename. SHA256SUMS is written last and makes the checkpoint complete;
it is needed because Orbax restores flipped bits without an error.
"""

import contextlib
import glob
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from realgen_jax.files import sha256_file, write_whole
from realgen_jax.hosts import process_index, wait_for_all

FORMAT = 2  # checkpoint format; format 1 stored nested dictionaries and recorded no number
SUMS = "SHA256SUMS"
META = "meta.json"
BARRIER_SECONDS = 300  # how long processes wait for each other while saving


class SaveError(RuntimeError):
    """A checkpoint could not be written. Older ones are not affected."""


class RestoreError(ValueError):
    """A checkpoint does not contain the requested state."""


# -- Checkpoint folders


def _epochs(folder: Path) -> list[int]:
    """Return the epochs of all committed checkpoints, complete or not, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def _digests(checkpoint: Path) -> dict[str, str]:
    """Return {file: SHA-256} of all files of a checkpoint except SHA256SUMS."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.name != SUMS)
    names = [file.relative_to(checkpoint).as_posix() for file in files]
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return dict(zip(names, pool.map(sha256_file, files), strict=True))


def _format_digests(digests: Mapping[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def _parse_digests(text: str) -> dict[str, str]:
    digests = {}
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        digests[name] = digest
    return digests


def seal(checkpoint: Path) -> None:
    """Complete a committed checkpoint by writing the digests of its files."""
    write_whole(checkpoint / SUMS, _format_digests(_digests(checkpoint)))


def find_damage(checkpoint: Path) -> str:
    """Describe which files of a complete checkpoint differ from what was written; "" if none do."""
    current = _digests(checkpoint)
    written = (checkpoint / SUMS).read_bytes()
    if written == _format_digests(current).encode():
        return ""

    expected = _parse_digests(written.decode(errors="replace"))
    problems = []
    for name in sorted(current):
        if expected.get(name) != current[name]:
            problems.append(f"{name} has changed")
    for name in sorted(expected.keys() - current.keys()):
        problems.append(f"{name} is missing")
    return ", ".join(problems) or f"{SUMS} has changed"


def newest_good(folder: Path) -> tuple[int | None, list[str]]:
    """Return the epoch of the newest intact checkpoint (None: no checkpoints), and warnings.

    Unfinished checkpoints are removed; damaged ones are renamed to damaged-EPOCH. Call it only
    while no run writes into `folder`. Raises ValueError if all checkpoints are damaged.
    """
    warnings = []

    # Remove what a kill left unfinished.
    for temporary in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(temporary)
    for epoch in _epochs(folder):
        if not (folder / str(epoch) / SUMS).exists():
            shutil.rmtree(folder / str(epoch))
            warnings.append(f"checkpoint {epoch} is incomplete and was removed")

    # Go back to the newest undamaged checkpoint.
    epochs = _epochs(folder)
    for epoch in reversed(epochs):
        checkpoint = folder / str(epoch)
        damage = find_damage(checkpoint)
        if not damage:
            return epoch, warnings
        aside = folder / f"damaged-{epoch}"
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        warnings.append(f"checkpoint {epoch} is damaged and was moved to {aside}: {damage}")

    if epochs:
        advice = f"no intact checkpoint is left in {folder}; start a new run with another name"
        raise ValueError("\n".join([*warnings, advice]))
    return None, warnings


def read_meta(folder: Path, epoch: int) -> dict[str, Any]:
    """Return a checkpoint's metadata. Raises RestoreError if its format is not FORMAT."""
    meta = json.loads((folder / str(epoch) / "meta" / META).read_text())
    found = meta.pop("format", 1)
    if found != FORMAT:
        raise RestoreError(
            f"checkpoint {epoch} in {folder} has format {found}, and this version reads format "
            f"{FORMAT} only; start a new run with another --config.run_name, or use the version "
            "that wrote it"
        )
    return meta


# -- Arrays


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by their paths, such as "trainable.single.qkv.a"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@contextlib.contextmanager
def _without_patterns(folder: Path) -> Iterator[Path]:
    """Yield a path of `folder` that is no pattern: a link to it, if it has brackets or the like.

    Orbax finds its own files by patterns that start with the folder's path. In "exp[lora]" it finds
    none of them, and writes a checkpoint that cannot be read.
    """
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as parent:
        folder.mkdir(parents=True, exist_ok=True)
        link = Path(parent) / "link"
        link.symlink_to(folder)
        yield link


class Checkpoints:
    """Saves and restores the checkpoints of a run; the newest `keep` are kept.

    With several processes, all must make the same calls, and `folder` must be on a shared file
    system. Process 0 seals new checkpoints and removes old ones.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder.absolute()
        self.keep = keep
        self.begun: int | None = None  # the epoch of the newest save or restore

        handler = ocp.CompositeCheckpointHandler(
            state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler(filename=META)
        )
        self._orbax = ocp.AsyncCheckpointer(
            handler, async_options=ocp.AsyncOptions(timeout_secs=BARRIER_SECONDS)
        )
        self._exit = contextlib.ExitStack()
        self._orbax_folder = self._exit.enter_context(_without_patterns(self.folder))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None  # the save in progress

    def newest(self) -> int | None:
        """Return the epoch of the newest complete checkpoint."""
        return next(self._complete(), None)

    def _complete(self) -> Iterator[int]:
        """Yield the epochs of the complete checkpoints, newest first."""
        for epoch in reversed(_epochs(self.folder)):
            if (self.folder / str(epoch) / SUMS).exists():
                yield epoch

    def save(
        self,
        epoch: int,
        tree: Any,
        meta: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Start a save; return once the arrays have been copied and may be donated.

        Args:
          epoch: the number of finished epochs, which becomes the checkpoint's name.
          tree: a pytree of arrays.
          meta: JSON values.
          files: further files by their names in the checkpoint; each process adds its own.

        Raises SaveError if this save cannot start, or if the previous save failed.
        """
        self.wait()
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_named_leaves(tree)),
            meta=ocp.args.JsonSave({"format": FORMAT, **meta}),
        )
        try:
            self._orbax.save(self._orbax_folder / str(epoch), args=args)
        except Exception as error:
            raise self._clean_up(epoch, error) from error
        self.begun = epoch
        self._pending = self._thread.submit(self._finish, epoch, files or {})

    def _finish(self, epoch: int, files: Mapping[str, bytes]) -> None:
        """Wait for Orbax, add the files, seal, and remove old checkpoints."""
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
                self._remove_old()
        except Exception as error:
            raise self._clean_up(epoch, error) from error

    def _remove_old(self) -> None:
        for epoch in list(self._complete())[self.keep :]:
            # Without SHA256SUMS, a folder left half-removed by a kill counts as incomplete.
            (self.folder / str(epoch) / SUMS).unlink()
            shutil.rmtree(self.folder / str(epoch))

    def _clean_up(self, epoch: int, error: Exception) -> SaveError:
        """Free the disk space of a failed save, and return the error to raise."""
        if process_index() == 0:
            temporary = self.folder.glob(f"{epoch}.orbax-checkpoint-tmp*")
            for part in (self.folder / str(epoch), *temporary):
                if not (part / SUMS).exists():
                    shutil.rmtree(part, ignore_errors=True)
        self.begun = None

        newest = self.newest()
        if newest is None:
            remaining = "there is no older one"
        else:
            remaining = f"the newest one is still that of epoch {newest}"
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else repr(error)
        return SaveError(
            f"checkpoint {epoch} could not be saved in {self.folder}; {remaining}. {reason}"
        )

    def wait(self) -> None:
        """Wait for the save in progress. Raises SaveError, once, if it failed."""
        pending = self._pending
        self._pending = None
        if pending is not None:
            pending.result()

    def raise_if_failed(self) -> None:
        """Raise SaveError, once, if the save in progress has failed already; do not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def read(self, epoch: int, name: str) -> bytes | None:
        """Return one of the `files` saved with a checkpoint, or None if it does not exist."""
        file = self.folder / str(epoch) / name
        return file.read_bytes() if file.exists() else None

    def restore(self, epoch: int, like: Any) -> Any:
        """Return the pytree of a checkpoint, with the structure and the shardings of `like`.

        The mesh may differ from the one it was saved on. Raises RestoreError if the checkpoint's
        arrays do not match `like`.
        """
        named = _named_leaves(like)
        shapes = {name: ocp.utils.to_shape_dtype_struct(leaf) for name, leaf in named.items()}
        args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
        try:
            arrays = self._orbax.restore(self._orbax_folder / str(epoch), args=args)["state"]
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise RestoreError(
                f"checkpoint {epoch} in {self.folder} does not fit the weights and the optimizer "
                f"of this config ({reason}); keep train.lora, train.lora_rank and pretrained.model"
            ) from error
        self.begun = epoch
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in named])

    def close(self) -> None:
        """Wait for the save in progress and release Orbax. Raises SaveError as `wait` does."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()
            self._exit.close()
