"""The folder of a run: its name, its lock, and whether a run in it can be resumed."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from fnmatch import fnmatchcase
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from filelock import Timeout
from ml_collections import ConfigDict

from realgen_jax.checkpoint import newest_good, read_meta
from realgen_jax.config import base
from realgen_jax.files import file_lock, write_whole
from realgen_jax.process import cleaned_up

# Config keys that a resumed run may change: where and how long it runs, but not what it computes.
# A different mesh or reward device only changes rounding.
FREE_KEYS = (
    "run_name",
    "run_root",
    "num_epochs",
    "save_freq",
    "eval_freq",
    "num_checkpoint_limit",
    "save_failure",
    "preemption_grace",
    "wandb_project",
    "compilation_cache",
    "profile.*",
    "mesh.*",
    "pretrained.offload",
    "train.offload",
    "evaluate.prompts.*",
    "evaluate.images_per_prompt",
    "evaluate.batch_size",
    "evaluate.scores",
    "evaluate.detectors",
    "evaluate.confidence",
    "evaluate.resamples",
    "evaluate.report_prompts",
    "evaluate.after_training",
    "evaluate.arena.*",
    "prompts.cache",
    "prompts.device",
    "reward.deadline",
    "reward.retries",
    "reward.monitor",
    "reward.stop_*",
    "reward.batch_size",
    "reward.device",
    "reward.devices.*",
    "reward.share_gpu",
    "reward.adversarial.*.deadline",
    "reward.options.*.servers",
    "reward.options.*.deadline",
    "reward.options.*.attempts",
    "reward.options.*.max_refused",
    "reward.options.*.token_env",
)

# Keys whose files a resumed run may change.
FREE_CONTENTS = ("evaluate.*",)

DIGESTS = "digests.json"  # in a run's folder, until there is a checkpoint, which has them too

# What a run writes before its first checkpoint and does not need to go on. With `best/`, which it
# writes later, these are the records that a moved folder may lack.
RECORDS = ("config.json", "metrics.jsonl", "samples/start.npz", "tensorboard", "trainable.txt")


def run_folder(root: str, name: str, preset: str, resume: bool) -> Path:
    """Return root/name; `name` defaults to preset, date and time, or to the latest run to resume.

    Raises FileExistsError if a new run would use an existing run's folder, and FileNotFoundError if
    there is no run to resume.
    """
    if resume and not name:
        return _latest_run(root, preset)

    folder = Path(root) / (name or f"{preset}-{datetime.now():%Y%m%d-%H%M%S}")
    if resume and not has_run(folder):
        raise FileNotFoundError(f"{folder} cannot be resumed: it has no config.json")
    if has_run(folder) and not resume:
        raise FileExistsError(
            f"{folder} already holds a run; continue it with --resume, or choose another "
            "--config.run_name"
        )
    return folder


def can_resume(root: str, name: str) -> bool:
    """Return whether there is a run of this name. Raises ValueError for an empty name."""
    if not name:
        raise ValueError(
            "--auto_resume needs the name of the run that it resumes or starts: set "
            "--config.run_name"
        )
    return has_run(Path(root) / name)


def has_run(folder: Path) -> bool:
    """Return whether a folder holds a run: its config, or checkpoints, which have it too."""
    return (folder / "config.json").exists() or (folder / "checkpoints").exists()


def _latest_run(root: str, preset: str) -> Path:
    """Return the newest run folder of a preset."""
    folders = [file.parent for file in Path(root).glob(f"{escape(preset)}-*/config.json")]
    if not folders:
        raise FileNotFoundError(
            f"{root}/ holds no run of preset {preset!r} to resume; set --config.run_name"
        )
    return max(folders, key=lambda folder: folder.stat().st_mtime)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Create a run's folder and hold its lock, which is released when the process ends.

    A folder that is still empty at the end is removed. Raises FileExistsError if another process
    holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = file_lock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise FileExistsError(
            f"{folder} is in use: a run with this name is active; wait until it ends, or choose "
            "another --config.run_name"
        ) from error

    try:
        with cleaned_up(partial(_remove_if_empty, folder)):
            yield
    finally:
        _remove_if_empty(folder)
        lock.release()


def _remove_if_empty(folder: Path) -> None:
    """Remove a run's folder if it holds nothing but the lock."""
    if [entry.name for entry in folder.iterdir()] == ["lock"]:
        with suppress(OSError):  # Windows does not remove a file in use; then the folder stays
            (folder / "lock").unlink()
            folder.rmdir()


