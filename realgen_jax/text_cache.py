"""The cache of text embeddings on disk.

The text encoders are PyTorch models. They run once, in a separate process, before training starts;
the trainer only reads the resulting folder:

    prompts.json     the prompts, in row order
    NAME.zarr        an array with one row per prompt, a file a row; the names depend on the model
    progress.json    the dtypes and shapes of the arrays, and the rows of the prompts that are
                     longer than max_tokens

A row counts as stored if its files have the right size. Each file ends with a checksum, which is
compared whenever it is read. Rows that are missing or damaged are encoded again.
"""

import hashlib
import json
import math
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

# Part of the name of a cache's folder. Format 1 had no checksums, and its text encoders may have
# been loaded from incomplete files.
FORMAT = 2
CHECKSUM_BYTES = 4
CHECKED_BYTES = 1 << 28  # arrays up to this size are read as a whole when they are opened


def encoders_to_json(encoders: Sequence[Encoder]) -> str:
    """Serialise encoders to one command-line argument."""
    return json.dumps([asdict(encoder) for encoder in encoders])


def encoders_from_json(text: str) -> list[Encoder]:
    """Parse the output of `encoders_to_json`. Raises ValueError for anything else."""
    try:
        return [
            Encoder(**{**fields, "arrays": tuple(fields["arrays"])}) for fields in json.loads(text)
        ]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{text!r} does not name text encoders ({error})") from error


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
    fingerprint = [FORMAT, list(prompts), encoders_to_json(encoders), settings]
    digest = hashlib.sha256(json.dumps(fingerprint).encode())

    subfolders = {folder for encoder in encoders for folder in (encoder.tokenizer, encoder.model)}
    for name in sorted(subfolders):
        subfolder = Path(model) / name
        if not subfolder.is_dir():
            raise FileNotFoundError(
                f"{subfolder} is missing; expected a pipeline folder of diffusers with {name}/; "
                "download the whole folder"
            )
        for file in sorted(subfolder.iterdir()):
            if file.is_file():
                digest.update(sampled_digest(file))
    return Path(root).expanduser() / digest.hexdigest()[:20]


