"""Recorded arrays of the reference, and where things lie in the repository."""

from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
GOLDENS = TESTS / "goldens"
PIPELINE = GOLDENS / "08_pipeline" / "pipeline"


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of `tests/goldens/<name>`, an .npz file."""
    with np.load(GOLDENS / name, allow_pickle=False) as arrays:
        return dict(arrays)
