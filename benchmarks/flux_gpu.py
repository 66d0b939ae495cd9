"""Measure sampling, rollout and update of RealGen's recipe for FLUX.1-dev on one GPU.

    python benchmarks/flux_gpu.py                           all parts, over 10 minutes
    python benchmarks/flux_gpu.py --only sampling           one part
    python benchmarks/flux_gpu.py --only "update dots 3"    one program of a part
    python benchmarks/flux_gpu.py --size tiny --out /tmp    a toy on a laptop, half a minute

Prints a table and writes benchmarks/results/flux_gpu_<machine>.json. The weights are random, at
full size (24 GB) in bfloat16; pictures of 1024x1024, 512 text tokens, 28 steps. The results of each
part are saved before the next one starts. If a part fails, the reason is saved.

torch      (if diffusers is installed) a forward pass of the same transformer, eager and compiled.
product    a large bfloat16 matrix product: the rate that this card reaches.
sampling   seconds per image without and with decoding (one picture at a time, float32 autoencoder).
rollout    one slot of 3 branches with the window at its mean position: LoRA of rank 64, log-probs,
           no decoding.
update     one optimizer step on one such call (7 window steps, KL to the base model), for each
           rematerialisation policy.
iteration  RealGen's 504 images on 7 GPUs, from the parts. It does not include rewards, the sum of
           gradients over GPUs and checkpoints.

MFU is the rate of useful operations over the data sheet's rate for dense bfloat16. Useful
operations come from realgen_jax/models/cost.py and exclude what is computed a second time. "of
product" is the rate over that of the measured product.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

# JAX's share of the GPU's memory. The rest is for the CUDA libraries.
os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.93")

import jax
import jax.numpy as jnp
import workload
from flux_suite import GPUS, IMAGES, SUITES, Suite, rates
from flux_table import show
from measure import RESULTS, median_seconds, save
from workload import Program, Size, decoding, fill, filled, rollouts, sampling, updating

from realgen_jax.models.model import Model
from realgen_jax.nn.stack import REMAT_POLICIES

PROGRAM_PARTS = ("sampling", "rollout", "update")
PARTS = ("torch", "product", *PROGRAM_PARTS)


def device_memory(key: str) -> int | None:
    """Return bytes_limit or peak_bytes_in_use (of the process so far); None on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return stats.get(key) if stats else None


def planned_bytes(compiled: Any) -> int:
    """Return the bytes that XLA plans to hold at once, including the arguments."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call and its result."""
    begin = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - begin, result


def compiled_cold(
    program: Program, arguments: tuple, again: bool
) -> tuple[dict[str, Any], Callable]:
    """Compile a program without a cache; returns seconds and memory, and the compiled call.

    With `again`, it is compiled once more, from the persistent cache.
    """
    lower_seconds, lowered = timed(lambda: program.call.lower(*arguments))
    compile_seconds, compiled = timed(lowered.compile)
    results = {
        "lower_seconds": lower_seconds,
        "compile_seconds": compile_seconds,
        "planned_bytes": planned_bytes(compiled),
    }
    if again:
        jax.clear_caches()
        lowered = program.call.lower(*arguments)
        results["cached_compile_seconds"], _ = timed(lowered.compile)
    return results, compiled


def run(program: Program, weights: Model, suite: Suite, again: bool = False) -> dict[str, Any]:
    """Compile and time one program: the median of three calls, or of two slow ones.

    There is no call before the timed ones. Raises MemoryError if XLA's plan does not fit, JAX's
    error if more is needed than planned, and FloatingPointError if a result is not finite.
    """
    # Compile.
    arguments = filled(program, weights, seed=1)
    results, compiled = compiled_cold(program, arguments, again)
    limit = device_memory("bytes_limit")
    planned = results["planned_bytes"]
    if limit and planned > limit:
        raise MemoryError(f"XLA plans {planned / 1e9:.0f} GB, JAX has {limit / 1e9:.0f} GB")

    # Time.
    runs: list[float] = []
    while len(runs) < 2 or (len(runs) < 3 and sum(runs) < suite.enough):
        seconds, result = timed(partial(compiled, *arguments))
        runs.append(seconds)
        arguments = program.after(arguments, result)

    # The metrics of an update include the norms of everything that it changed.
    checked = result[1] if program.feeds_back else result
    if not all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(checked)):
        raise FloatingPointError("a result is not finite, so its time is meaningless")

    results["seconds"] = statistics.median(runs)
    results["runs"] = runs
    results["flops"] = program.flops
    peak = device_memory("peak_bytes_in_use")
    if peak:
        results["peak_bytes_so_far"] = peak
    results.update(rates(program.flops, results["seconds"]))
    return results


