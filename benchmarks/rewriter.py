"""Measure the prompt rewriter's language model: drawing a call of rewrites, and an update on it.

    python benchmarks/rewriter.py                     on a CPU beside PyTorch, 5 minutes on 2 cores
    python benchmarks/rewriter.py --part gpu          Qwen3-4B on one GPU, some minutes
    python benchmarks/rewriter.py --size tiny --out /tmp

Prints a table and writes benchmarks/results/rewriter_<part>_<machine>.json. Weights are random.

cpu   a Qwen3 of 71 M parameters in float32, 8 rows of 64 prompt and 64 new tokens, a LoRA of rank
      16 on all projections; the same weights and adapters in transformers and peft, eager. decode
      draws all new tokens at temperature 1 (theirs: `generate`). update is one optimizer step:
      replay, gradient, clipping, AdamW; ours also the moving average and the metrics. Neither side
      recomputes activations. The results are compared first, then the sides are timed in turns;
      medians of 15.
gpu   Qwen3-4B in bfloat16, 32 rows of 320 prompt and 384 new tokens, LoRA of rank 32,
      rematerialisation "full". decode: the bytes that have to be read (all weights for each token,
      and the cache so far) by the time, against the card's bandwidth. update: useful operations by
      the time, against the data sheet's rate.
"""

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

# JAX's share of the GPU's memory. The rest is for the CUDA libraries.
os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.93")

import jax
import numpy as np
from flux_suite import rates
from measure import RESULTS, alternate, print_table, save
from rewriter_case import SIZES, Case, Size, decode_bytes, update_flops

REPEATS = 15
THREADS = 2
# How many times as fast as eager PyTorch we should be; shares of the card's bandwidth and rate.
GOALS_CPU = {"decode": 0.8, "update": 1.0}
GOALS_GPU = {"decode": 0.5, "update": 0.4}
# Bytes per second, from the data sheets.
BANDWIDTHS = {
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA A100-SXM4-80GB": 2.04e12,
}
# Largest differences of the two sides on the same tokens: log-probs, and gradients relative to the
# largest one.
LIMITS = {"log_probs": 1e-3, "gradient": 1e-2, "loss": 1e-4}


def compare(case: Case, theirs: Any, batch: Any) -> dict[str, float]:
    """Return the differences of both sides on one batch. Raises ValueError if one is too large."""
    import torch

    from realgen_jax.nn.lora import lora_tensors

    # Log-probs.
    tokens = jax.tree.map(lambda leaf: leaf[0], batch.tokens)
    ours = case.log_probs(case.model, case.adapters, tokens)
    with torch.no_grad():
        other = theirs.log_probs(torch.from_numpy(np.array(tokens.ids)).long()).numpy()
    differences = {"log_probs": float(np.abs(ours - other).max())}

    # Loss and gradients.
    grads, metrics = case.gradient(case.model, case.state(), batch)
    loss = theirs.gradient(batch)
    differences["loss"] = abs(float(metrics["loss"]) - loss)
    table = case.model.family.table(case.size.model)
    worst = 0.0
    largest = 0.0
    for name, grad in lora_tensors(grads, table).items():
        worst = max(worst, float(np.abs(grad - theirs.factors[name].grad.numpy()).max()))
        largest = max(largest, float(np.abs(grad).max()))
    differences["gradient"] = worst / largest

    wrong = [name for name, value in differences.items() if not value <= LIMITS[name]]
    if wrong:
        raise ValueError(
            f"both sides should agree, but differ in {', '.join(wrong)}: {differences}"
        )
    return differences


def beside_torch(size: Size, repeats: int) -> dict[str, Any]:
    """Measure both sides in turns on the CPU."""
    import torch
    from torch_rewriter import Theirs

    torch.set_num_threads(THREADS)
    case = Case(size)
    theirs = Theirs(case)
    batch = case.batch(case.decode())
    results: dict[str, Any] = {"differences": compare(case, theirs, batch)}

    calls = {
        "decode": {"ours": case.decode, "eager": theirs.decode},
        "update": {"ours": case.trainer(batch), "eager": lambda: theirs.update(batch)},
    }
    drawn = size.rows * size.new
    for part, sides in calls.items():
        runs = alternate(sides, repeats)
        seconds = {side: statistics.median(times) for side, times in runs.items()}
        results[part] = {
            "seconds": seconds,
            "runs": runs,
            "new_tokens_per_second": {side: drawn / time for side, time in seconds.items()},
            "times_as_fast_as_eager": seconds["eager"] / seconds["ours"],
            "goal": GOALS_CPU[part],
        }
    return results


def on_gpu(size: Size, repeats: int) -> dict[str, Any]:
    """Measure our side against the limits of the card."""
    case = Case(size)
    batch = case.batch(case.decode())
    train = case.trainer(batch)
    runs = alternate({"decode": case.decode, "update": train}, repeats)
    seconds = {part: statistics.median(times) for part, times in runs.items()}

    # Reading the prompts is part of a call's time, but not of its bytes.
    rate = decode_bytes(size) / seconds["decode"]
    decode = {
        "seconds": seconds["decode"],
        "runs": runs["decode"],
        "new_tokens_per_second": size.rows * size.new / seconds["decode"],
        "terabytes_per_second": rate / 1e12,
        "goal": GOALS_GPU["decode"],
    }
    bandwidth = BANDWIDTHS.get(jax.devices()[0].device_kind)
    if bandwidth:
        decode["share_of_bandwidth"] = rate / bandwidth

    flops = update_flops(size)
    update = {
        "seconds": seconds["update"],
        "runs": runs["update"],
        "flops": flops,
        "goal": GOALS_GPU["update"],
        **rates(flops, seconds["update"]),
    }
    results = {"decode": decode, "update": update}
    stats = jax.devices()[0].memory_stats()
    if stats:
        results["peak_bytes"] = stats["peak_bytes_in_use"]
    return results


def show(part: str, results: dict[str, Any]) -> None:
    """Print a table of the two programs."""
    rows = []
    for name in ("decode", "update"):
        result = results[name]
        if part == "cpu":
            seconds = result["seconds"]
            times = f"{result['times_as_fast_as_eager']:.2f}"
            cells = [f"{seconds['ours']:.3f}", f"{seconds['eager']:.3f}", times]
        else:
            share = result.get("share_of_bandwidth", result.get("mfu"))
            rate = result.get("terabytes_per_second", result.get("tflops"))
            cells = [f"{result['seconds']:.3f}", f"{rate:.3g}", f"{share:.2f}" if share else "-"]
        rows.append([name, *cells, f"{result['goal']:g}"])
    header = {
        "cpu": ["program", "ours, s", "eager, s", "times as fast", "goal"],
        "gpu": ["program", "s", "TB/s or TFLOP/s", "share of the card's", "goal"],
    }
    print_table(header[part], rows)


PARTS = {"cpu": beside_torch, "gpu": on_gpu}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=list(PARTS), default="cpu")
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args()

    size = SIZES["tiny" if args.size == "tiny" else args.part]
    results = PARTS[args.part](size, args.repeats)
    show(args.part, results)
    name = f"rewriter_{args.part}"
    print(f"written to {save(name, {'size': args.size, **results}, args.out)}")


if __name__ == "__main__":
    main()
