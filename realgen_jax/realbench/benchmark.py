"""RealBench's walk: prompts and entries -> pictures -> scores -> leaderboard -> arena -> report."""

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from realgen_jax.hosts import process_count, process_index, sum_over_processes
from realgen_jax.models.flux.tables import ENCODERS
from realgen_jax.realbench.entries import find_pictures, weights_of
from realgen_jax.realbench.pictures import (
    Sampler,
    make_batches,
    manifest,
    missing_pictures,
    prepare,
    read_batches,
)
from realgen_jax.realbench.progress import bars
from realgen_jax.realbench.results import Entry, Evaluated, PromptSet
from realgen_jax.realbench.scores import Kept, evaluation_options, reward_keys, score
from realgen_jax.sharding import batch_devices, make_mesh
from realgen_jax.text_cache import TextCache, ensure_encoded
from realgen_jax.training.log import short_name
from realgen_jax.training.run import missing_rewards, reward_devices
from reward_bridge.bridge import RewardBridge
from reward_bridge.dlpack import check_room, reserve
from reward_bridge.rewards import make_reward

RESAMPLES, ARENA, STANDINGS = range(3)  # streams of the root key, beside the pictures' noise
MADE = ("model", "lora")


def evaluate(
    config: ConfigDict,
    entries: Sequence[Entry],
    sets: Sequence[PromptSet],
    folder: Path,
    *,
    seed: int,
    remake: bool,
    console: Console,
    encode: Sequence[str],
    cache: TextCache | None = None,
) -> Evaluated:
    """Make what pictures are missing, read the others, and score all of them, into and from `folder`/evaluation.

    encode: the command of the program that encodes prompts, as for `ensure_encoded`.
    cache: embeddings of all prompts by the config's model, where they are at hand. Every process must call it; the
    first one writes and scores, and only its result has pictures. Raises ValueError and OSError for what is wrong with
    the input, before anything is computed, and RewardError, after which another call goes on.
    """
    where = {
        (entry.name, one.name): folder / "evaluation" / entry.name / one.name
        for entry in entries
        for one in sets
    }
    made = [entry for entry in entries if entry.kind in MADE]
    weights = {entry.name: weights_of(entry, config.pretrained) for entry in made}
    settings, lines = config.evaluate, len(sets[0].prompts)
    if wrong := missing_rewards(config.reward, settings.scores):
        raise ValueError("\n".join(wrong))
    if settings.images_per_prompt < 1 or settings.batch_size < 1:
        raise ValueError("config.evaluate.images_per_prompt and batch_size must be 1 or more")
    if not 0 < settings.confidence < 1:
        raise ValueError(
            f"config.evaluate.confidence is {settings.confidence}; expected a share such as 0.95"
        )
    found, problems = {}, []
    for entry in entries:
        if entry.kind not in MADE:
            found[entry.name], wrong = find_pictures(entry, sets)
            problems += wrong
    manifests = {
        (entry.name, one.name): manifest(weights[entry.name], config, seed, one.prompts)
        for entry in made
        for one in sets
    }
    holes = {at: np.zeros(lines * settings.images_per_prompt, bool) for at in manifests}
    if process_index() == 0:
        for at, what in manifests.items():
            prepare(where[at], what, remake)
            holes[at] = missing_pictures(where[at], lines, settings.images_per_prompt)

    # text encoders and rewards come before JAX, which takes what it finds of the memory of its devices
    devices = reward_devices(config.reward, settings.scores)
    shared = reserve({*devices.values()}, config.reward.share_gpu)
    prompts, caches = [prompt for one in sets for prompt in one.prompts], {}
    for entry in made:
        model = weights[entry.name].model
        if model not in caches and (
            process_count() > 1 or any(holes[entry.name, one.name].any() for one in sets)
        ):
            own = cache if model == config.pretrained.model else None
            caches[model] = own or ensure_encoded(prompts, model, ENCODERS, config.prompts, encode)
    options = evaluation_options(config)
    bridge = RewardBridge(
        {
            name: make_reward(name, devices[name], options[name])
            for name in devices
            if process_index() == 0
        },
        devices,
        deadline=config.reward.deadline,
        retries=config.reward.retries,
        batch_size=config.reward.batch_size,
    )
    keys, pictures = reward_keys(settings.scores, options), []
    with contextlib.ExitStack() as leave:
        leave.callback(bridge.close)
        for device in shared:
            check_room(device)
        mesh = make_mesh(**config.mesh, devices=jax.devices())
        size = -(-settings.batch_size // batch_devices(mesh)) * batch_devices(mesh)
        holes = {at: sum_over_processes(hole.astype(np.int32)) > 0 for at, hole in holes.items()}
        samplers = _samplers(config, made, weights, mesh)
        pool = leave.enter_context(ThreadPoolExecutor(8, thread_name_prefix="pictures"))
        bar = leave.enter_context(bars(console if process_index() == 0 else None))
        for entry in entries:
            for one in sets:
                at = entry.name, one.name
                if entry in made:
                    take = lambda entry=entry: samplers(entry)  # noqa: E731
                    own = caches.get(weights[entry.name].model)
                    arguments = (take, own, one, where[at], config, holes[at], seed, size, pool)
                    batches, total = make_batches(*arguments), len(holes[at])
                else:
                    batches = read_batches(found[entry.name][one.name], lines, size, pool)
                    total = len(found[entry.name][one.name])
                if process_index():
                    for _ in batches if entry in made else ():
                        pass
                    continue
                done = bar(f"{entry.name}, {one.name}", total, "pictures")
                kept = Kept(where[at] / "scores.jsonl", keys)
                scored, wrong = score(
                    entry.name, one, batches, kept, bridge, config.sample.resolution, done
                )
                pictures += scored
                problems += wrong
    return Evaluated(sets, entries, list(settings.scores), pictures, problems)


def _samplers(
    config: ConfigDict, made: Sequence[Entry], weights: dict, mesh: Any
) -> Callable[[Entry], tuple]:
    """entry -> (pipeline, program); entries of the same model after one another load it once."""
    loaded: list[Sampler] = []

    def sampler(entry: Entry) -> tuple:
        own = weights[entry.name]
        if not loaded or (loaded[0].weights.model, loaded[0].weights.transformer) != (
            own.model,
            own.transformer,
        ):
            loaded.clear()  # its memory goes before the next one comes
            others = [weights[other.name] for other in made]
            same = [
                w.lora for w in others if (w.model, w.transformer) == (own.model, own.transformer)
            ]
            loaded.append(Sampler(own, config, mesh, same))
        return loaded[0].program(own.lora)

    return sampler


def build_report(
    config: ConfigDict,
    evaluated: Evaluated,
    folder: Path,
    *,
    judge: str,
    seed: int,
    console: Console,
) -> Path:
    """Leaderboard, arena and report of what was evaluated; returns the report's index.html."""
    from realgen_jax.realbench.aggregate import leaderboard
    from realgen_jax.realbench.report import write_report

    say = lambda text: console.print(text, soft_wrap=True)  # noqa: E731
    rows = leaderboard(evaluated, config.evaluate, generator(seed, RESAMPLES))
    show(rows, evaluated, console)
    judgements, table = [], None
    if judge != "none":
        from realgen_jax.realbench.arena import judge_all, judge_and_protocol
        from realgen_jax.realbench.standings import standings

        arena = config.evaluate.arena
        key_seed = int(generator(seed, ARENA).integers(2**31))
        judgements = judge_all(
            evaluated, arena, judge, folder / "evaluation" / "arena", key_seed, say
        )
        names, rng = [entry.name for entry in evaluated.entries], generator(seed, STANDINGS)
        who, protocol = judge_and_protocol(judge, arena)
        table = standings(judgements, names, config.evaluate, rng, judge=who, protocol=protocol)
        show_arena(table, console)
    return write_report(folder, config, evaluated, rows, table, judgements, seed=seed)


def generator(seed: int, stream: int) -> np.random.Generator:
    """numpy's, seeded from a stream of the root key."""
    return np.random.default_rng(
        np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.key(seed), stream)))
    )


