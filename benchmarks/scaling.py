"""Measure how cost grows with depth, tokens, batch, window and group.

    python benchmarks/scaling.py

Prints tables and writes benchmarks/results/scaling_<machine>.json. Takes 5 minutes.

sweeps     seconds of sampling, a rollout and an update while one size grows, and operations per
           second (operations by realgen_jax/models/cost.py). If a cost grows faster than the
           work, the rate falls. Small sizes run below the rate of large ones. group: images of one
           prompt, in threes that share the steps before the window.
compile    seconds to trace and lower, and to compile (without a cache), from 4 to 57 blocks. The
           blocks are scanned, so both should stay within 20 %. Median of 3.
run        20 rollouts and updates, each with a window of its own. Nothing should be traced or
           compiled after the first.
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
from realgen_jax.update import Batch

# Double and single blocks: 4, 8, 19 and FLUX.1-dev's 57. One block of a kind would not be a loop.
DEPTHS = ((2, 2), (3, 5), (6, 13), (19, 38))
# The largest ratio of compile times that counts as flat.
FLAT = 1.2
ITERATIONS = 20
PARTS = ("sampling", "rollout", "update")
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "traces",
    "/jax/core/compile/backend_compile_duration": "compilations",
}


@dataclass(frozen=True)
class Suite:
    """The point that all sweeps share, the values of each sweep, and the depths to compile."""

    base: Size
    slots: int  # of a rollout call
    values: dict[str, tuple]
    repeats: int = 3
    depths: tuple[tuple[int, int], ...] = DEPTHS


def _medium(heads: int, head_dim: int, dtype: type, **kw: int) -> Size:
    """A model of 12 blocks, and one branch."""
    axes = {64: (8, 28, 28), 128: (16, 56, 56)}
    model = FluxConfig(
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=256,
        pooled_projection_dim=64,
        axes_dims_rope=axes[head_dim],
        dtype=dtype,
        param_dtype=dtype,
    )
    return replace(tiny(branches=1), model=model, **kw)


def suites() -> dict[str, Suite]:
    """What is measured on a laptop's CPU, on a GPU, and in tests."""
    blocks = ((2, 4), (4, 8), (8, 16))
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
    """Return a point of a sweep: its label in the table, its size, and the slots of a call."""
    base = suite.base
    slots = suite.slots
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
    """Measure seconds and GFLOP/s of every point.

    Points take turns, and a point that several sweeps share runs once.
    """
    points = {}
    for sweep, values in suite.values.items():
        for value in values:
            points[sweep, value] = point(suite, sweep, value)

    # Compile each point's programs.
    programs = {}
    calls = {}
    for _, size, slots in points.values():
        if (size, slots, "update") in calls:
            continue
        weights = fill(workload.weights(size))
        point_programs = {
            "sampling": sampling(size, slots * size.branches),
            "rollout": rollouts(size, slots),
            "update": updating(size, slots),
        }
        for part, program in point_programs.items():
            programs[size, slots, part] = program
            calls[size, slots, part] = start(program, weights)

    # Time them.
    timings = alternate(calls, suite.repeats)
    medians = {key: statistics.median(seconds) for key, seconds in timings.items()}

    results = {sweep: [] for sweep in suite.values}
    for (sweep, _), (label, size, slots) in points.items():
        row: dict = {sweep: int(label)}
        for part in PARTS:
            key = size, slots, part
            gflops = programs[key].flops / medians[key] / 1e9
            row[part] = {"seconds": medians[key], "gflops": gflops}
        results[sweep].append(row)
    return results


def compile_once(make, size: Size) -> dict[str, float]:
    """Measure seconds to trace and lower, seconds to compile, and the program's length.

    Nothing is cached.
    """
    jax.clear_caches()
    program = make(size, 1)
    begin = time.perf_counter()
    lowered = program.call.lower(*program.arguments)
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    compiled_at = time.perf_counter()
    return {
        "lower_seconds": lowered_at - begin,
        "compile_seconds": compiled_at - lowered_at,
        "instructions": compiled.as_text().count(" = "),
    }


