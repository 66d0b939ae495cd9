"""What to change in a run that does not fit its devices: changes are tried with the formulas, what fits stays."""

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

from ml_collections import ConfigDict

Change = dict[str, Any]  # {key of the config: value}


def candidates(report: Any) -> Iterator[Change]:
    """Changes that leave the result as it is (but for rounding), then the same images in smaller calls."""
    config, devices, layout = report.recipe.config, report.devices, report.recipe.layout
    if config.pretrained.remat != "full":
        yield {"pretrained.remat": "full"}
    for fsdp in range(2, devices + 1):
        if devices % (fsdp * config.mesh.tensor) == 0 and fsdp != config.mesh.fsdp:
            yield {"mesh.data": -1, "mesh.fsdp": fsdp}
    if config.pretrained.vae_dtype == "float32":
        yield {"pretrained.vae_dtype": "bfloat16"}
    for part in range(2, layout.images // report.parts + 1):
        if layout.images % part == 0:
            calls = {"sample.num_batches_per_epoch": layout.calls * part}
            steps = {
                "train.gradient_accumulation_steps": config.train.gradient_accumulation_steps * part
            }
            yield {"sample.train_batch_size": layout.images // part} | calls | steps
            if layout.branches > 1 and layout.branches % part == 0:
                fewer = {"sample.branches": layout.branches // part}
                yield {"sample.train_batch_size": layout.images // part} | fewer | calls | steps


def changed(config: ConfigDict, change: Change) -> ConfigDict:
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict(change)
    return config.lock()


def changes(
    report: Any, room: float, make_report: Callable[[ConfigDict, int], Any]
) -> tuple[list, list]:
    """([(change, its report), ...] that need at most `room` bytes a device, and all single changes that were tried).

    Where no single change fits, the first pair that does.
    """
    config, tried = report.recipe.config, []
    for change in candidates(report):
        try:
            tried.append((change, make_report(changed(config, change), report.devices)))
        except ValueError:  # the sizes do not fall together
            continue
    if fitting := [(change, one) for change, one in tried if one.peak <= room]:
        return fitting, tried
    singles = [change for change, one in tried if one.peak < report.peak]
    pairs = [a | b for a, b in combinations(singles, 2) if not a.keys() & b.keys()]
    for change in pairs:
        try:
            one = make_report(changed(config, change), report.devices)
        except ValueError:
            continue
        if one.peak <= room:
            return [(change, one)], tried
    return [], tried