def show(rows: Sequence[Any], evaluated: Evaluated, console: Console) -> None:
    """The leaderboard's means over all sets with half their intervals, an entry a row, and what is not as it should."""
    table = Table(box=None, pad_edge=False)
    for name in ("entry", "pictures", *map(short_name, evaluated.rewards)):
        table.add_column(name, justify="left" if name == "entry" else "right")
    overall = "all" if len(evaluated.sets) > 1 else evaluated.sets[0].name
    means = {
        (row.entry, row.measure): row
        for row in rows
        if (row.set, row.category, row.kind) == (overall, "", "mean")
    }
    for entry in evaluated.entries:
        count = sum(one.entry == entry.name for one in evaluated.pictures)
        own = [means[entry.name, name] for name in evaluated.rewards]
        table.add_row(
            entry.name, str(count), *(f"{r.value:.3f} ±{(r.high - r.low) / 2:.3f}" for r in own)
        )
    console.print(table)
    counts = {}
    for one in evaluated.problems:
        counts.setdefault((one.entry, one.set, one.what), []).append(one)
    for (entry, name, what), found in counts.items():
        first = escape(f"{found[0].file} ({found[0].detail})")
        console.print(
            f"[bold red]warning[/bold red] {entry}, {name}: {len(found)} {what}, the first is {first}",
            soft_wrap=True,
        )


def show_arena(table: Any, console: Console) -> None:
    """A line a match: the standings' win rate, and what stands behind it."""
    for m in table.matches:
        console.print(
            f"{m.a} against {m.b}: wins {100 * m.win_rate:.1f} % [{100 * m.low:.1f}, {100 * m.high:.1f}] of {m.pairs} "
            f"pairs ({m.wins} won, {m.losses} lost, {m.ties} ties), says {escape(table.judge)} ({table.protocol})",
            soft_wrap=True,
        )
