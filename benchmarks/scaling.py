"""How cost grows with the work: depth, tokens, batch, window and group; and that compiling does not grow.

    python benchmarks/scaling.py           prints tables and writes benchmarks/results/scaling_<machine>.json; 5 minutes

sweeps     seconds of sampling, a rollout and an update while one size grows, and operations a second by flux/cost.py:
           a cost that grows faster than the work shows as a rate that falls. Small sizes run below the rate of large
           ones. group: images of one prompt, in threes that share the steps before the window.
compile    seconds to trace and lower, and to compile (cold, no cache), from 4 to 57 blocks: the blocks are scanned, so
           both should stay within 20 %. Median of 3.
run        20 rollouts and updates, each with its own window: traces and compilations after the first are to be none.
"""

import argparse
import statistics
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import workload
from measure import RESULTS, alternate, print_table, save
from workload import Size, fill, rollouts, sampling, start, tiny, updating

from realgen_jax.models.flux.transformer import FluxConfig
from realgen_jax.objectives.grpo import Batch

DEPTHS = (
    (2, 2),
    (3, 5),
    (6, 13),
    (19, 38),
)  # 4, 8, 19 and FLUX.1-dev's 57; one block of a kind would not be a loop
FLAT = 1.2
ITERATIONS = 20
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "traces",
    "/jax/core/compile/backend_compile_duration": "compilations",
}


@dataclass(frozen=True)
class Suite:
    """What is measured: the point that every sweep goes through, the sweeps' values, and the depths compiled."""

    base: Size
    slots: int
    values: dict[str, tuple]
    repeats: int = 3
    depths: tuple[tuple[int, int], ...] = DEPTHS


def _medium(heads: int, head_dim: int, dtype: type, **kw: int) -> Size:
    """12 blocks, one branch."""
    axes = {64: (8, 28, 28), 128: (16, 56, 56)}[head_dim]
    names = {
        "num_layers": 4,
        "num_single_layers": 8,
        "joint_attention_dim": 256,
        "pooled_projection_dim": 64,
    }
    widths = {"num_attention_heads": heads, "attention_head_dim": head_dim, "axes_dims_rope": axes}
    return replace(
        tiny(branches=1), model=FluxConfig(**names, **widths, dtype=dtype, param_dtype=dtype), **kw
    )


def suites() -> dict[str, Suite]:
    blocks = (2, 4), (4, 8), (8, 16)
    return {
        "tiny": Suite(tiny(branches=1), 1, {"batch": (1,)}, 1, ((2, 2), (4, 8))),
        "cpu": Suite(
            _medium(2, 64, jnp.float32, side=16, text=32, rank=8),
            2,
            {
                "depth": blocks,
                "tokens": (8, 16, 32),
                "batch": (1, 2, 4),
                "window": (1, 2, 4),
                "group": (3, 6, 12),
            },
        ),
        "gpu": Suite(
            _medium(8, 128, jnp.bfloat16, side=32, text=128, rank=32),
            4,
            {
                "depth": blocks,
                "tokens": (16, 32, 64),
                "batch": (1, 4, 16),
                "window": (1, 2, 4),
                "group": (3, 12, 48),
            },
        ),
    }


def point(suite: Suite, sweep: str, value) -> tuple[str, Size, int]:
    """(what the table calls it, its size, slots of a call)."""
    base, slots = suite.base, suite.slots
    if sweep == "depth":
        double, single = value
        model = replace(base.model, num_layers=double, num_single_layers=single)
        return str(double + single), replace(base, model=model), slots
    if sweep == "tokens":
        return str(value**2), replace(base, side=value), slots
    if sweep == "batch":
        return str(value), base, value
    if sweep == "window":
        return str(value), replace(base, window=value), slots
    return str(value), replace(base, branches=3), value // 3


def sweeps(suite: Suite) -> dict[str, list[dict]]:
    """Every point's seconds and GFLOP/s; points take turns, and one that several sweeps share runs once."""
    where = {
        (sweep, value): point(suite, sweep, value)
        for sweep, values in suite.values.items()
        for value in values
    }
    programs, calls = {}, {}
    for _, size, slots in where.values():
        if (size, slots, "update") in calls:
            continue
        params = fill(workload.weights(size))
        made = sampling(size, slots * size.branches), rollouts(size, slots), updating(size, slots)
        for part, program in zip(("sampling", "rollout", "update"), made, strict=True):
            programs[size, slots, part], calls[size, slots, part] = program, start(program, params)
    seconds = {
        key: statistics.median(taken) for key, taken in alternate(calls, suite.repeats).items()
    }
    found = {sweep: [] for sweep in suite.values}
    for (sweep, _), (label, size, slots) in where.items():
        row: dict = {sweep: int(label)}
        for part in ("sampling", "rollout", "update"):
            key = size, slots, part
            row[part] = {
                "seconds": seconds[key],
                "gflops": programs[key].flops / seconds[key] / 1e9,
            }
        found[sweep].append(row)
    return found