def attempt(label: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the results, or {"failed": reason}.

    Running out of memory is a result. Other errors also print their traceback.
    """
    begin = time.perf_counter()
    try:
        results = measure()
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            results = {"failed": f"out of memory: {reason}"}
        else:
            traceback.print_exc()
            results = {"failed": f"{type(error).__name__}: {reason}"}
    seconds = time.perf_counter() - begin
    print(f"{label}: {results.get('failed', 'measured')} ({seconds:.0f} s)", flush=True)
    return results


def product(suite: Suite) -> dict[str, Any]:
    """Time a matrix product, as one of 20 in a row that each use the last one's result."""
    n = suite.product
    count = 20
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (n, n), jnp.bfloat16) / n**0.5
    chain = jax.jit(lambda x, w: jax.lax.fori_loop(0, count, lambda _, x: x @ w, x))
    seconds = median_seconds(lambda: chain(x, w), 5) / count
    return {"side": n, "seconds": seconds, **rates(2.0 * n**3, seconds)}


def programs(suite: Suite) -> dict[str, dict[str, tuple[Callable[[], Program], bool]]]:
    """Return {part: {label: (how to make the program, whether to compile it again)}}.

    The first program of each part is compiled again, from the cache.
    """
    size = suite.size

    sampling_programs: dict[str, Any] = {}
    for n in suite.batches:
        sampling_programs[str(n)] = (partial(sampling, size, n), n == suite.batches[0])
    sampling_programs["decode"] = (partial(decoding, size, 1), False)

    rollout_programs = {str(size.branches): (partial(rollouts, size, 1), True)}

    update_programs: dict[str, Any] = {}
    for policy in REMAT_POLICIES:
        for n in suite.branches:
            first = not update_programs
            make = partial(updating, update_size(suite, policy, n), 1)
            update_programs[f"{policy} {n}"] = (make, first)
    return {"sampling": sampling_programs, "rollout": rollout_programs, "update": update_programs}


def update_size(suite: Suite, policy: str, branches: int) -> Size:
    """Return the size with another rematerialisation policy and microbatch."""
    model = replace(suite.size.model, remat=policy)
    return replace(suite.size, model=model, branches=branches)


def update_needs(suite: Suite, label: str) -> float:
    """Return the bytes that the update with this label needs, by formula."""
    policy, n = label.split()
    size = update_size(suite, policy, int(n))
    params = jax.tree.leaves(workload.weights(size).params)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in params)
    work = size.work(1)
    return held + work.formulas.update_bytes(work, int(n))


def measure_part(
    suite: Suite,
    part: str,
    only: set[str],
    weights: Callable[[], Model],
    keep: Callable[[str, dict], None],
) -> None:
    """Measure the programs of a part one by one, and pass the results of each to `keep`.

    only: labels of programs.
    """
    limit = device_memory("bytes_limit")
    for label, (make, again) in programs(suite)[part].items():
        if label not in only:
            continue

        # Do not even compile an update that needs far more than the memory.
        if part == "update" and limit:
            needs = update_needs(suite, label)
            if needs > 1.2 * limit:
                sizes = f"{needs / 1e9:.0f} GB by formula, JAX has {limit / 1e9:.0f} GB"
                keep(label, {"failed": f"out of memory: {sizes}; not tried"})
                continue

        def measure(label=label, make=make, again=again) -> dict[str, Any]:
            return run(make(), weights(), suite, again)

        keep(label, attempt(f"{part} {label}", measure))


