"""Digests of what determines the scores of rewards, wherever they run and their files are.

Programs store them with what they compute, and compare them when they go on: a run with its
checkpoints, an evaluation with its scores, a client with what its servers tell.

`digest_of` is realgen_jax.files.content_digest throughout: files and folders -> SHA-256.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from reward_bridge.references import reference_files
from reward_bridge.registry import CLASS, find_class
from reward_bridge.reward import RewardError
from reward_bridge.rewards import REWARDS, make_reward
from reward_bridge.rewards.embedded import FOLDER
from reward_bridge.setup import FILE_OPTIONS, learner_options
from reward_bridge.weights import expand_home

DigestOf = Callable[[Iterable[Path]], str]

# Options of rewards that do not change their scores.
UNSCORED = ("servers", "deadline", "attempts", "token_env", "max_refused")


def served_rewards(reward: ConfigDict, names: Sequence[str]) -> dict[str, str]:
    """Ask the servers and endpoints of these rewards whether they are there.

    Call this before anything is loaded, and after `missing_rewards` has found nothing. Returns
    {reward: the digest of what its servers serve, "" if they do not tell}. Raises ValueError with
    one line per reward that cannot be asked.
    """
    options = reward.options.to_dict()
    served = {}
    problems = []
    for name in dict.fromkeys(names):
        reward_options = options.get(name, {})
        if name in reward.adversarial or not _is_remote(name, reward_options):
            continue
        try:
            digest = make_reward(name, "cpu", reward_options).check_connection()
        except (ValueError, RewardError) as error:
            problems.append(str(error))
            continue
        if "servers" in reward_options:
            served[name] = digest
    if problems:
        raise ValueError("\n".join(problems))
    return served


def _is_remote(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a reward is computed elsewhere: by servers, or by an endpoint that its class asks."""
    if "servers" in options:
        return True
    return hasattr(find_class("reward", name, REWARDS, options), "check_connection")


def reward_digest(name: str, options: Mapping[str, Any], digest_of: DigestOf) -> str:
    """Return a SHA-256 of a reward's name, its options and the files that they name.

    Files count by their contents. The code of a class of the user's own does not count.
    """
    values = {}
    for option, value in options.items():
        if option in FILE_OPTIONS and value:
            values[option] = digest_of([expand_home(value)])
        elif option not in UNSCORED:
            values[option] = value
    shipped = ""
    is_embedded = name.startswith("embedded_") or (name == "diversity" and not options.get("path"))
    if is_embedded and CLASS not in options:
        shipped = _shipped(digest_of)
    facts = json.dumps([name, values, shipped], sort_keys=True, default=str)
    return hashlib.sha256(facts.encode()).hexdigest()


def run_digests(
    reward: ConfigDict, names: Sequence[str], served: Mapping[str, str], digest_of: DigestOf
) -> dict[str, str]:
    """Return {key of the config: digest of what it stands for} of these rewards of a run.

    A key such as "reward.options.NAME" stands for all keys below it. The reference pictures and the
    metrics are included.

    served: what the servers tell, as `served_rewards` returns it. A reward whose servers do not
    tell has no digest.
    """
    options = reward.options.to_dict()
    digests = {}
    for name in dict.fromkeys(names):
        if name in served:
            if served[name]:
                digests[f"reward.options.{name}"] = served[name]
        elif name in reward.adversarial:
            digest = reward_digest(name, learner_options(reward, name), digest_of)
            digests[f"reward.options.{name}"] = digest
            digests[f"reward.adversarial.{name}.options"] = digest
        else:
            digest = reward_digest(name, options.get(name, {}), digest_of)
            digests[f"reward.options.{name}"] = digest

    if reward.metrics:
        digests["reward.metrics"] = _shipped(digest_of)
    source = reward.references.path
    if reward.adversarial:
        files = reference_files(source, reward.references.root)
        digests["reward.references"] = digest_of(files)
    elif source and expand_home(source).is_file():  # not used
        digests["reward.references"] = digest_of([expand_home(source)])
    return digests


def score_keys(
    reward: ConfigDict, names: Sequence[str], served: Mapping[str, str], digest_of: DigestOf
) -> dict[str, str]:
    """Return {reward: the key under which an evaluation stores its scores}.

    Servers that do not tell what they serve count by their addresses.
    """
    options = reward.options.to_dict()
    keys = {}
    for name in names:
        own = options.get(name, {})
        if served.get(name):
            keys[name] = served[name]
        elif name in served:
            keys[name] = reward_digest(name, {"addresses": own["servers"]}, digest_of)
        else:
            keys[name] = reward_digest(name, own, digest_of)
    return keys


def _shipped(digest_of: DigestOf) -> str:
    """The digest of the embedded rewards' own files."""
    return digest_of(sorted(FOLDER.glob("[!.]*.*")))
