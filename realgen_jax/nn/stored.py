"""Tensors in files: safetensors and GGUF, read one at a time, and written one at a time."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from realgen_jax.files import writing

# The dtypes of weights, by their names in safetensors files.
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
# The dtypes of codes, in files of scripts/quantize.py alone. Their header names the format.
CODES = {"I8": np.int8, "U8": np.uint8}
QUANTIZATION = "realgen_jax_quantization"
_ALL = {**DTYPES, **CODES}
_NAMES = {np.dtype(dtype): name for name, dtype in _ALL.items()}

# How files of other formats begin.
OTHER_FORMATS = {
    b"PK\3\4": "is a PyTorch pickle; expected a safetensors file",
    b"\x80": "is a pickle; expected a safetensors file",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself; run git lfs pull",
}
GGUF = b"GGUF"  # how GGUF files begin
# ComfyUI-GGUF's entry for a tensor that it had to reshape, with the tensor's name after it.
GGUF_SHAPE = "comfy.gguf.orig_shape."


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    key: its name there. dtype: the name that the format has for its dtype. readable: whether it is
    a dtype of weights. rows(start, stop): its rows, of the first axis; nothing else is read from
    disk.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    readable: bool
    rows: Callable[[int, int], np.ndarray]

    def read(self) -> np.ndarray:
        """The whole tensor."""
        if not self.shape:
            return self.rows(0, 1).reshape(())
        return self.rows(0, self.shape[0])


def open_tensors(file: Path) -> tuple[dict[str, str], list[Stored]]:
    """Return a file's own entries and its tensors; no weight is read.

    Raises FileNotFoundError for a missing file, ValueError for one of another format.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing")
    with file.open("rb") as stream:
        start = stream.read(len(GGUF))
    return ({}, _open_gguf(file)) if start == GGUF else _open_safetensors(file)


# -- safetensors


def _open_safetensors(file: Path) -> tuple[dict[str, str], list[Stored]]:
    """The safetensors library checks the header; it cannot tell numpy's float8, so we read."""
    try:
        with safe_open(file, framework="np"), file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
    except SafetensorError as error:
        with file.open("rb") as stream:
            content = stream.read(64)
        for start, problem in OTHER_FORMATS.items():
            if content.startswith(start):
                raise ValueError(f"{file} {problem}") from error
        raise ValueError(
            f"{file} is not a complete safetensors file ({error}); download it again"
        ) from error
    metadata = header.pop("__metadata__", {})
    known = _ALL if QUANTIZATION in metadata else DTYPES
    tensors = []
    for key, entry in header.items():
        offset = 8 + size + entry["data_offsets"][0]
        shape = tuple(entry["shape"])
        dtype = entry["dtype"]
        rows = _safetensors_rows(file, dtype, shape, offset)
        tensors.append(Stored(file, key, dtype, shape, dtype in known, rows))
    return metadata, tensors


def _safetensors_rows(
    file: Path, dtype_name: str, shape: tuple[int, ...], offset: int
) -> Callable[[int, int], np.ndarray]:
    def rows(start: int, stop: int) -> np.ndarray:
        dtype = np.dtype(_ALL[dtype_name])
        row = math.prod(shape[1:]) * dtype.itemsize
        content = np.fromfile(file, np.uint8, (stop - start) * row, offset=offset + start * row)
        return content.view(dtype).reshape(stop - start, *shape[1:])

    return rows


def write_tensors(
    file: Path,
    shapes: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file, one tensor after another.

    The library's own writer needs all of them in memory. shapes: {key: shape and dtype}, in the
    order of `tensors`. A reader sees the old or the new file. Raises OSError, which names the file.
    """
    # The header, padded so that the tensors are aligned.
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, like in shapes.items():
        begin = end
        end = begin + math.prod(like.shape) * np.dtype(like.dtype).itemsize
        header[key] = {
            "dtype": _NAMES[np.dtype(like.dtype)],
            "shape": list(like.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    temporary = file.with_name(file.name + ".part")
    with writing(file):
        try:
            with temporary.open("wb") as stream:
                stream.write(len(text).to_bytes(8, "little") + text)
                for (key, like), (name, array) in zip(shapes.items(), tensors, strict=True):
                    assert (key, like.shape, like.dtype) == (name, array.shape, array.dtype)
                    stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


# -- GGUF


def _open_gguf(file: Path) -> list[Stored]:
    """The tensors of a GGUF file; the gguf package reads it and its quantized blocks."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f'{file} is a GGUF file, which needs a package: pip install "realgen_jax[gguf]"'
        ) from error
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"{file} is not a complete GGUF file ({error}); download it again"
        ) from error

    # What the package can read, of each type in the file.
    for kind in {tensor.tensor_type for tensor in reader.tensors}:
        size = gguf.GGML_QUANT_SIZES[kind][1]
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except (NotImplementedError, KeyError) as error:
            raise ValueError(
                f"{file} holds tensors of type {kind.name}, which is not read; expected, for "
                "instance, Q8_0, Q4_K or BF16"
            ) from error

    # GGUF has the axes in reverse.
    tensors = []
    for tensor in reader.tensors:
        field = reader.get_field(GGUF_SHAPE + tensor.name)
        shape = field.contents() if field else reversed(tensor.shape.tolist())
        shape = tuple(int(size) for size in shape)
        rows = _gguf_rows(gguf.dequantize, tensor.data, tensor.tensor_type, shape)
        tensors.append(Stored(file, tensor.name, tensor.tensor_type.name, shape, True, rows))
    return tensors


def _gguf_rows(
    dequantize: Callable[[np.ndarray, Any], np.ndarray],
    data: np.ndarray,
    kind: Any,
    shape: tuple[int, ...],
) -> Callable[[int, int], np.ndarray]:
    """Rows in float32. data: mapped from disk, with the same rows unless it was reshaped."""

    def rows(start: int, stop: int) -> np.ndarray:
        if data.ndim > 1 and len(data) == shape[0]:
            return dequantize(data[start:stop], kind).reshape(stop - start, *shape[1:])
        return dequantize(data, kind).reshape(shape)[start:stop]

    return rows
