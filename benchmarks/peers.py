"""Compare speed with PyTorch on a CPU: the same weights, the same work, the same two threads.

    python benchmarks/peers.py                               everything, about 30 minutes on 2 cores
    python benchmarks/peers.py --families flux --sizes tiny  the embedded model only, 5 minutes

Prints a table and writes benchmarks/results/peers_<family>_<machine>.json for each family. The
PyTorch side uses diffusers and peft (torch_peer.py) as RealGen's code does for FLUX, and
Adv-GRPO's, with classifier-free guidance, for SD3; eager, and with torch.compile if that works. Our
side runs the programs of scripts/train.py. Everything is float32.

sampling      ODE sampling of one batch, decoded to uint8 pictures
rollout       one rollout call with its SDE window, means and log-probs, decoded
update        one optimizer step on that call: LoRA, AdamW, EMA. FLUX: GRPO-Guard with KL to the
              base model. SD3: GRPO, with the gradient through both halves of the guidance
iteration     rollout, reward, advantages, update
update_bound  SD3: the update with a gradient through the prompt's half only. PyTorch detaches the
              other half, as RealGen's code does

The results are compared first, then the sides are timed in turns (ours, eager, compiled, ours,
...). Medians of 15: with 7, a slow minute of the machine changes a ratio by a tenth. The weights
change from update to update, which does not affect the time of either side.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_peer
from measure import alternate, print_table, save
from peers_case import Case, Ours, Theirs, advantages_of, make_case
from peers_sizes import SIZES

from realgen_jax.models.guidance import Guided

THREADS = 2
# How many times as long eager PyTorch should take, by part: (tiny, mid).
GOALS = {
    "sampling": (2.0, 1.7),
    "rollout": (2.0, 1.7),
    "update": (1.5, 1.5),
    "iteration": (1.6, 1.6),
    "update_bound": (1.5, 1.5),
}
PEERS = ("eager", "compiled")


def compare(case: Case, theirs: Theirs, advantages: np.ndarray) -> dict[str, float]:
    """Return the largest differences between both sides, each part on the same inputs.

    Raises ValueError if one is too large.
    """
    # Sampling and rollout.
    ours = Ours(case)
    images, record, _ = ours.rollout()
    their_images, their_record = theirs.rollout()
    their_mean = torch_peer.to_tokens(theirs.model, their_record["mean"]).numpy()
    differences = {
        "sampling levels": level_difference(ours.sampling(), theirs.sampling()),
        "rollout levels": level_difference(images, their_images),
        "rollout mean": float(np.abs(record.mean - their_mean).max()),
        "rollout logp": float(np.abs(record.logp - their_record["logp"].numpy()).max()),
    }

    # The updates, each from the same weights and on our trajectory.
    for part in parts_of(case):
        if part.startswith("update"):
            for name, value in compare_update(case, theirs, part, record, advantages).items():
                differences[f"{part} {name}"] = value

    limits = {
        "levels": 2,
        "mean": 1e-3,
        "logp": 1e-3,
        # The first step of AdamW is as long as the learning rate, whatever the gradient's scale.
        "adapters": case.config.train.learning_rate,
    }
    wrong = []
    for name, value in differences.items():
        if not value <= limits.get(name.split()[-1], 1e-2):  # NaN is wrong, too
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"both sides should agree, but differ in {', '.join(wrong)}: {json.dumps(differences)}"
        )
    return differences


def compare_update(
    case: Case, theirs: Theirs, part: str, record: Any, advantages: np.ndarray
) -> dict[str, float]:
    """Return the differences of one update's metrics and of the adapters after it."""
    same = {
        "x": theirs.from_tokens(record.latents[:-1]),
        "x_next": theirs.from_tokens(record.latents[1:]),
        "mean": theirs.from_tokens(record.mean),
        "logp": torch.from_numpy(np.array(record.logp)),
    }
    ours = Ours(case)
    theirs.restart()
    metrics = getattr(ours, part)(record, advantages)
    their_metrics = getattr(theirs, part)(same, advantages)

    # The policy loss cancels to nearly nothing at ratio 1, so its difference is absolute.
    differences = {}
    for name, value in their_metrics.items():
        scale = 1.0 if name == "policy_loss" else value
        differences[name] = abs(float(metrics[name]) - value) / scale

    adapters = case.adapters(ours.state.trainable)
    differences["adapters"] = 0.0
    for name, their_factor in torch_peer.get_adapters(theirs.model).items():
        difference = float(np.abs(their_factor - adapters[name]).max())
        differences["adapters"] = max(differences["adapters"], difference)
    return differences


