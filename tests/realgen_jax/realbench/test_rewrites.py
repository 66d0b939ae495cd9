"""The page "What the rewriter learnt"."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from realgen_configs.flux_grpo import get_config
from realgen_jax.realbench.aggregate import leaderboard
from realgen_jax.realbench.report import write_report
from realgen_jax.realbench.results import Entry, PromptSet, Results, ScoredPicture
from realgen_jax.realbench.rewrites import write_rewriter_page
from realgen_jax.rewriter.records import FILE, keep_records

NASTY = 'a cat </script><script>throw "out"</script>'
SETTINGS = {
    "min_words": 1,
    "max_words": 9,
    "text_rewards": {"usable": 1.0},
    "spam_patterns": ["8k"],
    "answer_tag": "",
}


def keep(run, epoch, kind, prompts, rewrites, rewards, pictures):
    images = np.zeros((pictures, 3, 16, 16), np.uint8)
    usable = [bool(rewrite) for rewrite in rewrites]
    keep_records(run, epoch, kind, prompts, rewrites, usable, rewards, images)


@pytest.fixture
def run(tmp_path):
    """Six test prompts at two times, and the rewrites of two training prompts."""
    folder = tmp_path / "NAME"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"rewriter": SETTINGS}))
    prompts = [f"cat {i}" for i in range(5)] + [NASTY]
    before = [f"grey cat {i}" for i in range(5)] + [NASTY]
    after = [f"bright cat {i}, 8k" for i in range(5)] + [NASTY + " 8k"]
    keep(folder, 0, "eval", prompts, before, [0.1] * 6, 6)
    keep(folder, 3, "train", ["dog"] * 2, ["early", "dogs"], [0.0, 1.0], 0)
    keep(folder, 5, "train", ["dog"] * 3 + ["owl"], ["a wide dog", "", "a dim dog", "owl"],
         [0.9, 0.2, 0.1, 0.5], 2)  # fmt: skip
    keep(folder, 5, "eval", prompts, after, [0.2, 0.3, 0.4, 0.5, 0.6, 0.1], 6)
    return folder


def text_of(html):
    """What a reader sees, in one line."""
    html = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_the_page_shows_words_figures_and_rewrites(run, tmp_path):
    page = write_rewriter_page(run, tmp_path / "report")
    assert page == tmp_path / "report" / "rewriter.html"
    html = page.read_text()
    text = text_of(html)

    # -- Words, with counts, the surest first.
    assert "Rewrites of the test prompts after 5 epochs (6), against those after 0 (6)." in text
    gained, lost = text.split("Gained ")[1].split(" Lost ")
    assert "8k 0.0 % (0) → 100.0 % (6)" in gained
    assert gained.index("8k") < gained.index("bright 0.0 % (0) → 83.3 % (5)")
    assert "grey 83.3 % (5) → 0.0 % (0)" in lost
    assert "cat" not in lost.split("Figures")[0].split("grey")[0]

    # -- Figures of every evaluation.
    assert "5 0.350 100.0 % 4.167" in text  # reward, usable, words

    # -- Before and after, and best and worst of the last epoch that was sampled.
    assert text.index("cat 4 grey cat 4 epoch 0 0.100 bright cat 4, 8k epoch 5 0.600") < text.index(
        "cat 0 grey cat 0"
    )
    assert "a wide dog reward 0.900" in text
    assert "(nothing) reward 0.200 not drawn: the prompt was" in text
    assert "Only the best has: wide" in text
    assert "Only the worst has: dim" in text
    assert "early" not in text
    assert "owl" not in text  # nothing to compare it with

    # -- It needs no network, and prompts are no markup.
    assert "http" not in html
    assert "<script" not in html
    assert html.count("data:image/webp;base64,") == 14


def test_one_evaluation_has_nothing_to_compare(tmp_path):
    run = tmp_path / "one"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"rewriter": SETTINGS}))
    (run / FILE).write_text("")
    assert write_rewriter_page(run, tmp_path / "report") is None
    keep(run, 0, "eval", ["cat"], ["a cat"], [0.1], 0)
    text = text_of(write_rewriter_page(run, tmp_path / "report").read_text())
    assert "after 0 epochs (1). There is no other evaluation to compare them with." in text
    assert "Before and after" not in text


def test_a_run_without_a_config_is_named(run, tmp_path):
    (run / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json does not tell how the run rewrote prompts"):
        write_rewriter_page(run, tmp_path)


def test_the_report_of_a_comparison_links_the_page(run, tmp_path):
    """The run that trained an entry's rewriter has the records."""
    config = get_config().unlock()
    config.evaluate.update({"scores": ("detector",), "detectors": ("detector",), "resamples": 10})
    file = tmp_path / "00000.png"
    Image.new("RGB", (16, 16)).save(file)

    def report(*entries):
        pictures = [
            ScoredPicture(entry.name, "short", 0, 0, file, "0", 16, 16, {"detector": 0.5})
            for entry in entries
        ]
        results = Results([PromptSet("short", ["a"], [""])], entries, ("detector",), pictures, [])
        rows = leaderboard(results, config.evaluate, np.random.default_rng(0))
        return write_report(tmp_path / "run", config, results, rows, None, [], seed=0)

    base = Entry("base", "model", "tiny")
    link = '<a href="rewriter.html">What the rewriter learnt</a>'
    assert link not in report(base).read_text()
    assert not (tmp_path / "run" / "report" / "rewriter.html").exists()

    index = report(base, Entry("A", "model", "tiny", rewriter=str(run / "rewriter"), of="base"))
    assert link in index.read_text()
    assert f"prompts by {run / 'rewriter'}" in index.read_text()
    assert "What the rewriter learnt: NAME" in index.with_name("rewriter.html").read_text()