def torch_part(suite: Suite) -> dict[str, Any]:
    """Measure PyTorch in a process of its own, before JAX takes the GPU's memory."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("diffusers") is None:
        return {"skipped": "torch or diffusers is not installed"}
    size = suite.size
    model = asdict(size.model)
    for key in ("dtype", "param_dtype", "remat"):
        del model[key]
    sizes = {"tokens": size.side**2, "text": size.text, "model": model}
    program = [sys.executable, str(Path(__file__).parent / "torch_flux.py"), json.dumps(sizes)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"torch_flux.py failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def iteration(suite: Suite, results: dict[str, Any]) -> dict[str, Any]:
    """Add up RealGen's iteration from the parts, with the fastest rematerialisation policy.

    Raises ValueError if a part failed.
    """
    # The fastest update of the rollout's batch.
    branches = suite.size.branches
    updates = {}
    for label, update in results["update"].items():
        policy, n = label.split()
        if n == str(branches) and "seconds" in update:
            updates[policy] = update
    if not updates:
        raise ValueError(f"no update with {branches} images fits, so there is no iteration")
    fastest = min(updates, key=lambda policy: updates[policy]["seconds"])

    # How often each program runs on one GPU.
    calls = IMAGES / (GPUS * branches)
    programs = {
        "rollout": (calls, results["rollout"][str(branches)]),
        "decode": (calls * branches, results["sampling"]["decode"]),
        "update": (calls, updates[fastest]),
    }
    failed = [name for name, (_, program) in programs.items() if "failed" in program]
    if failed:
        raise ValueError(f"{' and '.join(failed)} failed, so there is no iteration")

    parts = {name: times * program["seconds"] for name, (times, program) in programs.items()}
    flops = sum(times * program["flops"] for times, program in programs.values())
    seconds = sum(parts.values())
    return {"remat": fastest, "parts": parts, "seconds": seconds, **rates(flops, seconds)}


def chosen(suite: Suite, only: str, refuse: Callable[[str], None]) -> dict[str, set[str]]:
    """Return {part: labels of its programs} from `--only`; `refuse` takes what is wrong with it."""
    labels = programs(suite)
    parts: dict[str, set[str]] = {}
    for name in only.split(","):
        part, _, label = name.strip().partition(" ")
        if part not in PARTS:
            refuse(f"--only has {name!r}; expected some of {', '.join(PARTS)}")
        if label and label not in labels.get(part, {}):
            known = ", ".join(labels.get(part, ())) or "no programs to choose from"
            refuse(f"--only has {name!r}; {part} has {known}")
        parts.setdefault(part, set()).update([label] if label else labels.get(part, ()))
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SUITES), default="full")
    parser.add_argument(
        "--only",
        default=",".join(PARTS),
        help=f"some of {', '.join(PARTS)}, comma-separated; or programs, such as 'update dots 3'",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args()
    suite = SUITES[args.size]
    parts = chosen(suite, args.only, parser.error)
    results: dict[str, Any] = {"size": args.size}

    # The weights are made once, when a program first needs them.
    weights = cache(lambda: jax.block_until_ready(fill(workload.weights(suite.size))))

    def keep(part: str, label: str, program: dict[str, Any]) -> None:
        results.setdefault(part, {})[label] = program
        save("flux_gpu", results, args.out)

    if "torch" in parts:
        results["torch"] = attempt("torch", partial(torch_part, suite))
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        if "product" in parts:
            results["product"] = attempt("product", partial(product, suite))
        for part in PROGRAM_PARTS:
            if part in parts:
                measure_part(suite, part, parts[part], weights, partial(keep, part))
    if "decode" in results.get("sampling", {}) and {"rollout", "update"} <= set(results):
        results["iteration"] = attempt("iteration", partial(iteration, suite, results))
    show(suite, results)
    print(f"written to {save('flux_gpu', results, args.out)}")


if __name__ == "__main__":
    main()
