"""Pictures as another tool leaves them, for the tests of RealBench."""

from pathlib import Path

import numpy as np
from PIL import Image


def found_folder(tmp_path: Path, lines: int = 3) -> Path:
    """A folder of noise, 00000.png and so on, for all prompt sets."""
    folder = tmp_path / "found"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for line in range(lines):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{line:05}.png")
    return folder
