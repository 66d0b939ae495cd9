"""sample.py and evaluate.py with a rewriter, as a user calls them."""

import csv
import json
import os

import jax
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from realgen_jax.nn.lora import LoraConfig
from tests.helpers.chat import parrot, rewriter_folder
from tests.helpers.models import fresh_adapters, golden_model
from tests.helpers.running import call


@pytest.fixture(scope="module")
def rewriter(tmp_path_factory):
    """It answers "bold" to everything."""
    root = tmp_path_factory.mktemp("parrot")
    return rewriter_folder(root / "one" / "rewriter", parrot(root / "model", ["bold"]))


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


@pytest.mark.slow
def test_sample_py_prints_the_rewrite_and_draws_it(cache, tmp_path, rewriter):
    words = ["a cat on a roof", "--seed=3"]
    for name, options in (
        ("rewritten", [f"--rewriter={rewriter}"]),
        ("plain", [f"--rewriter={rewriter}", "--no-rewrite"]),
        ("prompt", []),
    ):
        done = call("sample.py", cache, *words, *options, f"--out={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        assert ("a cat on a roof\n  -> bold" in done.stdout) == (name == "rewritten")
        assert done.stdout.splitlines()[-1] == f"1 pictures in {tmp_path / name}"
    done = call("sample.py", cache, "bold", "--seed=3", f"--out={tmp_path / 'bold'}")
    assert done.returncode == 0, done.stderr

    drawn = {name: pixels(tmp_path / name / "00000.png") for name in ("rewritten", "plain")}
    np.testing.assert_array_equal(drawn["plain"], pixels(tmp_path / "prompt" / "00000.png"))
    np.testing.assert_array_equal(drawn["rewritten"], pixels(tmp_path / "bold" / "00000.png"))
    assert (drawn["plain"] != drawn["rewritten"]).any()

    done = call("sample.py", cache, "a cat", "--no-rewrite")
    assert done.stderr.strip() == "error: --no-rewrite goes with --rewriter"
    done = call("sample.py", cache, "a cat", f"--rewriter={tmp_path}")
    assert done.stderr.startswith(
        f"error: {tmp_path}/rewriter.json is missing; expected a rewriter"
    )


@pytest.mark.slow
def test_evaluate_py_compares_base_rewriter_lora_and_both(cache, tmp_path, rewriter):
    model, adapters = fresh_adapters(golden_model(), LoraConfig(2, 4.0), jax.random.key(0))
    lora = tmp_path / "two" / "lora"
    model.trainable.save(model, lora, jax.tree.map(lambda a: a + 0.1, adapters))
    prompts = tmp_path / "short.txt"
    prompts.write_text("a boat\na street at night\n")
    long = tmp_path / "long.txt"
    long.write_text("a boat on a lake\na street at night in the rain\n")
    words = [
        f"--config.run_root={tmp_path}",
        "--config.run_name=run",
        "--config.evaluate.batch_size=2",
        "--config.evaluate.images_per_prompt=1",
        f"--config.evaluate.prompts={{'short': '{prompts}', 'long': '{long}'}}",
        "--config.evaluate.scores=('embedded_detector',)",
        "--config.evaluate.detectors=('embedded_detector',)",
        "--config.evaluate.resamples=100",
        f"--rewriter=A={rewriter}",
        f"--lora={lora}",
    ]
    done = call("evaluate.py", cache, *words)
    assert done.returncode == 0, done.stderr
    assert "--rewriter: only the set short, whose prompts are the shortest, is used" in done.stdout
    with (tmp_path / "run" / "report" / "scores.csv").open(newline="") as file:
        scores = [(row["entry"], row["prompt"]) for row in csv.DictReader(file)]
    lines = ["a boat", "a street at night"]
    assert scores == [(name, line) for name in ("base", "A", "two", "two+A") for line in lines]

    # The rewriter's own pictures, of "bold", differ by their noise alone.
    folder = tmp_path / "run" / "evaluation"
    assert "bold" in (folder / "A" / "short-texts" / "rewrites.jsonl").read_text()
    report = (tmp_path / "run" / "report" / "report.md").read_text()
    assert f"- Entry two+A: lora, {lora}, prompts by {rewriter}" in report
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("*.png")}
    assert len(times) == 8

    # The same command makes nothing again.
    done = call("evaluate.py", cache, *words)
    assert done.returncode == 0, done.stderr
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.png")} == times


RECORDER = """
import json, os, torch

class Recorder:
    def __init__(self, device, record):
        self.record = record

    def __call__(self, images, prompts):
        with open(self.record, "a") as file:
            file.write(json.dumps(list(prompts)) + "\\n")
        return images.float().mean((1, 2, 3)) / 255
"""


@pytest.mark.slow
@pytest.mark.parametrize("original", [True, False])
def test_stage_2_is_scored_by_the_prompt_that_was_asked_for(cache, tmp_path, original):
    """Two prompts have the same rewrite."""
    (tmp_path / "recorder.py").write_text(RECORDER)
    lines = [
        {"prompt": "a long boat", "original": "a boat"},
        {"prompt": "a long boat", "original": "boats"},
        {"prompt": "a long street", "original": "a street"},
        {"prompt": "snow", "original": "snow"},
    ]
    prompts = tmp_path / "rewritten.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    option = {"class": "recorder:Recorder", "record": str(tmp_path / "scored.jsonl")}
    done = call(
        "train.py",
        cache,
        f"--config.run_root={tmp_path}",
        "--config.run_name=run",
        "--config.num_epochs=1",
        f"--config.prompts.train={prompts}",
        f"--config.prompts.test={prompts}",
        f"--config.reward.score_original={original}",
        "--config.reward.fn={'recorder': 1.0}",
        f"--config.reward.options={{'recorder': {option}}}",
        "--config.reward.held_out=()",
        PYTHONPATH=f"{tmp_path}:{os.environ['PYTHONPATH']}",
    )
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    want = {line["original" if original else "prompt"] for line in lines}
    assert {prompt for prompts in calls for prompt in prompts} == want
