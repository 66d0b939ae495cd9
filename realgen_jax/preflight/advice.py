"""Advice on a run: what the estimates leave out, and changes that make the run fit its devices."""

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

from ml_collections import ConfigDict

from realgen_jax.models.cost import F32
from realgen_jax.models.loading import rollout_sizes
from realgen_jax.nn.attention import LANES
from realgen_jax.preflight.figures import GIB, Accelerator, report_on, usable_bytes
from realgen_jax.preflight.report import Report, on_tpu, with_scores
from realgen_jax.training.programs import Recipe

# Pixels per side. A reward that learns stores pictures at no more than this size.
KEPT_SIDE = 518
# The fraction of a GPU's memory that JAX takes by default.
DEFAULT_FRACTION = 0.75

# {key of the config: value}
Change = dict[str, Any]
# Changes, each with the report of the changed run.
Tried = list[tuple[Change, Report]]


def candidates(report: Report) -> Iterator[Change]:
    """Yield changes that do not alter the result, except for rounding."""
    config = report.recipe.config
    layout = report.recipe.layout

    # Keep fewer activations.
    if config.pretrained.remat != "full":
        yield {"pretrained.remat": "full"}

    # Split the weights over more devices.
    for fsdp in range(2, report.devices + 1):
        divides = report.devices % (fsdp * config.mesh.tensor) == 0
        if divides and fsdp != config.mesh.fsdp:
            yield {"mesh.data": -1, "mesh.fsdp": fsdp}

    # Decode in bfloat16.
    if config.pretrained.vae_dtype == "float32":
        yield {"pretrained.vae_dtype": "bfloat16"}

    # Compute the same images in smaller calls.
    for parts in range(2, layout.images // report.parts + 1):
        if layout.images % parts == 0:
            yield from smaller_calls(report, parts)

    # Evaluate in smaller calls.
    if config.sample.test_batch_size > report.parts:
        yield {"sample.test_batch_size": report.parts}

    # Keep in host memory what a program needs for a moment.
    if not config.train.offload:
        yield {"train.offload": True}
    if config.train.lora and not config.pretrained.offload:
        yield {"pretrained.offload": True}


def smaller_calls(report: Report, parts: int) -> Iterator[Change]:
    """Yield changes that split each call into `parts`; each step still sees the same images."""
    layout = report.recipe.layout
    accumulation = report.recipe.config.train.gradient_accumulation_steps
    change = {
        "sample.train_batch_size": layout.images // parts,
        "sample.num_batches_per_epoch": layout.calls * parts,
        "train.gradient_accumulation_steps": accumulation * parts,
    }
    yield change
    if layout.branches > 1 and layout.branches % parts == 0:
        yield {**change, "sample.branches": layout.branches // parts}


def changes(
    report: Report, room: float, make_report: Callable[[ConfigDict, int], Report]
) -> tuple[Tried, Tried]:
    """Find changes after which the run needs at most `room` bytes per device.

    Returns those changes, and all single changes that were tried. If no single change is enough,
    the first pair of changes that is enough is returned.
    """

    def try_change(change: Change) -> Report | None:
        try:
            result = make_report(changed(report.recipe.config, change), report.devices)
        except ValueError:  # the sizes do not divide
            return None
        return result if report.work.flash else with_scores(result)

    tried = []
    for change in candidates(report):
        changed_report = try_change(change)
        if changed_report is not None:
            tried.append((change, changed_report))
    fitting = [(change, result) for change, result in tried if result.peak <= room]
    if fitting:
        return fitting, tried

    # Combine changes that help on their own and set different keys.
    helpful = [change for change, result in tried if result.peak < report.peak]
    for first, second in combinations(helpful, 2):
        if first.keys() & second.keys():
            continue
        change = {**first, **second}
        changed_report = try_change(change)
        if changed_report is not None and changed_report.peak <= room:
            return [(change, changed_report)], tried
    return [], tried


def changed(config: ConfigDict, change: Change) -> ConfigDict:
    """Return a copy of the config with the change applied."""
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict(change)
    return config.lock()


def advice(
    report: Report,
    accelerators: list[Accelerator],
    find_changes: Callable[[Report, float], tuple[Tried, Tried]],
) -> list[str]:
    """Return lines that explain the tables and, if an accelerator is too small, what would fit."""
    lines = [
        "Not included: rewards (they run while the next call samples), checkpoints and "
        "communication. Activations are an estimate: for GPUs, updates within 5 % of XLA's figure "
        "for H200s, sampling within 0.4 GiB, mostly above it; with a tensor split they need less. "
        "For TPUs, updates within 16 % of what is in use at once by XLA's compiler, which "
        "allocates up to 70 % more: ask it with --compile_for.",
        "fraction: the XLA_CLIENT_MEM_FRACTION to start with. Set it if it is above "
        f"{DEFAULT_FRACTION} (the share of a GPU that JAX takes by default) or if rewards share "
        "the GPU; they get the rest.",
        *attention_on_tpu(report),
        *learners(report.recipe),
        *endpoints(report.recipe),
    ]
    for estimate in accelerators:
        if not estimate.fits:
            lines += too_small(report, estimate.name, find_changes)
    return lines


def attention_on_tpu(report: Report) -> list[str]:
    """Say if the TPU's attention kernel does not take the model's sizes."""
    work = report.work
    if on_tpu(report).work.flash:
        return []

    rows = work.images / report.parts * work.backward_passes
    scores = rows * work.model.num_attention_heads * work.tokens**2 * F32
    return [
        f"On a TPU, attention is XLA's: the kernel takes multiples of {LANES} tokens and of "
        f"{LANES} channels per head, here {work.tokens} and {work.model.attention_head_dim}. XLA "
        f"writes the scores to memory in float32, {scores / GIB:.1f} GiB for one block; the "
        "figures for TPUs include that."
    ]


def too_small(
    report: Report, name: str, find_changes: Callable[[Report, float], tuple[Tried, Tried]]
) -> list[str]:
    """Return lines for an accelerator that is too small: memory needed, and changes that fit."""
    report = report_on(report, name)
    room = usable_bytes(name)
    needed = f"needs {report.peak / GIB:.1f} GiB, but {room / GIB:.1f} GiB are usable"
    lines = [f"\n{name}: {needed}"]

    fitting, tried = find_changes(report, room)
    for change, changed_report in fitting[:3]:
        lines.append(f"  fits with {describe(report, change, changed_report)}")
    if not fitting:
        best = min((result.peak for _, result in tried), default=report.peak)
        lines.append(
            f"  No change makes it fit; the best needs {best / GIB:.1f} GiB. {other_counts(report)}"
        )
    return lines


def learners(recipe: Recipe) -> list[str]:
    """Return a line for each reward that learns: steps per epoch and the size of its history."""
    lines = []
    pairs = recipe.layout.calls * recipe.layout.images
    sizes = rollout_sizes(recipe.config.sample).values()
    pixels = max(min(width, KEPT_SIDE) * min(height, KEPT_SIDE) for width, height in sizes)
    for name, settings in recipe.config.reward.adversarial.items():
        batch = settings.batch_size or pairs
        batches = -(-pairs // batch)
        steps = settings.max_passes * batches

        # A pair is two RGB pictures of one byte per channel.
        history = 2 * 3 * pixels * settings.history_size / GIB
        line = (
            f"{name} learns: up to {steps:,} steps per epoch, on {batch} + "
            f"{settings.history_batch_size} pairs each, over all processes. Its history takes up "
            f"to {history:.2g} GiB per process, in host memory and in every checkpoint."
        )
        if settings.skip_generator and settings.schedule == "every":
            line += (
                f" The generator rests in {settings.learn_epochs} of {settings.cycle} epochs, "
                f"while {name} learns."
            )
        elif settings.skip_generator:
            line += f" The generator rests in the epochs in which {name} learns."
        lines.append(line)
    return lines


def endpoints(recipe: Recipe) -> list[str]:
    """Return a line for each trained or watched reward that another program's model computes."""
    lines = []
    reward = recipe.config.reward
    pictures = recipe.layout.calls * recipe.layout.images
    for name in dict.fromkeys([*reward.fn, *reward.watched]):
        options = reward.options.get(name, {})
        if "url" in options and name not in reward.adversarial:
            lines.append(
                f"{name} asks {options['model']} at {options['url']} about each of an epoch's "
                f"{pictures:,} pictures. That program's memory and time are not counted; if it "
                "shares a GPU with the training, leave it its part of the memory."
            )
    return lines


def other_counts(report: Report) -> str:
    """Name the nearest numbers of devices that can split the weights, if this number cannot."""
    width = report.work.model.hidden_dim
    devices = report.devices
    if width % devices == 0 and devices > 1:
        return "Use more devices."

    # The nearest divisors of the width, one below and one above.
    divisors = [number for number in range(2, width + 1) if width % number == 0]
    below = max((number for number in divisors if number < devices), default=divisors[0])
    above = min(number for number in divisors if number > devices)
    numbers = " or ".join(str(number) for number in sorted({below, above}))

    split = f"split the weights' width of {width} (mesh.fsdp)"
    if devices == 1:
        return f"{numbers} devices could {split}."
    return f"{devices} devices cannot {split}; {numbers} can."


def describe(report: Report, change: Change, changed_report: Report) -> str:
    """Return a change as command-line options, and the size that it reduces most."""
    options = " ".join(f"--config.{key}={value}" for key, value in change.items())
    before = sizes(report)
    after = sizes(changed_report)
    name = max(before, key=lambda name: before[name] - after[name])
    return (
        f"{options}\n    ({name} {before[name] / GIB:.1f} -> {after[name] / GIB:.1f} GiB, "
        f"total {report.peak / GIB:.1f} -> {changed_report.peak / GIB:.1f} GiB)"
    )


def sizes(report: Report) -> dict[str, float]:
    """Return the bytes of everything in memory, by name."""
    sizes: dict[str, float] = dict(report.held)
    for phase, parts in report.phases.items():
        for name, size in parts.items():
            sizes[f"{name} ({phase})"] = size
    return sizes