def compiling(depths: tuple[tuple[int, int], ...], repeats: int) -> dict:
    """Compile each program at each depth in turns, and compare the deepest with the shallowest."""
    makers = {"sampling": sampling, "update": updating}
    runs: dict[str, dict[int, list]] = {name: {} for name in makers}
    for _ in range(repeats):
        for name, make in makers.items():
            for double, single in depths:
                run = compile_once(make, tiny(double, single))
                runs[name].setdefault(double + single, []).append(run)

    results = {}
    for name, runs_by_depth in runs.items():
        table = []
        for blocks, depth_runs in runs_by_depth.items():
            row = {"blocks": blocks}
            for key in depth_runs[0]:
                row[key] = statistics.median(run[key] for run in depth_runs)
            table.append(row)
        results[name] = {"depths": table}
        for key in ("lower_seconds", "compile_seconds"):
            results[name][f"{key}_ratio"] = table[-1][key] / table[0][key]
    return results


def whole_run() -> dict[str, int]:
    """Count traces and compilations of the first iteration, and of all later ones.

    The windows of later iterations start elsewhere.
    """
    counts: Counter = Counter()

    def count(event: str, _: float, **kw) -> None:
        if event in EVENTS:
            counts[EVENTS[event]] += 1

    jax.monitoring.register_event_duration_secs_listener(count)

    size = tiny()
    sample = rollouts(size, 2)
    learn = updating(size, 2)
    model, _, cond = fill(sample.arguments[:3])
    state, batch = fill(learn.arguments[1:])
    advantages = batch.advantages
    first = {}
    starts = set()
    for i in range(ITERATIONS):
        key = jax.random.fold_in(jax.random.key(0), i)
        latent_key, noise_key, window_key = jax.random.split(key, 3)
        plan = size.plan.draw(window_key)
        _, trajectory = sample.call(model, state.trainable, cond, (latent_key, noise_key), plan)
        trajectory, conds = jax.tree.map(lambda a: jnp.asarray(a)[None], (trajectory, cond))
        state, metrics = learn.call(model, state, Batch(trajectory, conds, advantages))
        jax.block_until_ready(metrics)
        starts.add(int(plan.start))
        if i == 0:
            first = dict(counts)
    later = {f"later_{name}": counts[name] - first[name] for name in EVENTS.values()}
    return {"iterations": ITERATIONS, "window_starts": len(starts), **first, **later}


def show_sweeps(results: dict[str, list[dict]]) -> None:
    """Print a table for each sweep."""
    for sweep, rows in results.items():
        header = [sweep]
        for part in PARTS:
            header += [f"{part}, ms", "GFLOP/s"]
        table = []
        for row in rows:
            cells = [str(row[sweep])]
            for part in PARTS:
                cells.append(f"{1e3 * row[part]['seconds']:.0f}")
                cells.append(f"{row[part]['gflops']:.0f}")
            table.append(cells)
        print()
        print_table(header, table)


def show_compiling(results: dict) -> None:
    """Print compile times by depth, and whether they are flat."""
    rows = []
    for name, program in results.items():
        for row in program["depths"]:
            label = f"{name}, {row['blocks']} blocks"
            seconds = [f"{row['lower_seconds']:.2f}", f"{row['compile_seconds']:.2f}"]
            rows.append([label, *seconds, str(row["instructions"])])
    print()
    print_table(["program", "trace and lower, s", "compile, s", "instructions"], rows)

    for name, program in results.items():
        ratio = program["compile_seconds_ratio"]
        verdict = "flat" if 1 / FLAT <= ratio <= FLAT else "NOT flat"
        print(
            f"{name}: deepest / shallowest {ratio:.2f} to compile ({verdict}: the limit is "
            f"{FLAT - 1:.0%}), {program['lower_seconds_ratio']:.2f} to trace and lower"
        )


def show_run(results: dict[str, int]) -> None:
    """Print what was compiled after the first iteration."""
    print(
        f"\n{results['iterations']} iterations with {results['window_starts']} window starts: "
        f"{results['compilations']} compilations in the first, {results['later_compilations']} in "
        f"all later ones (and {results['later_traces']} traces; 0 expected)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = "cpu" if jax.default_backend() == "cpu" else "gpu"
    parser.add_argument(
        "--size", choices=list(suites()), default=size, help=f"default here: {size}"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args()
    suite = suites()[args.size]

    jax.config.update("jax_enable_compilation_cache", False)
    results: dict = {"size": args.size, "compile": compiling(suite.depths, suite.repeats)}
    show_compiling(results["compile"])
    results["run"] = whole_run()
    show_run(results["run"])
    results["sweeps"] = sweeps(suite)
    show_sweeps(results["sweeps"])
    print(f"written to {save('scaling', results, args.out)}")


if __name__ == "__main__":
    main()
