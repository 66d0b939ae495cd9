"""Benchmarks: their prompts, what they pin, and means over categories worked out by hand."""

import hashlib
import io
import json

import numpy as np
import pytest
from rich.console import Console

from realgen_configs.flux_grpo import get_config
from realgen_jax.realbench.aggregate import CATEGORIES
from realgen_jax.realbench.benchmarks import BENCHMARKS, open_benchmark
from realgen_jax.realbench.summarize import print_category_means
from tests.helpers.goldens import ROOT
from tests.realgen_jax.realbench.test_report import one, rows_of, scored

FILES = {
    "geneval": "\n".join(
        json.dumps({"tag": tag, "include": [], "prompt": prompt})
        for tag, prompt in (("counting", "two dogs"), ("colors", "a red dog"))
    ),
    "dpg": 'item_id,text,proposition_id\n1,a dog,1\n1,a dog,2\n2,"a cat, asleep",1\n',
    "partiprompts": 'Prompt\tCategory\tNote\na "red" dog\tAnimals\t\na sea\tArts\t\n',
    "ocr": 'a sign "Open"\na cup "Tea"\n',
}
PROMPTS = {
    "geneval": [("two dogs", "counting"), ("a red dog", "colors")],
    "dpg": [("a dog", ""), ("a cat, asleep", "")],
    "partiprompts": [('a "red" dog', "Animals"), ("a sea", "Arts")],
    "ocr": [('a sign "Open"', ""), ('a cup "Tea"', "")],
}
SUFFIX = {"geneval": "jsonl", "dpg": "csv", "partiprompts": "tsv", "ocr": "txt"}


def config_with(name, file):
    config = get_config().unlock()
    config.evaluate.benchmarks[name] = str(file)
    return config.lock()


@pytest.mark.parametrize("name", FILES)
def test_a_benchmark_sets_what_it_pins_and_tells_it(tmp_path, name):
    file = tmp_path / f"prompts.{SUFFIX[name]}"
    file.write_text(FILES[name])
    given = config_with(name, file)
    before = given.to_json()
    opened = open_benchmark(name, given, 7)
    assert given.to_json() == before  # a copy was changed

    (prompts,) = opened.sets
    assert prompts.name == name
    assert list(zip(prompts.prompts, prompts.categories, strict=True)) == PROMPTS[name]
    settings = opened.config.evaluate
    assert settings.images_per_prompt == {"geneval": 4, "dpg": 4}.get(name, 1)
    assert settings.category_mean == (name == "geneval")
    own = {"geneval": ("geneval",), "dpg": ("dpg",), "ocr": ("ocr",)}
    assert settings.scores == own.get(name, given.evaluate.scores)
    if name in ("geneval", "dpg"):
        assert opened.config.reward.options[name].prompts == str(file)

    facts = dict(opened.facts)
    assert hashlib.sha256(file.read_bytes()).hexdigest() in facts["Benchmark"]
    published = BENCHMARKS[name].prompts
    of = f" of {published} (not the published number)" if published else ""
    assert facts["Protocol"].startswith(f"2 prompts{of} x {settings.images_per_prompt} pictures, ")
    assert facts["Protocol"].endswith("steps (euler), guidance 3.5, seed 7")
    assert facts["Differs from the published score"]


def test_options_of_the_users_own_stay(tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text(FILES["dpg"])
    config = config_with("dpg", file).unlock()
    config.reward.options.dpg = {"url": "http://a/v1", "model": "m"}
    options = open_benchmark("dpg", config, 0).config.reward.options.dpg
    assert options.to_dict() == {"prompts": str(file), "url": "http://a/v1", "model": "m"}
    config.reward.options.dpg = {"servers": ("http://a:1",)}
    options = open_benchmark("dpg", config, 0).config.reward.options.dpg
    assert options.to_dict() == {"servers": ("http://a:1",)}


def test_realbench_is_the_configs_own_prompts():
    config = get_config()
    opened = open_benchmark("realbench", config, 0)
    assert {part.name for part in opened.sets} == set(config.evaluate.prompts)
    assert opened.config.evaluate.scores == config.evaluate.scores


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("geneval", '{"prompt": "a"}', r"line 1, is no line of GenEval's .*KeyError: 'tag'"),
        ("geneval", "", "holds no prompt; expected a file from github.com/djghosh13/geneval"),
        ("dpg", "a,b\n", "has no column text"),
        ("partiprompts", "Prompt\tCategory\na dog\t\n", "line 2: Category is empty"),
        ("partiprompts", "Prompt,Category\n", "has no column Prompt, Category"),
    ],
)
def test_other_files_are_refused(tmp_path, name, text, message):
    file = tmp_path / f"prompts.{SUFFIX[name]}"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        open_benchmark(name, config_with(name, file), 0)


