"""The prompts of an evaluation: several variants of the same scenes, line by line."""

import re
from collections.abc import Mapping

from realgen_jax.data import read_categorised
from realgen_jax.realbench.results import PromptSet

SAFE = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._+-]*"
)  # names of sets and entries, which are names of folders too


def read_sets(files: Mapping[str, str]) -> list[PromptSet]:
    """The sets of `config.evaluate.prompts`, {name: .txt or .jsonl file}, that with the shortest prompts first.

    Raises FileNotFoundError, or ValueError for a bad line, a name that cannot be a folder's, and for sets that have not
    as many lines as the others.
    """
    if not files:
        raise ValueError("config.evaluate.prompts is empty; expected {name of a set: prompt file}")
    if bad := [name for name in files if not SAFE.fullmatch(name)]:
        raise ValueError(
            f"config.evaluate.prompts has a set {bad[0]!r}; expected letters, digits, '.', '_', '+', '-'"
        )
    sets = []
    for name in files:
        prompts, categories = zip(*read_categorised(files[name]), strict=True)
        sets.append(PromptSet(name, prompts, categories))
    first = sets[0]
    for one in sets[1:]:
        if len(one.prompts) != len(first.prompts):
            raise ValueError(
                f"the set {first.name} has {len(first.prompts)} prompts ({files[first.name]}) and {one.name} has "
                f"{len(one.prompts)} ({files[one.name]}); line i of every set is the same scene, so there must be as "
                "many of each"
            )
    return sorted(sets, key=lambda one: sum(map(len, one.prompts)))
