"""Runs that train a rewriter, whole: a language model that answers with one of a few words."""

import json

import pytest
from safetensors.numpy import load_file

from tests.helpers.chat import parrot
from tests.helpers.goldens import TESTS
from tests.helpers.running import call, rows

CONFIG = TESTS / "helpers" / "rewriter_config.py"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A language model's folder."""
    return parrot(tmp_path_factory.mktemp("words"), ["cat", "frog", "husk"])


@pytest.mark.slow
def test_a_run_trains_the_rewriter(words, cache, tmp_path):
    """Two optimizer steps an epoch, two pictures a rewrite."""
    done = call(
        "train.py",
        cache,
        f"--config.rewriter.path={words}",
        f"--config.run_root={tmp_path}",
        "--config.run_name=x",
        "--config.num_epochs=2",
        config=CONFIG,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "x"

    # On unchanged weights the ratio is exactly 1, and replay would draw the same tokens.
    trained = [row for row in rows(folder) if row["kind"] == "train"]
    assert [row["steps"] for row in trained] == [2, 2]
    assert [row["first_ratio_deviation"] for row in trained] == [0, 0]
    assert [row["gap_flips"] for row in trained] == [0, 0]
    assert all(row["reward/usable"] > 0.5 and row["grad_norm"] > 0 for row in trained)
    assert trained[1]["kl"] > 0
    evaluated = [row for row in rows(folder) if row["kind"] == "eval"]
    assert [row["epoch"] for row in evaluated] == [0, 2]
    assert {"text/words", "text/tail", "text/unusable", "length"} <= evaluated[0].keys()

    # What the run leaves.
    assert (folder / "rewriter" / "adapter_model.safetensors").exists()
    settings = json.loads((folder / "rewriter" / "rewriter.json").read_text())
    assert (settings["base"], settings["max_new_tokens"]) == (str(words), 8)
    records = [json.loads(line) for line in (folder / "rewrites.jsonl").read_text().splitlines()]
    start = [record for record in records if (record["epoch"], record["kind"]) == (0, "eval")]
    assert {record["rewrite"] for record in start} == {"cat"}  # the likeliest
    assert all((folder / record["picture"]).exists() for record in start)


@pytest.mark.slow
def test_all_weights_of_the_language_model_train(words, cache, tmp_path):
    """The exported folder is a whole model; a window that is too short is told before the run."""
    done = call(
        "train.py",
        cache,
        f"--config.rewriter.path={words}",
        f"--config.run_root={tmp_path}",
        "--config.run_name=x",
        "--config.num_epochs=1",
        "--config.train.lora=False",
        "--config.prompts.max_tokens=6",
        config=CONFIG,
    )
    assert done.returncode == 0, done.stderr
    assert "a rewrite of full length would lose 25% of its tokens" in done.stdout
    (trained,) = [row for row in rows(tmp_path / "x") if row["kind"] == "train"]
    assert trained["first_ratio_deviation"] == 0
    assert trained["grad_norm"] > 0

    before = load_file(words / "model.safetensors")
    after = load_file(tmp_path / "x" / "rewriter" / "model.safetensors")
    assert before.keys() <= after.keys()
    moved = [name for name in before if (before[name] != after[name]).any()]
    assert len(moved) > 0.5 * len(before)


@pytest.mark.slow
def test_rewrites_that_cannot_be_drawn_end_the_run(cache, tmp_path):
    """A bell in every rewrite: evaluations draw the prompts, the first epoch is refused."""
    folder = parrot(tmp_path / "bells", ["c\x07a"])
    options = [f"--config.rewriter.path={folder}", f"--config.run_root={tmp_path}"]
    done = call("train.py", cache, *options, config=CONFIG)
    assert done.returncode == 1
    assert "error: epoch 0: no rewrite can be drawn" in done.stderr
    assert "for example 'c\\x07a'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("rewriter.path=nowhere", "config.rewriter.path is 'nowhere', which does not exist"),
        ("rewriter.max_prompt_tokens=8", "more than config.rewriter.max_prompt_tokens 8"),
        ("rewriter.microbatch=3", "are not whole optimizer steps of gradient_accumulation_steps"),
        ("sample.train_batch_size=12", "16 pictures are not whole calls of"),
        ("rewriter.importance_cap=0.5", "config.rewriter.importance_cap is 0.5"),
        ("mesh.data=3", "mesh data=3, fsdp=1, tensor=1 does not fit 1 devices"),
    ],
)
def test_a_mistake_is_told_in_one_line(words, cache, tmp_path, option, says):
    options = [f"--config.rewriter.path={words}", f"--config.run_root={tmp_path}"]
    done = call("train.py", cache, *options, f"--config.{option}", config=CONFIG)
    assert done.returncode == 1
    assert says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