def test_a_missing_file_is_named_with_its_source():
    message = r"config\.evaluate\.benchmarks\.dpg is '/nowhere', .* from github\.com/TencentQQGYLab"
    with pytest.raises(FileNotFoundError, match=message):
        open_benchmark("dpg", config_with("dpg", "/nowhere"), 0)
    with pytest.raises(ValueError, match=r"benchmarks\.ocr is missing; expected a file from"):
        open_benchmark("ocr", config_with("ocr", ""), 0)


# -- The mean over categories


def test_each_category_counts_alike():
    """Three prompts of one category with 1, 0, 0 and one of another with 1: 2 / 3, not 1 / 2."""
    pictures = []
    for entry, scores in (("a", (1, 0, 0, 1)), ("b", (1, 1, 0, 0))):
        for line, score in enumerate(scores):
            pictures += [scored(entry, "short", line, copy, score, 0.0) for copy in range(2)]
    categories = ["counting", "counting", "counting", "colors"]
    rows = rows_of(pictures, categories=categories, category_mean=True)
    a, b = (one(rows, entry=entry, kind=CATEGORIES) for entry in "ab")
    assert a.value == pytest.approx((1 / 3 + 1) / 2)
    assert b.value == pytest.approx((2 / 3 + 0) / 2)
    assert b.difference == pytest.approx(b.value - a.value)
    assert (a.pictures, a.prompts) == (8, 4)
    assert np.isnan([a.low, a.high]).all()  # one of the categories has one prompt
    assert one(rows, entry="a").value == pytest.approx(0.5)
    assert not [row for row in rows_of(pictures, categories=categories) if row.kind == CATEGORIES]


def test_intervals_of_a_mean_over_categories_are_those_of_normal_theory():
    rng = np.random.default_rng(0)
    counts = {"x": 300, "y": 900}
    scores = {name: (rng.random(n) < p).astype(float)
              for (name, n), p in zip(counts.items(), (0.2, 0.7), strict=True)}  # fmt: skip
    values = np.concatenate([scores["x"], scores["y"]])
    pictures = [scored("a", "short", line, 0, value, 0.0) for line, value in enumerate(values)]
    categories = ["x"] * 300 + ["y"] * 900
    rows = rows_of(pictures, 1200, categories=categories, entries="a", resamples=4000,
                   category_mean=True)  # fmt: skip
    row = one(rows, entry="a", kind=CATEGORIES)
    variance = sum(part.var() / len(part) for part in scores.values()) / 4
    assert row.value == pytest.approx((scores["x"].mean() + scores["y"].mean()) / 2)
    assert row.high - row.value == pytest.approx(1.96 * variance**0.5, rel=0.08)
    assert row.value - row.low == pytest.approx(1.96 * variance**0.5, rel=0.08)


def test_means_over_categories_are_printed():
    pictures = [scored("a", "short", line, 0, float(line < 3), 0.5) for line in range(4)]
    rows = rows_of(pictures, categories=["x", "x", "y", "y"], entries="a", category_mean=True)
    console = Console(width=200, record=True, file=io.StringIO())
    print_category_means(rows, console)
    first, second = console.export_text().splitlines()
    assert first == "a, short: detector 0.750 [0.500, 1.000], mean over categories"
    assert second == "a, short: score 0.500 [0.500, 0.500], mean over categories"


def test_the_page_lists_every_benchmark():
    page = (ROOT / "docs" / "realbench.md").read_text()
    for name, benchmark in BENCHMARKS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert f"| {benchmark.copies} |" in row
        if benchmark.prompts:
            assert f"{benchmark.prompts:,}" in row


def test_without_a_category_there_is_no_mean():
    pictures = [scored("a", "short", line, 0, 1.0, 0.0) for line in range(4)]
    row = one(rows_of(pictures, entries="a", category_mean=True), entry="a", kind=CATEGORIES)
    assert np.isnan(row.value)
    # nor where a category has no pictures
    categories = ["x", "x", "x", "y"]
    rows = rows_of(pictures[:3], categories=categories, entries="a", category_mean=True)
    assert np.isnan(one(rows, entry="a", kind=CATEGORIES).value)
