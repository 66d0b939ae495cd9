"""Files: writes that are atomic and name their file, digests, locks, JSON lines."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

if TYPE_CHECKING:  # benchmarks/flux_gpu.py runs on machines without Pillow
    from PIL import Image

WHOLE_BYTES = 1 << 28  # files up to this size are digested whole, which takes 0.2 s for each
SAMPLED_BLOCKS = 64  # number of blocks that are read of a larger file
BLOCK_BYTES = 1 << 16


def expand_home(path: str | Path) -> Path:
    """Return the path with the home folder for "~", or as it is if the user has none.

    Path.expanduser raises RuntimeError for such a user.
    """
    return Path(os.path.expanduser(path))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file or folder that is written in the errors of the block, such as a full disk.

    Many errors of writing lack the name. Raises OSError.
    """
    try:
        yield
    except OSError as error:
        is_named = getattr(error, "filename", None) is not None or str(path) in str(error)
        if is_named:
            raise
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{path} could not be written: {reason}") from error


def write_whole(file: Path, data: str | bytes) -> None:
    """Write a file atomically: a reader sees the old or the new content, even after a crash.

    Text is written as UTF-8. Raises OSError, which names the file, and leaves nothing behind.
    """
    temporary = _temporary(file)
    with writing(file):
        try:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
            temporary.replace(file)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def write_image(file: Path, image: "Image.Image") -> None:
    """Write a picture as PNG, as `write_whole` does."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    write_whole(file, stream.getvalue())


def append(file: Path, text: str) -> None:
    """Append text to a file, which exists in the file when this returns.

    Raises OSError, which names the file; its last line may then be incomplete.
    """
    with writing(file), file.open("a", encoding="utf-8") as stream:
        stream.write(text)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill. It replaces `folder` at the end, unless an error is raised.

    An error leaves nothing behind, and neither an error nor a crash destroys the old content.
    """
    temporary = _temporary(folder)
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():  # a crash came between the two renames below
        old.rename(folder)
    for rest in (temporary, old):
        shutil.rmtree(rest, ignore_errors=True)
    with writing(folder):
        try:
            temporary.mkdir(parents=True)
            yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """Return the temporary path beside `path` where its new content is written first."""
    return path.with_name(path.name + ".part")


def sha256_file(file: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sampled_digest(file: Path) -> bytes:
    """Return a SHA-256 over a file's name, its size and its content.

    Only 64 evenly spaced blocks of a file above WHOLE_BYTES are read (T5 has 10 GB). Another
    version of such a file is noticed, but not a few changed bytes between the blocks.
    """
    return _digest(file, f"{file.name} ")


def content_digest(paths: Iterable[Path]) -> str:
    """Return a SHA-256, in hexadecimal, of what files and folders hold, wherever they are.

    A file counts by its content as in `sampled_digest`, but without its name. A folder counts by
    the relative names and the contents of its files, except hidden ones, such as those in which
    downloads keep their state. Raises OSError if there is no such file or it cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_dir():
            digest.update(_digest(path))
            continue
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path)
            is_hidden = any(part.startswith(".") for part in name.parts)
            if file.is_file() and not is_hidden:
                digest.update(_digest(file, f"{name.as_posix()} "))
    return digest.hexdigest()


def _digest(file: Path, prefix: str = "") -> bytes:
    """Return a SHA-256 over a prefix, a file's size and its content, whole or in blocks."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{prefix}{size}".encode())

    with file.open("rb") as stream:
        if size <= WHOLE_BYTES:
            while block := stream.read(1 << 20):
                digest.update(block)
        else:
            for offset in np.linspace(0, size - BLOCK_BYTES, SAMPLED_BLOCKS).astype(np.int64):
                stream.seek(int(offset))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.digest()


def file_lock(file: Path, timeout: float = -1) -> FileLock:
    """Return a context manager that holds `file` as a lock between processes.

    It waits `timeout` seconds (-1: forever, 0: not at all), then raises `filelock.Timeout`. The
    operating system releases the lock however the process ends. Raises OSError on a file system
    without such locks, because a lock file alone would outlive a killed process.
    """
    return FileLock(file, timeout=timeout, fallback_to_soft=False)


def read_jsonl(file: Path) -> list[Any]:
    """Return the values of a file with one JSON value per line; [] if there is no such file.

    A last line that a crash left incomplete is skipped. Raises ValueError if any other line is
    not JSON.
    """
    if not file.exists():
        return []
    lines = file.read_bytes().splitlines()

    values = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{file}, line {number} is not JSON ({error})") from error
    return values


def drop_incomplete_line(file: Path) -> None:
    """Remove a last line that a crash left incomplete, so that further lines can be appended."""
    if not file.exists():
        return
    content = file.read_bytes()
    end = content.rfind(b"\n") + 1

    if end < len(content):
        with file.open("r+b") as stream:
            stream.truncate(end)
