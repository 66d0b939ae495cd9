"""Embeddings of texts that were written a moment ago, beside those of a cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class FreshTexts:
    """Named arrays with one row for each text, in memory; read like a TextCache.

    Model.cond reads it in place of a cache. Texts that it does not have, such as the negative
    prompt, are read from the cache.
    """

    def __init__(self, cache: Any, texts: Sequence[str], arrays: Mapping[str, np.ndarray]):
        """cache: a TextCache of the same encoders. arrays: {name: [n, ...]} of n texts.

        Raises ValueError unless there is a row for each text.
        """
        self._cache = cache
        self._row = {text: row for row, text in enumerate(texts)}
        self._arrays = dict(arrays)
        for name, array in self._arrays.items():
            if len(array) != len(texts):
                raise ValueError(
                    f"the text encoders gave {len(array)} rows of {name} for {len(texts)} texts"
                )

    def read(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return {name: [n, ...]} of these texts, in order. Raises as TextCache.read does."""
        stored = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._row))
        arrays = self._arrays
        rows = self._row
        if stored:
            first = len(self._row)
            rows = {**rows, **{prompt: first + i for i, prompt in enumerate(stored)}}
            arrays = _joined(arrays, self._cache.read(stored))
        index = np.array([rows[prompt] for prompt in prompts], int)
        return {name: array[index] for name, array in arrays.items()}


def _joined(
    fresh: Mapping[str, np.ndarray], stored: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Fresh rows, then stored ones. A cache of short prompts may have arrays of fewer tokens.

    Those are filled up with zeros, as the encoders do. Raises ValueError for other differences.
    """
    joined = {}
    for name, array in fresh.items():
        other = stored.get(name)
        if other is None or other.dtype != array.dtype or other.ndim != array.ndim:
            raise ValueError(f"the text cache has another array {name!r} than the text encoders")
        if array.ndim > 2:
            tokens = array.shape[1] - other.shape[1]
            if tokens < 0:
                raise ValueError(
                    f"the text cache has {other.shape[1]} tokens of {name!r}, more than "
                    f"{array.shape[1]} of the text encoders"
                )
            other = np.pad(other, [(0, 0), (0, tokens), *[(0, 0)] * (array.ndim - 2)])
        joined[name] = np.concatenate([array, other])
    return joined
