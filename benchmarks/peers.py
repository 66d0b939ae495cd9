"""Compare speed with PyTorch on a CPU: the same weights, the same work, the same two threads.

    python benchmarks/peers.py                  both sizes, about 15 minutes on 2 cores
    python benchmarks/peers.py --sizes tiny     the embedded model only, 5 minutes

Prints a table and writes benchmarks/results/peers_<machine>.json. The PyTorch side uses diffusers
and peft as RealGen's code does (torch_peer.py), eager and with torch.compile if that works. Our
side runs the programs of scripts/train.py. Everything is float32.

sampling   ODE sampling of one batch, decoded to uint8 pictures
rollout    one rollout call with its SDE window, means and log-probs, decoded
update     one optimizer step on that call: LoRA, GRPO-Guard with KL to the base model, AdamW, EMA
iteration  rollout, reward, advantages, update

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
from peers_case import SIZES, Ours, Theirs, advantages_of, make_case

THREADS = 2
# How many times as long eager PyTorch should take, by part: (tiny, mid).
GOALS = {
    "sampling": (2.0, 1.7),
    "rollout": (2.0, 1.7),
    "update": (1.5, 1.5),
    "iteration": (1.6, 1.6),
}
PEERS = ("eager", "compiled")


def compare(ours: Ours, theirs: Theirs, advantages: np.ndarray) -> dict[str, float]:
    """Return the largest differences between both sides, each part on the same inputs.

    Raises ValueError if one is too large.
    """
    # Sampling and rollout.
    images, record, _ = ours.rollout()
    their_images, their_record = theirs.rollout()
    differences = {
        "sampling_levels": level_difference(ours.sampling(), theirs.sampling()),
        "rollout_levels": level_difference(images, their_images),
        "mean": float(np.abs(record.mean - their_record["mean"].numpy()).max()),
        "logp": float(np.abs(record.logp - their_record["logp"].numpy()).max()),
    }

    # The update, on our trajectory. The policy loss cancels to nearly nothing at ratio 1, so its
    # difference is absolute.
    trajectory = {
        "x": record.latents[:-1],
        "x_next": record.latents[1:],
        "mean": record.mean,
        "logp": record.logp,
    }
    same = {name: torch.from_numpy(np.array(a)) for name, a in trajectory.items()}
    metrics = ours.update(record, advantages)
    their_metrics = theirs.update(same, advantages)
    for name, value in their_metrics.items():
        scale = 1.0 if name == "policy_loss" else value
        differences[name] = abs(float(metrics[name]) - value) / scale

    # The adapters after the update.
    adapters = ours.case.adapters(ours.state.trainable)
    their_adapters = torch_peer.peft.get_peft_model_state_dict(theirs.model.transformer)
    differences["adapters"] = 0.0
    for their_name, their_factor in their_adapters.items():
        name = their_name.removeprefix("base_model.model.").removesuffix(".weight")
        difference = float(np.abs(their_factor.numpy() - adapters[name]).max())
        differences["adapters"] = max(differences["adapters"], difference)

    limits = {
        "sampling_levels": 2,
        "rollout_levels": 2,
        "mean": 1e-3,
        "logp": 1e-3,
        "adapters": 1e-3,
    }
    wrong = []
    for name, value in differences.items():
        if not value <= limits.get(name, 1e-2):  # NaN is wrong, too
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"both sides should agree, but differ in {', '.join(wrong)}: {json.dumps(differences)}"
        )
    return differences


def level_difference(ours: Any, theirs: torch.Tensor) -> float:
    """Return the largest difference of two uint8 pictures."""
    return float(np.abs(np.asarray(ours).astype(int) - theirs.numpy().astype(int)).max())


def measure_size(name: str, repeats: int, peers: tuple[str, ...]) -> dict[str, Any]:
    """Compare the results of one size, then time both sides."""
    # Start each size with a full limit of recompilations. Beyond the limit, torch.compile would
    # silently run uncompiled code.
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True

    with tempfile.TemporaryDirectory() as folder:
        case = make_case(name, Path(folder))
        scores = np.random.default_rng(1).standard_normal(case.config.sample.train_batch_size)
        advantages = advantages_of(case, scores)

        # Compare.
        sides: dict[str, Any] = {"ours": Ours(case)}
        differences = {}
        failed = {}
        for peer in peers:
            try:
                theirs = Theirs(case, peer == "compiled")
                differences[peer] = compare(Ours(case), theirs, advantages)
                sides[peer] = theirs
            except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
                failed[peer] = str(error).splitlines()[0]

        # Time.
        seconds = {}
        for part in GOALS:
            calls: dict[str, Callable] = {}
            for side, programs in sides.items():
                calls[side] = getattr(programs, part)
                if part == "update":
                    record = programs.rollout()[1]
                    calls[side] = partial(programs.update, record, advantages)
            seconds[part] = alternate(calls, repeats)
            medians = {}
            for side, times in seconds[part].items():
                medians[side] = round(1000 * statistics.median(times))
            print(f"  {name} {part}: {medians} ms", flush=True)
        case.bridge.close()
    return {"differences": differences, "failed": failed, "seconds": seconds}


def table_rows(name: str, results: dict[str, Any]) -> list[list[str]]:
    """The rows of one size: milliseconds, and how many times as long the peers take."""
    table = []
    for part, (tiny_goal, mid_goal) in GOALS.items():
        medians = {}
        for side, times in results["seconds"][part].items():
            medians[side] = statistics.median(times)

        row = [name, part]
        for side in ("ours", *PEERS):
            row.append(f"{1000 * medians[side]:.0f}" if side in medians else "-")
        for peer in PEERS:
            row.append(f"{medians[peer] / medians['ours']:.2f}" if peer in medians else "-")
        goal = mid_goal if name == "mid" else tiny_goal
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
    parser.add_argument("--sizes", default="tiny,mid", help="tiny, mid or both, comma-separated")
    parser.add_argument(
        "--peers", default="eager,compiled", help="eager, compiled or both, comma-separated"
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each program")
    parser.add_argument("--no_save", action="store_true", help="only print the results")
    args = parser.parse_args()
    sizes = chosen(parser, "sizes", args.sizes, tuple(SIZES))
    peers = chosen(parser, "peers", args.peers, PEERS)

    # XLA starts a thread for every core that it sees when it first computes.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    torch.set_num_threads(THREADS)

    results = {}
    for name in sizes:
        results[name] = measure_size(name, args.repeats, peers)
    header = [
        "size",
        "part",
        "ours ms",
        "eager ms",
        "compiled ms",
        "x eager",
        "x compiled",
        "goal (eager)",
    ]
    rows = []
    for name, size_results in results.items():
        rows += table_rows(name, size_results)
    print_table(header, rows)
    if not args.no_save:
        print(f"written to {save('peers', results)}")


if __name__ == "__main__":
    main()
