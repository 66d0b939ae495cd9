"""The cache of text embeddings on disk.

The text encoders are PyTorch models. They run once, in a separate process, before training starts;
the trainer only reads the resulting folder:

    prompts.json     the prompts, in row order
    NAME.zarr        an array with one row per prompt; the names depend on the model
    progress.json    the number of complete rows, and the names of the arrays
    cut.json         the rows of the prompts that are longer than max_tokens
"""

import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from filelock import FileLock

from realgen_jax.files import file_lock, sampled_digest, write_whole
from realgen_jax.models.family import Encoder
from realgen_jax.process import run_child


def encoders_to_json(encoders: Sequence[Encoder]) -> str:
    """Serialise encoders to one command-line argument."""
    return json.dumps([asdict(encoder) for encoder in encoders])


def encoders_from_json(text: str) -> list[Encoder]:
    """Parse the output of `encoders_to_json`."""
    return [Encoder(**fields) for fields in json.loads(text)]


def cache_folder(
    root: str | Path,
    model: str | Path,
    prompts: Sequence[str],
    encoders: Sequence[Encoder],
    **settings: Any,
) -> Path:
    """Return the cache folder of these prompts, named by a fingerprint of everything that matters.

    Args:
      root: the folder of all caches.
      model: a diffusers pipeline folder.
      prompts: the prompts, in row order.
      encoders: the text encoders, whose files are part of the fingerprint.
      **settings: other JSON values that affect the embeddings, such as max_tokens and dtype.

    Raises FileNotFoundError if the model lacks one of the subfolders.
    """
    fingerprint = [list(prompts), encoders_to_json(encoders), settings]
    digest = hashlib.sha256(json.dumps(fingerprint).encode())

    subfolders = {folder for encoder in encoders for folder in (encoder.tokenizer, encoder.model)}
    for name in sorted(subfolders):
        subfolder = Path(model) / name
        if not subfolder.is_dir():
            raise FileNotFoundError(
                f"{subfolder} is missing; expected a pipeline folder of diffusers with {name}/"
            )
        for file in sorted(subfolder.iterdir()):
            if file.is_file():
                digest.update(sampled_digest(file))
    return Path(root).expanduser() / digest.hexdigest()[:20]


