"""FLUX.1-dev on one GPU: sampling, a rollout and an update of RealGen's recipe, and the iteration they add up to.

    python benchmarks/flux_gpu.py          8 minutes; prints a table, writes benchmarks/results/flux_gpu_<machine>.json
    python benchmarks/flux_gpu.py --only sampling
    python benchmarks/flux_gpu.py --size tiny --out /tmp         the same program on a laptop, in half a minute

Random bfloat16 weights at full size (24 GB), 1024x1024, 512 text tokens, 28 steps. Each part's figures are saved
before the next one starts; a part that fails leaves its reason.

torch      (with diffusers) the same transformer's forward there, eager and compiled.
product    a large bfloat16 product: the rate that this very card reaches.
sampling   seconds an image without decoding, and with it (pictures decoded one at a time, float32 autoencoder).
rollout    one slot of 3 branches with the window at its mean place: LoRA r64, log-probs, no decoding.
update     one optimizer step on one such call (7 window steps, KL to the base model), by rematerialisation policy.
iteration  RealGen's 504 images on 7 GPUs from the parts; without rewards, gradient sums between GPUs, checkpoints.

MFU: useful operations (flux/cost.py; nothing for what is computed a second time) over the data sheet's rate for dense
bfloat16. "of product": over the measured product's rate instead.
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
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "XLA_CLIENT_MEM_FRACTION", "0.93"
)  # of the GPU for JAX; the rest is the CUDA libraries'

import jax
import jax.numpy as jnp
import workload
from measure import RESULTS, machine, median_seconds, print_table, save
from workload import Program, Size, decoding, fill, rollouts, sampling, tiny, updating

from realgen_jax.models.flux import cost
from realgen_jax.nn.stack import REMAT_POLICIES

# Dense bfloat16, operations a second, by data sheet
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
}
# Goals on one H200: seconds an image by batch, and the update's MFU
GOAL_SECONDS, GOAL_MFU = {1: 3.6, 4: 3.3}, 0.5
# RealGen's iteration, as configs/flux_grpo.py's flux_dev_8xh200 has it
IMAGES, GPUS = 504, 7
PARTS = "torch", "product", "sampling", "rollout", "update"


@dataclass(frozen=True)
class Suite:
    size: Size
    batches: tuple[int, ...]  # of sampling
    branches: tuple[int, ...]  # of an update's microbatch
    product: int  # side of the matrices
    enough: float = 30.0  # seconds of measuring after which two runs do


SUITES = {
    "full": Suite(Size(), (1, 3, 4), (1, 3), 8192),
    "tiny": Suite(tiny(), (1, 4), (3,), 128),
}


def peak_rate() -> float | None:
    return PEAKS.get(jax.devices()[0].device_kind)


def device_memory(key: str) -> int | None:
    """bytes_limit or peak_bytes_in_use (of the whole process so far); None on a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get(key)


def planned_bytes(compiled: Any) -> int:
    """What XLA's plan holds at once, arguments included."""
    m = compiled.memory_analysis()
    return (
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.temp_size_in_bytes
        + m.generated_code_size_in_bytes
    )


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - begin, result


def compiled_cold(
    program: Program, arguments: tuple, again: bool
) -> tuple[dict[str, Any], Callable]:
    """The compiled call, its seconds and its memory; `again`: once more, out of the persistent cache."""
    lower, lowered = timed(lambda: program.call.lower(*arguments))
    compile, compiled = timed(lowered.compile)
    found = {
        "lower_seconds": lower,
        "compile_seconds": compile,
        "planned_bytes": planned_bytes(compiled),
    }
    if again:
        jax.clear_caches()
        lowered = program.call.lower(*arguments)
        found["cached_compile_seconds"], _ = timed(lowered.compile)
    return found, compiled


def run(program: Program, params: Any, suite: Suite, again: bool = False) -> dict[str, Any]:
    """Compile and time one program: its median of three calls, of two where these take long; no call comes before them.

    Raises MemoryError where XLA's plan does not fit, and what jax raises where the plan was too small.
    """
    arguments = (params, *fill(program.arguments[1:], seed=1))
    found, compiled = compiled_cold(program, arguments, again)
    limit = device_memory("bytes_limit")
    if limit and found["planned_bytes"] > limit:
        raise MemoryError(
            f"XLA plans {found['planned_bytes'] / 1e9:.0f} GB, JAX has {limit / 1e9:.0f} GB"
        )
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 3 and sum(seconds) < suite.enough):
        once, result = timed(partial(compiled, *arguments))
        seconds.append(once)
        arguments = program.after(arguments, result)
    told = (
        result[1] if program.feeds_back else result
    )  # an update's metrics hold the norms of all that it changed
    if not all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(told)):
        raise FloatingPointError(
            "a result is not finite; how long such numbers take says nothing, look at the weights"
        )
    found |= {"seconds": statistics.median(seconds), "runs": seconds, "flops": program.flops}
    if peak := device_memory("peak_bytes_in_use"):
        found["peak_bytes_so_far"] = peak
    return found | rates(found["flops"], found["seconds"])


