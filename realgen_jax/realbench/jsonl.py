"""Files of one JSON object per line that are appended to, and may end in an incomplete line."""

import json
from pathlib import Path
from typing import Any


def read_jsonl(file: Path) -> list[Any]:
    """Return the records of a file; none if it does not exist.

    A last line without its newline was cut off when the program was killed and is ignored. Raises
    ValueError, naming the line, for one that is not JSON.
    """
    records = []
    for number, line in enumerate(_complete_lines(file).splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{file}, line {number}, is not JSON ({error}); remove that line"
            ) from None
    return records


def remove_incomplete_line(file: Path) -> None:
    """Cut off a last line without its newline, so that the next record starts on its own line."""
    if not file.exists():
        return
    size = len(_complete_lines(file))
    if size < file.stat().st_size:
        with file.open("r+b") as stream:
            stream.truncate(size)


def _complete_lines(file: Path) -> bytes:
    content = file.read_bytes() if file.exists() else b""
    return content[: content.rfind(b"\n") + 1]
