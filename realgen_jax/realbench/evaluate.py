"""RealBench's evaluation: prompts and entries -> pictures -> scores."""

import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from realgen_jax.hosts import (
    broadcast_text,
    process_count,
    process_index,
    start_devices,
    sum_over_processes,
    wait_for_all,
)
from realgen_jax.models.loading import size_of
from realgen_jax.realbench.interfaces import Scorer
from realgen_jax.realbench.picture_files import Picture, read_batches
from realgen_jax.realbench.pictures import PictureMaker, manifest, prepare_folder
from realgen_jax.realbench.results import Entry, PromptSet, Results
from realgen_jax.realbench.scores import (
    PictureScorer,
    ScoreStore,
)
from realgen_jax.realbench.tasks import Task, find_missing, plan_tasks
from realgen_jax.sharding import batch_devices, make_mesh
from realgen_jax.text_cache import TextCache
from realgen_jax.training.progress import progress_bars

Encode = Callable[[Sequence[str], str], TextCache]  # (prompts, model folder) -> their embeddings
Rewrite = Callable[
    [str, Sequence[str], Path], Sequence[str]
]  # (rewriter, prompts, folder) -> texts


def evaluate_entries(
    config: ConfigDict,
    entries: Sequence[Entry],
    sets: Sequence[PromptSet],
    folder: Path,
    *,
    seed: int,
    remake: bool,
    score_keys: Mapping[str, str],
    open_scorer: Callable[[], Scorer],
    encode: Encode,
    rewrite: Rewrite | None = None,
    console: Console,
) -> Results:
    """Generate the missing pictures, read the others, and score all, in `folder`/evaluation.

    encode: embeds texts. rewrite: rewrites prompts in a process of its own, for entries with a
    rewriter; they are always scored against the prompts themselves.
    score_keys: {reward: a digest of all that its scores depend on}; a stored score is used again
    only under the same one. open_scorer: loads the rewards; called once, after all checks and
    before JAX starts. Every process must call this; the first one writes and scores, and only its
    results contain pictures.

    Raises ValueError or OSError for invalid input before anything is computed. Raises ScoringError
    if a reward fails; another call then continues from there.
    """
    # -- Plan what to do.
    tasks, problems = plan_tasks(config, entries, sets, folder)
    tasks = _rewrite_prompts(tasks, folder, rewrite)
    tasks = _prepare_folders(tasks, config, seed, remake)

    # -- Load text encoders and rewards before JAX, which takes all remaining memory.
    caches = _encode_prompts(tasks, encode)
    with contextlib.ExitStack() as stack:
        scorer = stack.enter_context(contextlib.closing(open_scorer()))

        # -- Start JAX. All processes generate the pictures that the first process lacks.
        mesh = make_mesh(**config.mesh, devices=start_devices())
        tasks = [_agree_on_missing(task) for task in tasks]
        weights = [task.weights for task in tasks if task.weights is not None]
        maker = PictureMaker(config, mesh, caches, weights, seed)

        # -- Generate or read the pictures, and score them in the background.
        pool = stack.enter_context(ThreadPoolExecutor(8, thread_name_prefix="pictures"))
        size = _batch_size(config.evaluate.batch_size, mesh)
        bars = stack.enter_context(progress_bars(console if process_index() == 0 else None))
        pictures = []
        for task in tasks:
            batches = _batches(task, maker, size, pool)
            if process_index():
                deque(batches, maxlen=0)  # only takes part in the sampling
                continue
            store = ScoreStore(task.folder / "scores.jsonl", score_keys)
            expected = size_of(config.evaluate.sample)
            task_scorer = PictureScorer(task.entry.name, task.prompt_set, store, scorer, expected)
            label = f"{task.entry.name}, {task.prompt_set.name}"
            task_scorer.score(batches, bars(label, task.count, "pictures"))
            pictures += task_scorer.scored
            problems += task_scorer.problems
    return Results(sets, entries, list(config.evaluate.scores), pictures, problems)


def _prepare_folders(
    tasks: Sequence[Task], config: ConfigDict, seed: int, remake: bool
) -> list[Task]:
    """Check how existing pictures were made, and find the missing ones.

    Only the first process looks at the disk; for the others nothing is missing yet.
    """
    manifests = []
    for task in tasks:
        contents = None
        if task.weights is not None:
            contents = manifest(task.weights, config, seed, task.texts)
        manifests.append(contents)
    if process_index():
        return list(tasks)

    prepared = []
    for task, contents in zip(tasks, manifests, strict=True):
        if contents is not None:
            prepare_folder(task.folder, contents, remake)
        prepared.append(find_missing(task, config.evaluate.images_per_prompt))
    return prepared


def _rewrite_prompts(tasks: Sequence[Task], folder: Path, rewrite: Rewrite | None) -> list[Task]:
    """Let the rewriters of entries rewrite their tasks' prompts, once for each rewriter and set."""
    texts: dict[tuple[str, str], Sequence[str]] = {}
    rewritten = []
    for task in tasks:
        rewriter = task.entry.rewriter
        if rewriter:
            key = rewriter, task.prompt_set.name
            if key not in texts:
                place = folder / "evaluation" / task.entry.name / f"{task.prompt_set.name}-texts"
                texts[key] = _in_first_process(rewrite, rewriter, task.prompt_set.prompts, place)
            task = replace(task, texts=texts[key])
        rewritten.append(task)
    return rewritten


def _in_first_process(
    rewrite: Rewrite, rewriter: str, prompts: Sequence[str], place: Path
) -> Sequence[str]:
    """Return the rewrites in every process; the first one makes them."""
    if process_count() == 1:
        return rewrite(rewriter, prompts, place)
    texts = None
    if process_index() == 0:
        texts = json.dumps(list(rewrite(rewriter, prompts, place)))
    wait_for_all(f"{place} is rewritten")
    return json.loads(broadcast_text(f"rewrites in {place}", texts))


def _encode_prompts(tasks: Sequence[Task], encode: Encode) -> dict[str, TextCache]:
    """Return {model folder: embeddings of all texts} for models with pictures to generate.

    With several processes, the others do not know which pictures the first one lacks, so all models
    are encoded.
    """
    texts = dict.fromkeys(text for task in tasks if task.weights is not None for text in task.texts)
    caches = {}
    for task in tasks:
        if task.weights is None or task.weights.model in caches:
            continue
        if process_count() > 1 or task.missing.any():
            caches[task.weights.model] = encode(list(texts), task.weights.model)
    return caches


def _agree_on_missing(task: Task) -> Task:
    """Return the task with the first process's missing pictures, in every process."""
    if task.weights is None:
        return task
    return replace(task, missing=sum_over_processes(task.missing.astype(np.int32)) > 0)


def _batch_size(wanted: int, mesh: jax.sharding.Mesh) -> int:
    """Round up to a multiple of the number of devices that share a batch."""
    devices = batch_devices(mesh)
    return -(-wanted // devices) * devices


def _batches(
    task: Task, maker: PictureMaker, size: int, pool: ThreadPoolExecutor
) -> Iterator[list[Picture]]:
    """A task's pictures in batches; only the first process reads existing ones."""
    if task.weights is None:
        files = {} if process_index() else task.files
        return read_batches(files, len(task.prompt_set.prompts), size, pool)
    return maker.batches(task, size, pool)