class TextCache:
    """Named arrays with one row for each prompt of a list.

    Rows are independent of each other, so an interrupted encoding continues with the missing ones.
    """

    def __init__(self, folder: Path, prompts: Sequence[str]):
        self.folder = folder
        self.prompts = list(prompts)
        self._row = {prompt: row for row, prompt in enumerate(self.prompts)}
        self._arrays: dict[str, ts.TensorStore] = {}

    def missing_rows(self) -> list[int]:
        """Return the rows that are not stored whole, in order.

        Files that are absent or cut off are always found. Changed bytes are found here in arrays of
        at most CHECKED_BYTES, and in larger ones when the row is read.
        """
        arrays = self._progress()["arrays"]
        missing = set() if arrays else set(range(len(self.prompts)))
        for name, described in arrays.items():
            missing |= self._damaged(name, described)
        return sorted(missing)

    def lock(self) -> FileLock:
        """Return a context manager for the one process that may write; others wait."""
        return file_lock(self.folder / "lock")

    def write(self, start: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write rows start, start + 1, ... of every array, {name: [n, ...]}.

        Hold `lock` if other processes may write too.
        """
        described = {}
        for name, rows in arrays.items():
            shape = [len(self.prompts), *rows.shape[1:]]
            described[name] = {"dtype": rows.dtype.name, "shape": shape}
            array = self._create(name, described[name])
            array[start : start + len(rows)].write(rows).result()

        progress = self._progress()
        if progress["arrays"] != described:
            self._keep_progress({**progress, "arrays": described})

    def keep_cut(self, rows: Sequence[int]) -> None:
        """Store which prompts were cut because they have more tokens than max_tokens."""
        self._keep_progress({**self._progress(), "cut": list(rows)})

    def cut_message(self, max_tokens: int) -> str:
        """Say how many prompts were cut, and name the first; "" if none was."""
        rows = self._progress()["cut"]
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
        """Read {name: [n, ...]} of these rows, int [n].

        Raises OSError, naming the folder, if one of them is missing or damaged.
        """
        arrays = self._progress()["arrays"]
        try:
            if not arrays:
                raise ValueError("nothing is stored")
            reads = {name: self._open(name, arrays[name])[rows].read() for name in arrays}
            return {name: read.result() for name, read in reads.items()}
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise OSError(
                f"text embeddings in {self.folder} are missing or damaged ({reason}); remove that "
                "folder and start again, so that they are encoded again"
            ) from error

    def read(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Read {name: [n, ...]} of these prompts, in order. Raises as `rows` and `read_rows` do."""
        return self.read_rows(self.rows(prompts))

    def _progress(self) -> dict[str, Any]:
        """The content of progress.json; without arrays if it is missing or damaged."""
        try:
            progress = json.loads((self.folder / "progress.json").read_bytes())
            if set(progress) == {"arrays", "cut"}:
                return progress
        except (FileNotFoundError, ValueError, TypeError):
            pass
        return {"arrays": {}, "cut": []}

    def _keep_progress(self, progress: Mapping[str, Any]) -> None:
        write_whole(self.folder / "progress.json", json.dumps(progress))

    def _damaged(self, name: str, described: Mapping[str, Any]) -> set[int]:
        """The rows of an array whose file is absent, is cut off or, in a small array, has changed.

        described: its dtype and shape.
        """
        count, *shape = described["shape"]
        try:
            array = self._open(name, described)
        except ValueError:  # zarr.json is missing or damaged
            return set(range(count))

        # Compare the sizes of the files.
        size = math.prod(shape) * array.dtype.numpy_dtype.itemsize + CHECKSUM_BYTES
        chunks = self.folder / f"{name}.zarr" / "c"
        rest = Path(*["0"] * len(shape))
        damaged = set()
        for row in range(count):
            file = chunks / str(row) / rest
            if not file.is_file() or file.stat().st_size != size:
                damaged.add(row)

        # Compare their checksums.
        if count * size <= CHECKED_BYTES:
            reads = {row: array[row].read() for row in range(count) if row not in damaged}
            damaged |= {row for row, read in reads.items() if read.exception() is not None}
        return damaged

    def _spec(self, name: str, described: Mapping[str, Any]) -> dict[str, Any]:
        """The array in TensorStore's terms. Absent rows are errors, and rows of zeros are stored.

        (By default, an absent row reads as zeros, and a row of zeros is left out.)
        """
        shape = described["shape"]
        return {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(self.folder / f"{name}.zarr")},
            "metadata": {
                "data_type": described["dtype"],
                "shape": shape,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": [1, *shape[1:]]},
                },
                "codecs": [{"name": "bytes"}, {"name": "crc32c"}],
            },
            "fill_missing_data_reads": False,
            "store_data_equal_to_fill_value": True,
        }

    def _open(self, name: str, described: Mapping[str, Any]) -> ts.TensorStore:
        """Open an array. Raises ValueError if it is missing, or is not as described."""
        if name not in self._arrays:
            self._arrays[name] = ts.open(self._spec(name, described), open=True).result()
        return self._arrays[name]

    def _create(self, name: str, described: Mapping[str, Any]) -> ts.TensorStore:
        """Open an array for writing. One that is missing, or not as described, is made anew."""
        if name not in self._arrays:
            spec = self._spec(name, described)
            try:
                array = ts.open(spec, create=True, open=True).result()
            except ValueError:
                array = ts.open(spec, create=True, delete_existing=True).result()
            self._arrays[name] = array
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

    # The folder's name is that of these prompts, so a file with other content is damaged.
    file = folder / "prompts.json"
    content = json.dumps(prompts).encode()
    if not file.exists() or file.read_bytes() != content:
        folder.mkdir(parents=True, exist_ok=True)
        with cache.lock():
            write_whole(file, content)
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
      prompts: as for `open_cache`.
      model: as for `open_cache`.
      encoders: as for `open_cache`.
      settings: as for `open_cache`, plus the `device` that the encoders run on.
      command: the encoding program, such as [sys.executable, "scripts/encode_prompts.py"]. It is
        called with --model, --folder, --encoders, --max_tokens, --dtype and --device.

    Raises ChildProcessError if the program fails, OSError if rows are still missing after it.
    """
    cache = open_cache(prompts, model, encoders, settings)
    if not cache.missing_rows():
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
    missing = cache.missing_rows()
    if missing:
        raise OSError(
            f"{cache.folder} still lacks the embeddings of {len(missing)} prompts after they were "
            f"encoded, such as {cache.prompts[missing[0]]!r}; is that disk sound?"
        )
    return cache
