"""The field's benchmarks: where their prompts come from, and how they are drawn and scored.

A benchmark is an evaluation like any other, with the prompts of a published file, a number of
pictures per prompt, and its own score.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from realgen_jax.data import read_categorised
from realgen_jax.files import expand_home
from realgen_jax.realbench.prompts import read_sets
from realgen_jax.realbench.results import PromptSet

Prompts = list[tuple[str, str]]  # (prompt, category)


@dataclass(frozen=True)
class Benchmark:
    """What is pinned of a benchmark.

    prompts: how many the published file has; 0 if that is not pinned. scores: the rewards; () for
    those of config.evaluate.scores. by_category: its figure is the mean over categories, each
    counted alike. changes: how the score here differs from the published one.
    """

    source: str
    read: Callable[[Path], Prompts]
    copies: int  # pictures per prompt
    prompts: int = 0
    scores: tuple[str, ...] = ()
    by_category: bool = False
    changes: str = ""


@dataclass(frozen=True)
class Opened:
    """A benchmark that is ready to be evaluated.

    facts: (name, value) pairs for the report.
    """

    config: ConfigDict
    sets: list[PromptSet]
    facts: tuple[tuple[str, str], ...]


def read_geneval(file: Path) -> Prompts:
    """The prompts of evaluation_metadata.jsonl and their tasks."""
    prompts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            prompts.append((record["prompt"], record["tag"]))
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number}, is no line of GenEval's evaluation_metadata.jsonl "
                f"({type(error).__name__}: {error})"
            ) from error
    return prompts


def read_dpg(file: Path) -> Prompts:
    """The prompts of dpg_bench.csv, each of which has several rows."""
    rows = _read_table(file, ",", ("text",))
    return [(prompt, "") for prompt in dict.fromkeys(row["text"].strip() for row in rows)]


def read_partiprompts(file: Path) -> Prompts:
    """The prompts of PartiPrompts.tsv and their categories."""
    rows = _read_table(file, "\t", ("Prompt", "Category"))
    return [(row["Prompt"].strip(), row["Category"].strip()) for row in rows]


def _read_table(file: Path, separator: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a table. Raises ValueError if a column is missing, or empty in a row."""
    with file.open(newline="", encoding="utf-8") as stream:
        quoting = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
        reader = csv.DictReader(stream, delimiter=separator, quoting=quoting)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{file} has no column {', '.join(missing)}; is it another table?")
        rows = []
        for row in reader:
            empty = [name for name in columns if not (row[name] or "").strip()]
            if empty:
                raise ValueError(f"{file}, line {reader.line_num}: {empty[0]} is empty")
            rows.append(row)
    return rows


REALBENCH = "realbench"  # its prompts are those of config.evaluate.prompts
BENCHMARKS: Mapping[str, Benchmark] = {
    "geneval": Benchmark(
        source="github.com/djghosh13/geneval, prompts/evaluation_metadata.jsonl",
        read=read_geneval,
        prompts=553,
        copies=4,
        scores=("geneval",),
        by_category=True,
        changes="objects by the authors' Mask2Former Swin-S on COCO instead of mmdet's",
    ),
    "dpg": Benchmark(
        source="github.com/TencentQQGYLab/ELLA, dpg_bench/dpg_bench.csv",
        read=read_dpg,
        prompts=1065,
        copies=4,
        scores=("dpg",),
        changes="questions are answered by the endpoint's model instead of mPLUG-large; every "
        "question counts (the published code skips the file's first)",
    ),
    "partiprompts": Benchmark(
        source="github.com/google-research/parti, PartiPrompts.tsv",
        read=read_partiprompts,
        prompts=1632,
        copies=1,
        changes="PartiPrompts has no score of its own: people compared pictures; these are the "
        "rewards of config.evaluate.scores",
    ),
    "ocr": Benchmark(
        source="github.com/yifan123/flow_grpo, dataset/ocr/test.txt",
        read=read_categorised,
        copies=1,
        scores=("ocr",),
        changes="text is read by PP-OCR's models in rapidocr instead of PaddleOCR's English ones",
    ),
    REALBENCH: Benchmark(
        source="github.com/yejy53/RealGen, eval/model-eval/long-img/banchmark",
        read=read_categorised,
        prompts=1041,
        copies=1,
        changes="every picture has noise of its own",
    ),
}


def open_benchmark(name: str, config: ConfigDict, seed: int) -> Opened:
    """Read a benchmark's prompts, and set its pictures per prompt and its scores in a copy.

    Raises FileNotFoundError or ValueError naming the file, or the key that names it.
    """
    benchmark = BENCHMARKS[name]
    config = config.copy_and_resolve_references().unlock()
    settings = config.evaluate
    if name == REALBENCH:
        sets = read_sets(settings.prompts)
        files = [expand_home(file) for file in settings.prompts.values()]
    else:
        files = [_file_of(name, settings.benchmarks)]
        prompts, categories = zip(*_read(benchmark, files[0]), strict=True)
        sets = [PromptSet(name, prompts, categories)]

    # -- Set what is pinned.
    settings.images_per_prompt = benchmark.copies
    settings.category_mean = benchmark.by_category
    if benchmark.scores:
        settings.scores = benchmark.scores
        settings.detectors = ()
    for reward in set(benchmark.scores) & {"geneval", "dpg"}:
        options = config.reward.options.to_dict().get(reward, {})
        if "servers" not in options:
            config.reward.options[reward] = ConfigDict({"prompts": str(files[0]), **options})

    return Opened(config, sets, _facts(name, benchmark, settings, sets, files, seed))


def _file_of(name: str, files: Mapping[str, str]) -> Path:
    """The file of a benchmark's prompts, of config.evaluate.benchmarks."""
    key = f"config.evaluate.benchmarks.{name}"
    if not files.get(name):
        raise ValueError(f"{key} is missing; expected a file from {BENCHMARKS[name].source}")
    path = expand_home(files[name])
    if not path.is_file():
        raise FileNotFoundError(
            f"{key} is {files[name]!r}, which does not exist; it comes from "
            f"{BENCHMARKS[name].source}"
        )
    return path


def _read(benchmark: Benchmark, file: Path) -> Prompts:
    try:
        prompts = benchmark.read(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 ({error.reason})") from error
    if not prompts:
        raise ValueError(f"{file} holds no prompt; expected a file from {benchmark.source}")
    return prompts


def _facts(
    name: str,
    benchmark: Benchmark,
    settings: ConfigDict,
    sets: list[PromptSet],
    files: list[Path],
    seed: int,
) -> tuple[tuple[str, str], ...]:
    """What was evaluated, and how, for the report and for people who compare figures."""
    count = len(sets[0].prompts)
    is_whole = benchmark.prompts in (0, count)
    published = "" if is_whole else f" of {benchmark.prompts} (not the published number)"
    digests = [f"{file.name} SHA-256 {_sha256(file)}" for file in files]
    sample: Any = settings.sample
    facts = (
        ("Benchmark", f"{name}, from {benchmark.source}; {'; '.join(digests)}"),
        (
            "Protocol",
            f"{count:,} prompts{published} x {benchmark.copies} pictures, {sample.width} x "
            f"{sample.height} px, {sample.num_steps} steps ({sample.solver}), guidance "
            f"{sample.guidance_scale:g}, seed {seed}",
        ),
        ("Differs from the published score", benchmark.changes),
    )
    return tuple(fact for fact in facts if fact[1])


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
