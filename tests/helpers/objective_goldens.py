"""The goldens of tests/goldens/14_objectives, with the settings and tolerances of its manifest."""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tests.helpers.goldens import GOLDENS, golden

FOLDER = "14_objectives"


@dataclass(frozen=True)
class Case:
    """A recorded case: arrays by name, and its entry in the manifest."""

    arrays: dict[str, np.ndarray]
    entry: dict[str, Any]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    @property
    def meta(self) -> dict[str, Any]:
        return self.entry["meta"]

    def check(self, name: str, got: Any) -> None:
        """Assert that an array is the recorded one, within the recorded tolerance."""
        tolerance = self.entry["tolerance_overrides"].get(name, self.entry)
        np.testing.assert_allclose(
            got, self[name], rtol=tolerance["rtol"], atol=tolerance["atol"], err_msg=name
        )


@cache
def case(name: str) -> Case:
    """Return a case by its name, such as "nft"."""
    manifest = json.loads((GOLDENS / FOLDER / "manifest.json").read_text())
    (entry,) = [entry for entry in manifest["cases"] if entry["name"] == f"objectives/{name}"]
    return Case(golden(f"{FOLDER}/{name}.npz"), entry)