def parts_of(case: Case) -> list[str]:
    """The parts that are measured."""
    guided = isinstance(case.cond, Guided)
    return [part for part in GOALS if guided or part != "update_bound"]


def level_difference(ours: Any, theirs: torch.Tensor) -> float:
    """Return the largest difference of two uint8 pictures."""
    return float(np.abs(np.asarray(ours).astype(int) - theirs.numpy().astype(int)).max())


def measure(family: str, size: str, repeats: int, peers: tuple[str, ...]) -> dict[str, Any]:
    """Compare the results of one family and size, then time both sides."""
    # Start with a full limit of recompilations. Beyond the limit, torch.compile would silently run
    # uncompiled code.
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True

    with tempfile.TemporaryDirectory() as folder:
        case = make_case(family, size, Path(folder))
        scores = np.random.default_rng(1).standard_normal(case.config.sample.train_batch_size)
        advantages = advantages_of(case, scores)

        # Compare.
        sides: dict[str, Any] = {"ours": Ours(case)}
        differences = {}
        failed = {}
        for peer in peers:
            try:
                theirs = Theirs(case, peer == "compiled")
                differences[peer] = compare(case, theirs, advantages)
                sides[peer] = theirs
            except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
                failed[peer] = str(error).splitlines()[0]

        # Time.
        seconds = {}
        for part in parts_of(case):
            calls: dict[str, Callable] = {}
            for side, programs in sides.items():
                calls[side] = getattr(programs, part)
                if part.startswith("update"):
                    record = programs.rollout()[1]
                    calls[side] = partial(calls[side], record, advantages)
            seconds[part] = alternate(calls, repeats)
            medians = {}
            for side, times in seconds[part].items():
                medians[side] = round(1000 * statistics.median(times))
            print(f"  {family} {size} {part}: {medians} ms", flush=True)
        case.bridge.close()
    return {"differences": differences, "failed": failed, "seconds": seconds}


def table_rows(family: str, size: str, results: dict[str, Any]) -> list[list[str]]:
    """The rows of one family and size: milliseconds, and how many times as long the peers take."""
    table = []
    for part, seconds in results["seconds"].items():
        medians = {}
        for side, times in seconds.items():
            medians[side] = statistics.median(times)

        row = [family, size, part]
        for side in ("ours", *PEERS):
            row.append(f"{1000 * medians[side]:.0f}" if side in medians else "-")
        for peer in PEERS:
            row.append(f"{medians[peer] / medians['ours']:.2f}" if peer in medians else "-")
        tiny_goal, mid_goal = GOALS[part]
        goal = mid_goal if size == "mid" else tiny_goal
        row.append(f"{goal:.1f}")
        table.append(row)
    return table


def chosen(parser: argparse.ArgumentParser, name: str, text: str, known: tuple) -> tuple[str, ...]:
    """Split a comma-separated option, and stop if it has an unknown name."""
    names = tuple(filter(None, text.split(",")))
    unknown = set(names) - set(known)
    if unknown:
        parser.error(
            f"--{name} has {', '.join(sorted(unknown))}; expected some of {', '.join(known)}"
        )
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", default="flux,sd3", help="flux, sd3 or both, comma-separated")
    parser.add_argument("--sizes", default="tiny,mid", help="tiny, mid or both, comma-separated")
    parser.add_argument(
        "--peers", default="eager,compiled", help="eager, compiled or both, comma-separated"
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each program")
    parser.add_argument("--no_save", action="store_true", help="only print the results")
    args = parser.parse_args()
    families = chosen(parser, "families", args.families, tuple(SIZES))
    sizes = chosen(parser, "sizes", args.sizes, tuple(SIZES["flux"]))
    peers = chosen(parser, "peers", args.peers, PEERS)

    # XLA starts a thread for every core that it sees when it first computes.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    torch.set_num_threads(THREADS)

    results: dict[str, dict[str, Any]] = {}
    rows = []
    for family in families:
        results[family] = {}
        for size in sizes:
            results[family][size] = measure(family, size, args.repeats, peers)
            rows += table_rows(family, size, results[family][size])
    header = [
        "family",
        "size",
        "part",
        "ours ms",
        "eager ms",
        "compiled ms",
        "x eager",
        "x compiled",
        "goal (eager)",
    ]
    print_table(header, rows)
    if not args.no_save:
        for family in families:
            print(f"written to {save(f'peers_{family}', results[family])}")


if __name__ == "__main__":
    main()
