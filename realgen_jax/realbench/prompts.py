"""The prompts of an evaluation: several variants of the same scenes, aligned line by line."""

import re
from collections.abc import Mapping

from realgen_jax.data import read_categorised
from realgen_jax.realbench.results import PromptSet

SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # names of sets and entries, which name folders


def read_sets(files: Mapping[str, str]) -> list[PromptSet]:
    """Read the sets of `config.evaluate.prompts`, {name: .txt or .jsonl file}.

    The set with the shortest prompts comes first. Raises FileNotFoundError, or ValueError for a bad
    line, for a name that cannot name a folder, and for sets of different lengths.
    """
    if not files:
        raise ValueError("config.evaluate.prompts is empty; expected {name of a set: prompt file}")
    for name in files:
        if not SAFE.fullmatch(name):
            raise ValueError(
                f"config.evaluate.prompts has a set {name!r}; expected letters, digits, '.', '_', "
                "'+', '-'"
            )

    sets = []
    for name in files:
        prompts, categories = zip(*read_categorised(files[name]), strict=True)
        sets.append(PromptSet(name, prompts, categories))

    first = sets[0]
    for other in sets[1:]:
        if len(other.prompts) != len(first.prompts):
            raise ValueError(
                f"the set {first.name} has {len(first.prompts)} prompts ({files[first.name]}) and "
                f"{other.name} has {len(other.prompts)} ({files[other.name]}); line i of every set "
                "is the same scene, so all sets need the same number of lines"
            )
    return sorted(sets, key=lambda prompt_set: sum(map(len, prompt_set.prompts)))
