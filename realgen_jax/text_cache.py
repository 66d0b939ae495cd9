"""The cache of text embeddings. The encoders are PyTorch models that run once (scripts/encode_prompts.py); the trainer
knows only this folder: prompts.json, t5.zarr [prompts, l, joint_dim], clip.zarr [prompts, pooled_dim], progress.json.
"""

import fcntl
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

ENCODE = ("-m", "realgen_scripts.encode_prompts")
_ENCODERS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
_SAMPLES, _BLOCK = 64, 1 << 16  # of a large file: this many blocks of this many bytes


def sampled_digest(file: Path) -> bytes:
    """A small file's bytes; of a large one (T5 has 10 GB) its size and blocks from all over it."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{file.name} {size}".encode())
    with file.open("rb") as stream:
        if size <= _SAMPLES * _BLOCK:
            digest.update(stream.read())
        else:
            for offset in np.linspace(0, size - _BLOCK, _SAMPLES).astype(np.int64):
                stream.seek(int(offset))
                digest.update(stream.read(_BLOCK))
    return digest.digest()


def cache_folder(
    root: str | Path, model: str | Path, prompts: Sequence[str], max_tokens: int, dtype: str
) -> Path:
    """Where these prompts' embeddings by this model's encoders live: the name is a fingerprint of all of them."""
    model = Path(model)
    for name in _ENCODERS:
        if not (model / name).is_dir():
            raise FileNotFoundError(
                f"{model / name} is missing; expected a FluxPipeline folder of diffusers with {name}/"
            )
    files = sorted(
        file for name in _ENCODERS for file in (model / name).iterdir() if file.is_file()
    )
    digest = hashlib.sha256(json.dumps([list(prompts), max_tokens, dtype]).encode())
    for file in files:
        digest.update(sampled_digest(file))
    return Path(root).expanduser() / digest.hexdigest()[:20]


class TextCache:
    """Embeddings of a list of prompts. Rows are written in order and never twice, so an interrupted run goes on."""

    def __init__(self, folder: Path, prompts: Sequence[str]):
        self.folder, self.prompts = folder, list(prompts)
        self._arrays: dict[str, ts.TensorStore] = {}
        self._row = {prompt: i for i, prompt in enumerate(self.prompts)}

    @property
    def rows_done(self) -> int:
        progress = self.folder / "progress.json"
        return json.loads(progress.read_text())["rows"] if progress.exists() else 0

    @property
    def complete(self) -> bool:
        return self.rows_done == len(self.prompts)

    def _open(self, name: str, like: np.ndarray | None = None) -> ts.TensorStore:
        if name not in self._arrays:
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": str(self.folder / f"{name}.zarr")},
            }
            create = {}
            if like is not None:
                chunk = ts.ChunkLayout(chunk_shape=[1, *like.shape[1:]])
                shape = [len(self.prompts), *like.shape[1:]]
                create = {
                    "create": True,
                    "open": True,
                    "dtype": like.dtype.name,
                    "shape": shape,
                    "chunk_layout": chunk,
                }
            self._arrays[name] = ts.open(spec, **create).result()
        return self._arrays[name]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one writer; others wait. The lock ends with the process that holds it."""
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def append(self, t5: np.ndarray, clip: np.ndarray) -> None:
        """Write the next rows: t5 [n, l, joint_dim], clip [n, pooled_dim]. They count once both are on the disk.

        One writer at a time (`lock`).
        """
        start = self.rows_done
        for name, rows in (("t5", t5), ("clip", clip)):
            self._open(name, rows)[start : start + len(rows)].write(rows).result()
        progress = self.folder / "progress.json"
        progress.with_suffix(".tmp").write_text(json.dumps({"rows": start + len(t5)}))
        progress.with_suffix(".tmp").replace(progress)

    def read(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(t5 [n, l, joint_dim], clip [n, pooled_dim]) of these prompts, in this order."""
        if not self.complete:
            done = f"{self.rows_done} of {len(self.prompts)}"
            raise ValueError(
                f"{self.folder} holds {done} prompts; run scripts/encode_prompts.py to the end"
            )
        index = np.array([self._row[prompt] for prompt in prompts])
        t5, clip = (self._open(name)[index].read() for name in ("t5", "clip"))
        return t5.result(), clip.result()


def ensure_encoded(prompts: Sequence[str], model: str, settings: Any) -> TextCache:
    """The finished cache of these prompts, encoding what is missing in a subprocess.

    settings: `config.prompts`, or anything with its cache, max_tokens, dtype and device.
    """
    prompts = list(dict.fromkeys(prompts))
    folder = cache_folder(settings.cache, model, prompts, settings.max_tokens, settings.dtype)
    found = TextCache(folder, prompts)
    if not found.complete:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prompts.json").write_text(json.dumps(prompts))
        options = {"model": model, "folder": folder}
        options |= {name: getattr(settings, name) for name in ("max_tokens", "dtype", "device")}
        arguments = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        if subprocess.run([sys.executable, *ENCODE, *arguments], check=False).returncode:
            raise ChildProcessError(
                f"the text encoders failed (see above); what they finished is kept in {folder}"
            )
    return found