def rates(flops: float, seconds: float) -> dict[str, float]:
    found = {"tflops": flops / seconds / 1e12}
    return found | ({"mfu": flops / seconds / peak_rate()} if peak_rate() else {})


def attempt(label: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was found, or {"failed": why}. Memory that runs out is a finding; all else also prints its traceback."""
    begin = time.perf_counter()
    try:
        found = measure()
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            found = {"failed": f"out of memory: {reason}"}
        else:
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {reason}"}
    print(
        f"{label}: {found.get('failed', 'measured')} ({time.perf_counter() - begin:.0f} s)",
        flush=True,
    )
    return found


def product(suite: Suite) -> dict[str, Any]:
    """One of 20 products in a row, each with the result of the one before."""
    n, count = suite.product, 20
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (n, n), jnp.bfloat16) / n**0.5
    chain = jax.jit(lambda x, w: jax.lax.fori_loop(0, count, lambda _, x: x @ w, x))
    seconds = median_seconds(lambda: chain(x, w), 5) / count
    return {"side": n, "seconds": seconds, **rates(2.0 * n**3, seconds)}


def programs(suite: Suite) -> dict[str, dict[str, tuple[Callable[[], Program], bool]]]:
    """{part: {label: (how to make the program, whether to compile it once more from the cache)}}, in their order."""
    size = suite.size
    found: dict[str, dict] = {"sampling": {}, "rollout": {}, "update": {}}
    for n in suite.batches:
        found["sampling"][str(n)] = partial(sampling, size, n), n == suite.batches[0]
    found["sampling"]["decode"] = partial(decoding, size, 1), False
    found["rollout"][str(size.branches)] = partial(rollouts, size, 1), True
    for policy in REMAT_POLICIES:
        for n in suite.branches:
            one = replace(size, model=replace(size.model, remat=policy), branches=n)
            found["update"][f"{policy} {n}"] = partial(updating, one, 1), not found["update"]
    return found


def update_needs(suite: Suite, label: str) -> float:
    """Bytes by formula of the update with this label: what lies far beyond the memory is not compiled."""
    policy, n = label.split()
    size = replace(suite.size, model=replace(suite.size.model, remat=policy), branches=int(n))
    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(workload.weights(size)))
    return held + cost.update_bytes(size.work(1), int(n))


def measure_part(
    suite: Suite, part: str, params: Callable[[], Any], keep: Callable[[str, dict], None]
) -> None:
    """Measure a part's programs one by one and hand each one's figures on."""
    limit = device_memory("bytes_limit")
    for label, (make, again) in programs(suite)[part].items():
        if part == "update" and limit and (needs := update_needs(suite, label)) > 1.2 * limit:
            reason = f"out of memory: {needs / 1e9:.0f} GB by formula, JAX has {limit / 1e9:.0f} GB; not tried"
            keep(label, {"failed": reason})
            continue

        def measure(label=label, make=make, again=again) -> dict[str, Any]:
            program = make()
            own = fill(program.arguments[0]) if label == "decode" else params()
            return run(program, own, suite, again)

        keep(label, attempt(f"{part} {label}", measure))


def torch_part(suite: Suite) -> dict[str, Any]:
    """In a process of its own, before JAX takes the GPU's memory."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("diffusers") is None:
        return {"skipped": "torch or diffusers is not installed"}
    size = suite.size
    model = {
        k: v for k, v in asdict(size.model).items() if k not in ("dtype", "param_dtype", "remat")
    }
    sizes = {"tokens": size.side**2, "text": size.text, "model": model}
    program = [sys.executable, str(Path(__file__).parent / "torch_flux.py"), json.dumps(sizes)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"torch_flux.py failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def iteration(suite: Suite, found: dict[str, Any]) -> dict[str, Any]:
    """RealGen's iteration out of the parts, with the policy that is fastest for the rollout's batch."""
    branches = suite.size.branches
    updates = {label: one for label, one in found["update"].items() if "seconds" in one}
    updates = {
        label.split()[0]: one for label, one in updates.items() if label.split()[1] == str(branches)
    }
    if not updates:
        raise ValueError(f"no update with {branches} images fits; expected one to reckon with")
    policy = min(updates, key=lambda name: updates[name]["seconds"])
    calls = IMAGES / (GPUS * branches)
    one = {
        "rollout": (calls, found["rollout"][str(branches)]),
        "decode": (calls * branches, found["sampling"]["decode"]),
        "update": (calls, updates[policy]),
    }
    if failed := [name for name, (_, of) in one.items() if "failed" in of]:
        raise ValueError(f"{' and '.join(failed)} failed; expected figures of all parts to add up")
    parts = {name: times * of["seconds"] for name, (times, of) in one.items()}
    flops = sum(times * of["flops"] for times, of in one.values())
    return {
        "remat": policy,
        "parts": parts,
        "seconds": sum(parts.values()),
        **rates(flops, sum(parts.values())),
    }


def row(label: str, found: dict[str, Any], images: int, goal: str, best: float | None) -> list[str]:
    """A line of the table; images share the seconds."""
    gb = [
        f"{found[key] / 1e9:.1f}" if key in found else ""
        for key in ("planned_bytes", "peak_bytes_so_far")
    ]
    compile = [
        f"{found[key]:.1f}" if key in found else ""
        for key in ("compile_seconds", "cached_compile_seconds")
    ]
    share = [
        f"{found['mfu']:.1%}" if "mfu" in found else "",
        f"{found['tflops'] / best:.1%}" if best else "",
    ]
    return [label, f"{found['seconds'] / images:.3g}", goal, *share, *gb, *compile]


def named(suite: Suite, found: dict[str, Any]) -> list[tuple[str, dict[str, Any], int, str]]:
    """(label, figures, images, goal) of every program measured so far; `with decoding` is the sum of two."""
    full = suite is SUITES["full"]
    rows = []
    decode = found.get("sampling", {}).get("decode", {})
    for label, one in found.get("sampling", {}).items():
        n = 1 if label == "decode" else int(label)
        goal = f"{GOAL_SECONDS[n]} s" if full and label in map(str, GOAL_SECONDS) else ""
        rows.append(
            ("decoding alone" if label == "decode" else f"sampling, batch {n}", one, n, goal)
        )
        if label != "decode" and "seconds" in one and "seconds" in decode:
            seconds = one["seconds"] + n * decode["seconds"]
            both = {"seconds": seconds, **rates(one["flops"] + n * decode["flops"], seconds)}
            rows.append((f"sampling, batch {n}, with decoding", both, n, ""))
    for label, one in found.get("rollout", {}).items():
        rows.append((f"rollout, 1 slot x {label}", one, int(label), ""))
    for label, one in found.get("update", {}).items():
        policy, n = label.split()
        rows.append(
            (f"update, {policy}, batch {n}", one, int(n), f"{GOAL_MFU:.0%} MFU" if full else "")
        )
    return rows


def show(suite: Suite, found: dict[str, Any]) -> None:
    """The table, what failed, the iteration, and torch's figures."""
    header = (
        "program",
        "s/image",
        "goal",
        "MFU",
        "of product",
        "plan, GB",
        "peak, GB",
        "compile, s",
        "cached, s",
    )
    best = found.get("product", {}).get("tflops")
    rows, failed = [], []
    for label, one, images, goal in named(suite, found):
        if "seconds" in one:
            rows.append(row(label, one, images, goal, best))
        else:
            failed.append(f"{label}: {one['failed']}")
    print(
        f"\n{machine()}. An update's seconds: all {suite.size.window} window steps; peak: the process's so far."
    )
    print(
        "Goals are for one H200." if suite is SUITES["full"] else "A toy: its figures mean nothing."
    )
    print_table(header, rows)
    print(*failed, sep="\n", end="\n" if failed else "")
    if best:
        of = (
            f", {found['product']['mfu']:.0%} of the data sheet's"
            if "mfu" in found["product"]
            else ""
        )
        print(f"a bfloat16 product of side {suite.product}: {best:.3g} TFLOP/s{of}")
    if "seconds" in found.get("iteration", {}):
        it = found["iteration"]
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in it["parts"].items())
        mfu = f", MFU {it['mfu']:.0%}" if "mfu" in it else ""
        what = f"{IMAGES} images on {GPUS} GPUs, remat {it['remat']}"
        print(f"RealGen's iteration, {what}: {it['seconds']:.1f} s ({parts}){mfu}")
    if "torch" in found:
        steps = (
            found.get("sampling", {}).get("1", {}).get("seconds", float("nan")) / suite.size.steps
        )
        told = ", ".join(f"{k} {v:.3g}" for k, v in found["torch"].items() if isinstance(v, float))
        print(f"torch: {told or found['torch']}; a step of sampling at batch 1 here: {steps:.3g} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SUITES), default="full")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(
            f"--only names {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}"
        )
    suite, found = SUITES[options.size], {"size": options.size}
    params = cache(lambda: jax.block_until_ready(fill(workload.weights(suite.size))))

    def keep(part: str, label: str, one: dict[str, Any]) -> None:
        found.setdefault(part, {})[label] = one
        save("flux_gpu", found, options.out)

    if "torch" in chosen:
        found["torch"] = attempt("torch", partial(torch_part, suite))
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        if "product" in chosen:
            found["product"] = attempt("product", partial(product, suite))
        for part in ("sampling", "rollout", "update"):
            if part in chosen:
                measure_part(suite, part, params, partial(keep, part))
    if {"sampling", "rollout", "update"} <= set(chosen):
        found["iteration"] = attempt("iteration", partial(iteration, suite, found))
    show(suite, found)
    print(f"written to {save('flux_gpu', found, options.out)}")


if __name__ == "__main__":
    main()
