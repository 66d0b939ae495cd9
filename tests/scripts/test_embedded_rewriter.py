"""The embedded rewriter: what it ships with, and what it learns with and without alignment."""

import json
import subprocess

import pytest

from tests.helpers.goldens import ROOT
from tests.helpers.running import command, rows

pytest.importorskip("torch")

EMBEDDED = ROOT / "realgen_jax" / "embedded"
SUBJECTS = json.loads((ROOT / "reward_bridge" / "embedded" / "subjects.json").read_text())


def test_the_folders_of_the_rewriter_stay_small():
    """Autoencoder, CLIP and scheduler of the image model are those of FLUX, by links."""
    for name, most in (("flux_words", 6e6), ("qwen_tiny", 1e6)):
        files = [f for f in (EMBEDDED / name).rglob("*") if f.is_file() and not f.is_symlink()]
        assert most / 2 < sum(f.stat().st_size for f in files) < most
    assert (EMBEDDED / "flux_words" / "vae" / "config.json").is_symlink()


def trained(cache, tmp_path, preset, seed):
    """First and last evaluation of a run, and the share of its rewrites that name the subject."""
    words = [f"--config.run_root={tmp_path}", "--config.run_name=x", f"--config.seed={seed}"]
    words += ["--config.evaluate.after_training=False"]
    config = f"{ROOT}/configs/rewriter_grpo.py:{preset}"
    subprocess.run(command("train.py", cache, *words, config=config), check=True)
    evaluations = [row for row in rows(tmp_path / "x") if row["kind"] == "eval"]

    lines = (tmp_path / "x" / "rewrites.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "eval"]
    last = [record for record in records if record["epoch"] == evaluations[-1]["epoch"]]
    named = []
    for record in last:
        (subject,) = [name for name in SUBJECTS if name in record["prompt"]]
        named.append(subject in record["rewrite"])
    return evaluations[0], evaluations[-1], sum(named) / len(named)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_rewriter_learns_words_that_make_pictures_more_real(cache, tmp_path, seed):
    start, end, named = trained(cache, tmp_path, "tiny_rewriter", seed)
    assert end["embedded_detector"] >= start["embedded_detector"] + 0.08
    assert end["embedded_held_out"] >= start["embedded_held_out"] + 0.04
    assert end["embedded_prompt_accuracy"] >= 0.95
    assert end["embedded_frechet"] <= start["embedded_frechet"]
    assert named >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_alignment_it_learns_to_fool_the_detector(cache, tmp_path, seed):
    """The checks of the test above can fail."""
    start, end, named = trained(cache, tmp_path, "tiny_rewriter_greedy", seed)
    assert end["embedded_detector"] >= start["embedded_detector"] + 0.2
    assert end["embedded_prompt_accuracy"] < 0.5
    assert named < 0.97
