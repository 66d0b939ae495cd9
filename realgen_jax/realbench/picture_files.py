"""Read, check and write picture files; pictures in memory."""

import hashlib
import io
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from realgen_jax.files import write_whole
from realgen_jax.input_files import read_image

Slot = tuple[int, int]  # line of the prompts, copy


@dataclass(frozen=True)
class Picture:
    """A picture in memory, or why it could not be read."""

    slot: Slot
    file: Path
    sha256: str
    pixels: np.ndarray | None  # uint8 [3, h, w]
    detail: str = ""  # the error message


def file_name(line: int, copy: int) -> str:
    return f"{line:05}_{copy}.png" if copy else f"{line:05}.png"


def decode(data: bytes) -> np.ndarray:
    """A picture file -> uint8 [3, h, w]. Raises ValueError as `read_image` does."""
    return np.ascontiguousarray(np.asarray(read_image(data)).transpose(2, 0, 1))


def read_picture(slot: Slot, file: Path) -> Picture:
    """Read a picture; an error message is stored in its `detail`."""
    try:
        data = file.read_bytes()
    except OSError as error:
        return Picture(slot, file, "", None, str(error))

    digest = hashlib.sha256(data).hexdigest()
    try:
        return Picture(slot, file, digest, decode(data))
    except ValueError as error:
        return Picture(slot, file, digest, None, str(error))


def write_picture(slot: Slot, file: Path, pixels: np.ndarray) -> Picture:
    """Write uint8 [3, h, w] as a lossless file, atomically: it is whole or absent after a crash."""
    stream = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(stream, "PNG")
    data = stream.getvalue()

    write_whole(file, data)
    return Picture(slot, file, hashlib.sha256(data).hexdigest(), np.ascontiguousarray(pixels))


def read_batches(
    files: Mapping[Slot, Path], lines: int, size: int, pool: ThreadPoolExecutor
) -> Iterator[list[Picture]]:
    """Yield existing pictures in batches of `size` slots; the next batch is read ahead.

    Every line and copy has a slot, whether or not its file exists, so a picture stays in the same
    batch when other files appear or disappear.
    """
    copies = 1 + max((copy for _, copy in files), default=0)
    slots = [(line, copy) for line in range(lines) for copy in range(copies)]
    ahead = deque()
    for start in range(0, len(slots), size):
        batch = [slot for slot in slots[start : start + size] if slot in files]
        ahead.append([pool.submit(read_picture, slot, files[slot]) for slot in batch])
        if len(ahead) > 1:
            yield [future.result() for future in ahead.popleft()]
    for batch in ahead:
        yield [future.result() for future in batch]


def missing_pictures(folder: Path, lines: int, copies: int) -> np.ndarray:
    """Return bool [lines * copies]: which pictures of a folder do not exist."""
    missing = np.zeros(lines * copies, bool)
    for line in range(lines):
        for copy in range(copies):
            missing[line * copies + copy] = not (folder / file_name(line, copy)).exists()
    return missing