def resume_from(
    folder: Path, config: ConfigDict, digests: Mapping[str, str], allow_change: bool
) -> int | None:
    """Return the epoch of the checkpoint to resume from, or None; print what has changed.

    digests: {key of the config: digest of what it names}.

    Unless `allow_change`, raises ValueError if the run would compute something different from
    before; the message names each such key with both values. Raises FileNotFoundError if the folder
    has neither a good checkpoint nor config.json.
    """
    epoch, warnings = newest_good(folder / "checkpoints")
    if epoch is None:
        start = "its beginning: there is no checkpoint yet"
        before, digests_before = _read_start(folder)
    else:
        start = f"epoch {epoch}"
        meta = read_meta(folder / "checkpoints", epoch)
        before = meta["config"]
        digests_before = meta.get("digests")
        warnings = [*warnings, *missing_records(folder, "best" in meta["history"])]
    if digests_before is None:
        warnings.append(
            f"{folder} does not tell the digests of the files that it was computed with, so they "
            "are not compared"
        )
    for line in warnings:
        print(f"warning: {line}")

    before = with_defaults(with_todays_keys(before), base().to_dict())
    free, others = changed_keys(before, config.to_dict(), digests_before or {}, digests)
    if others and not allow_change:
        message = (
            f"{folder} was computed with another config; --allow_config_change resumes anyway:"
        )
        raise ValueError("\n".join([message, *others]))

    changes = [*free, *others]
    heading = f"resumed from {start}" + (", with another config:" if changes else "")
    print("\n".join([heading, *changes]))
    return epoch


def with_todays_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's config with today's keys of how pictures are sampled.

    In older runs, rollouts and evaluations had one size, sample.resolution, and evaluations took
    sample.eval_num_steps steps of first order.
    """
    sample = dict(config["sample"])
    if "resolution" not in sample:
        return dict(config)
    side = sample.pop("resolution")
    steps = sample.pop("eval_num_steps")
    size = {"width": side, "height": side}
    sizes = {**size, "buckets": []}

    evaluate = dict(config["evaluate"])
    own = {**size, "num_steps": steps, "solver": "euler", "tuned_share": 1.0}
    evaluate["sample"] = {**evaluate.get("sample", {}), **own}
    return {**config, "sample": {**sample, **sizes}, "evaluate": evaluate}


def with_defaults(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's config with the defaults of keys that did not exist when it started.

    A new key's default leaves what a run computes as it was.
    """
    filled = {**defaults, **config}
    for name, value in config.items():
        if isinstance(value, Mapping) and isinstance(defaults.get(name), Mapping):
            filled[name] = with_defaults(value, defaults[name])
    return filled


def _read_start(folder: Path) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Return the config of a run without a checkpoint, and the digests of what it reads.

    Runs of older versions have no digests.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} cannot be resumed: it has neither a good checkpoint nor config.json"
        )
    has_digests = (folder / DIGESTS).exists()
    digests = _read_json(folder / DIGESTS) if has_digests else None
    return _read_json(folder / "config.json"), digests


def write_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Keep the digests of what a run reads in its folder."""
    write_whole(folder / DIGESTS, json.dumps(digests, indent=2) + "\n")


def _read_json(file: Path) -> dict[str, Any]:
    """Read a record of a run. Raises ValueError if it is damaged."""
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); start a new run") from error


def missing_records(folder: Path, has_best: bool) -> list[str]:
    """Return a line that names the records which a run's folder lacks, if any.

    has_best: whether the run has written `best/`.
    """
    names = [*RECORDS, "best"] if has_best else RECORDS
    missing = [name for name in names if not (folder / name).exists()]
    if not missing:
        return []
    return [f"{folder} lacks {', '.join(missing)}; the run goes on without what was in there"]


def changed_keys(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    digests_before: Mapping[str, str],
    digests_now: Mapping[str, str],
) -> tuple[list[str], list[str]]:
    """Describe each key in which two configs differ, one line per key.

    The digests are of what keys name, or what all keys below them stand for. Returns the lines for
    what a resumed run may change (`FREE_KEYS`, and other places of the same content), and the lines
    for everything else. Values are compared in their JSON form.
    """
    old = _flatten(before)
    new = _flatten(json.loads(json.dumps(now)))
    same = [key for key in digests_before if digests_before[key] == digests_now.get(key)]

    # Keys with other values.
    free = []
    others = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key):
            continue
        is_same = any(key == other or key.startswith(f"{other}.") for other in same)
        lines = free if is_same or _matches(key, FREE_KEYS) else others
        lines.append(f"  config.{key}: was {old.get(key)!r}, is now {new.get(key)!r}")

    # Keys that stand for something else, whatever their values.
    for key in sorted(digests_before.keys() - same):
        is_free = _matches(key, FREE_CONTENTS)
        if is_free and key not in digests_now:  # no longer used
            continue
        lines = free if is_free else others
        was = digests_before[key][:16]
        is_now = digests_now.get(key, "unknown")[:16]
        what = repr(new[key]) if key in new else "what it names, here or on servers,"
        lines.append(
            f"  config.{key}: {what} has other content; its digest was {was}, is now {is_now}"
        )
    return free, others


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"a.b.c": value} of nested dictionaries."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