class TextCache:
    """Named arrays with one row for each prompt of a list.

    Rows are written in order and only once, so an interrupted encoding continues where it stopped.
    """

    def __init__(self, folder: Path, prompts: Sequence[str]):
        self.folder = folder
        self.prompts = list(prompts)
        self._row = {prompt: row for row, prompt in enumerate(self.prompts)}
        self._arrays: dict[str, ts.TensorStore] = {}

    @property
    def rows_done(self) -> int:
        """The number of complete rows."""
        return self._progress()["rows"]

    @property
    def complete(self) -> bool:
        return self.rows_done == len(self.prompts)

    def lock(self) -> FileLock:
        """Return a context manager for the one process that may write; others wait."""
        return file_lock(self.folder / "lock")

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the next n rows of every array, {name: [n, ...]}.

        The rows count as complete once all arrays are on disk. Hold `lock` if other processes may
        write too.
        """
        start = self.rows_done
        stop = start
        for name, rows in arrays.items():
            stop = start + len(rows)
            self._create(name, rows)[start:stop].write(rows).result()

        progress = {"rows": stop, "arrays": list(arrays)}
        write_whole(self.folder / "progress.json", json.dumps(progress))

    def keep_cut(self, rows: Sequence[int]) -> None:
        """Store which prompts were cut because they have more tokens than max_tokens."""
        write_whole(self.folder / "cut.json", json.dumps(list(rows)))

    def cut_message(self, max_tokens: int) -> str:
        """Say how many prompts were cut, and name the first; "" if none was."""
        file = self.folder / "cut.json"
        rows = json.loads(file.read_text()) if file.exists() else []
        if not rows:
            return ""
        first = textwrap.shorten(self.prompts[rows[0]], 100, placeholder=" ...")
        return (
            f"warning: {len(rows)} of {len(self.prompts)} prompts are longer than {max_tokens} "
            f"tokens (config.prompts.max_tokens) and are cut there; the first of them: {first!r}"
        )

    def rows(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the rows of these prompts: int [n]. Raises KeyError for an unknown prompt."""
        return np.array([self._row[prompt] for prompt in prompts], int)

    def read_rows(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Read {name: [n, ...]} of these rows, int [n]. Raises ValueError if rows are missing."""
        progress = self._progress()
        if progress["rows"] != len(self.prompts):
            raise ValueError(
                f"{self.folder} holds {progress['rows']} of {len(self.prompts)} prompts; run "
                "scripts/encode_prompts.py to the end"
            )
        reads = {name: self._open(name)[rows].read() for name in progress["arrays"]}
        return {name: read.result() for name, read in reads.items()}

    def read(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Read {name: [n, ...]} of these prompts, in order. Raises as `rows` and `read_rows` do."""
        return self.read_rows(self.rows(prompts))

    def _progress(self) -> dict[str, Any]:
        file = self.folder / "progress.json"
        return json.loads(file.read_text()) if file.exists() else {"rows": 0, "arrays": []}

    def _spec(self, name: str) -> dict[str, Any]:
        path = str(self.folder / f"{name}.zarr")
        return {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}

    def _open(self, name: str) -> ts.TensorStore:
        if name not in self._arrays:
            self._arrays[name] = ts.open(self._spec(name)).result()
        return self._arrays[name]

    def _create(self, name: str, rows: np.ndarray) -> ts.TensorStore:
        """Open an array for writing, creating it for rows like these if it does not exist."""
        if name not in self._arrays:
            self._arrays[name] = ts.open(
                self._spec(name),
                create=True,
                open=True,
                dtype=rows.dtype.name,
                shape=[len(self.prompts), *rows.shape[1:]],
                chunk_layout=ts.ChunkLayout(chunk_shape=[1, *rows.shape[1:]]),
            ).result()
        return self._arrays[name]


def open_cache(
    prompts: Sequence[str], model: str | Path, encoders: Sequence[Encoder], settings: Any
) -> TextCache:
    """Open the cache of these prompts, which may be incomplete; create an empty one if needed.

    Args:
      prompts: the prompts; duplicates get one row.
      model: a diffusers pipeline folder.
      encoders: the text encoders, whose files determine the embeddings.
      settings: `config.prompts`, or any object with its cache, max_tokens and dtype.
    """
    prompts = list(dict.fromkeys(prompts))
    folder = cache_folder(
        settings.cache,
        model,
        prompts,
        encoders,
        max_tokens=settings.max_tokens,
        dtype=settings.dtype,
    )
    cache = TextCache(folder, prompts)

    if not (folder / "prompts.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with cache.lock():
            write_whole(folder / "prompts.json", json.dumps(prompts))
    return cache


def ensure_encoded(
    prompts: Sequence[str],
    model: str | Path,
    encoders: Sequence[Encoder],
    settings: Any,
    command: Sequence[str],
) -> TextCache:
    """Return the complete cache of these prompts; encode missing rows in a subprocess.

    Args:
      prompts, model, encoders: as for `open_cache`.
      settings: as for `open_cache`, plus the `device` that the encoders run on.
      command: the encoding program, such as [sys.executable, "scripts/encode_prompts.py"]. It is
        called with --model, --folder, --encoders, --max_tokens, --dtype and --device.

    Raises ChildProcessError if the program fails.
    """
    cache = open_cache(prompts, model, encoders, settings)
    if cache.complete:
        return cache

    options = [
        f"--model={model}",
        f"--folder={cache.folder}",
        f"--encoders={encoders_to_json(encoders)}",
        f"--max_tokens={settings.max_tokens}",
        f"--dtype={settings.dtype}",
        f"--device={settings.device}",
    ]
    if run_child([*command, *options]):
        raise ChildProcessError(
            f"the text encoders failed (see above); the finished prompts are kept in {cache.folder}"
        )
    return cache