def compile_once(make, size: Size) -> dict[str, float]:
    """Seconds to trace and lower, and to compile; and the compiled program's length. Nothing is kept from before."""
    jax.clear_caches()
    program = make(size, 1)
    begin = time.perf_counter()
    lowered = program.call.lower(*program.arguments)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    return {
        "lower_seconds": middle - begin,
        "compile_seconds": end - middle,
        "instructions": compiled.as_text().count(" = "),
    }


def compiling(depths: tuple[tuple[int, int], ...], repeats: int) -> dict:
    """Rows of each program at each depth, in turns, and how much the deepest needs beside the shallowest."""
    rows: dict[str, dict[int, list]] = {}
    for _ in range(repeats):
        for name, make in (("sampling", sampling), ("update", updating)):
            for double, single in depths:
                once = compile_once(make, tiny(double, single))
                rows.setdefault(name, {}).setdefault(double + single, []).append(once)
    found = {}
    for name, of in rows.items():
        table = [
            {
                "blocks": blocks,
                **{key: statistics.median(one[key] for one in runs) for key in runs[0]},
            }
            for blocks, runs in of.items()
        ]
        ratios = {
            f"{key}_ratio": table[-1][key] / table[0][key]
            for key in ("lower_seconds", "compile_seconds")
        }
        found[name] = {"depths": table, **ratios}
    return found


def whole_run() -> dict[str, int]:
    """Traces and compilations of the first iteration and of all later ones, whose windows start elsewhere."""
    counts: Counter = Counter()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **kw: counts.update([EVENTS[event]] if event in EVENTS else [])
    )
    size = tiny()
    sample, learn = rollouts(size, 2), updating(size, 2)
    params, _, cond = fill(sample.arguments[:3])
    state, batch = fill(learn.arguments[1:])
    advantages, first, starts = batch.advantages, {}, set()
    for i in range(ITERATIONS):
        latent_key, noise_key, window_key = jax.random.split(
            jax.random.fold_in(jax.random.key(0), i), 3
        )
        plan = size.plan.draw(window_key)
        _, trajectory = sample.call(params, state.trainable, cond, (latent_key, noise_key), plan)
        trajectory, conds = jax.tree.map(lambda a: jnp.asarray(a)[None], (trajectory, cond))
        state, metrics = learn.call(params, state, Batch(trajectory, conds, advantages))
        jax.block_until_ready(metrics)
        starts.add(int(plan.start))
        if i == 0:
            first = dict(counts)
    later = {f"later_{name}": counts[name] - first[name] for name in EVENTS.values()}
    return {"iterations": ITERATIONS, "window_starts": len(starts), **first, **later}


def show_sweeps(found: dict[str, list[dict]]) -> None:
    parts = "sampling", "rollout", "update"
    for sweep, rows in found.items():
        header = [sweep, *(column for part in parts for column in (f"{part}, ms", "GFLOP/s"))]
        cells = [
            [
                str(row[sweep]),
                *(f"{x:.0f}" for p in parts for x in (1e3 * row[p]["seconds"], row[p]["gflops"])),
            ]
            for row in rows
        ]
        print()
        print_table(header, cells)


def show_compiling(found: dict) -> None:
    rows = [
        [
            f"{name}, {row['blocks']} blocks",
            *(f"{row[key]:.2f}" for key in ("lower_seconds", "compile_seconds")),
            str(row["instructions"]),
        ]
        for name, one in found.items()
        for row in one["depths"]
    ]
    print()
    print_table(["program", "trace and lower, s", "compile, s", "instructions"], rows)
    for name, one in found.items():
        ratio = one["compile_seconds_ratio"]
        verdict = "flat" if 1 / FLAT <= ratio <= FLAT else "NOT flat"
        print(
            f"{name}: deepest / shallowest {ratio:.2f} to compile ({verdict}; within {FLAT - 1:.0%} is), "
            f"{one['lower_seconds_ratio']:.2f} to trace and lower"
        )


def show_run(found: dict[str, int]) -> None:
    print(
        f"\n{found['iterations']} iterations with {found['window_starts']} window starts: {found['compilations']} "
        f"compilations in the first, {found['later_compilations']} in all later ones (and {found['later_traces']} "
        "traces; 0 expected)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = "cpu" if jax.default_backend() == "cpu" else "gpu"
    parser.add_argument(
        "--size", choices=list(suites()), default=size, help=f"default here: {size}"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    suite = suites()[options.size]
    jax.config.update("jax_enable_compilation_cache", False)
    found: dict = {"size": options.size, "compile": compiling(suite.depths, suite.repeats)}
    show_compiling(found["compile"])
    found["run"] = whole_run()
    show_run(found["run"])
    found["sweeps"] = sweeps(suite)
    show_sweeps(found["sweeps"])
    print(f"written to {save('scaling', found, options.out)}")


if __name__ == "__main__":
    main()
