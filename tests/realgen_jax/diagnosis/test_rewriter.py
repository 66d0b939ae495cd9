"""Checks of runs that train the rewriter: a healthy run, made up, and one fault at a time."""

import json

import numpy as np
import pytest

from realgen_configs.rewriter_grpo import get_config
from realgen_jax.diagnosis.diagnose import REWRITER_CHECKS, diagnose
from realgen_jax.diagnosis.finding import FINE, NOTE, PROBLEM

EPOCHS = 12
REWARDS = ("embedded_detector", "clip_score", "usable", "kept")


def healthy():
    """Rows of a run whose reward rises."""
    noise = np.random.default_rng(0).normal(size=(2, EPOCHS + 1)) * 0.01
    rows = []
    for epoch in range(EPOCHS + 1):
        if epoch:
            row = {"kind": "train", "epoch": epoch, "reward": 0.5 + 0.02 * epoch + noise[0, epoch]}
            row |= {"reward_std": 0.2, "zero_spread": 0.0, "ratio_deviation": 0.0}
            row |= {f"reward/{name}": 0.5 for name in REWARDS}
            row |= {f"reward_std/{name}": 0.2 for name in REWARDS}
            row |= {f"zero_spread/{name}": 0.0 for name in REWARDS}
            row |= {"first_ratio_deviation": 0.0, "std_ratio": 1.0, "steps": 1, "kl": 0.02}
            row |= {"grad_norm": 0.3, "update_norm": 0.01, "param_norm": 10.0, "gap_flips": 0.0}
            row |= {"text/words": 8.0, "text/tail": 0.1, "text/unusable": 0.0}
            rows.append(row)
        if epoch % 4 == 0:
            row = {"kind": "eval", "epoch": epoch, "reward": 0.5 + 0.02 * epoch + noise[1, epoch]}
            row |= dict.fromkeys(("embedded_held_out", "embedded_prompt_accuracy"), 0.9)
            row |= {"embedded_frechet": 0.1, "signal/rewrites": 0.4, "std/reward": 0.2}
            row |= {"noise/embedded_detector": 0.0, "noise/clip_score": 0.0}
            rows.append(row)
    return rows


def stuck(rows):
    """The reward does not rise."""
    for row in rows:
        row["reward"] = 0.5 + 0.01 * (row["epoch"] % 2)


def answer(folder, *faults, flat=False):
    """The diagnosis of the healthy run with these values in all rows that have them."""
    rows = healthy()
    if flat:
        stuck(rows)
    for key, value in faults:
        for row in rows:
            if key in row:
                row[key] = value
    (folder / "config.json").write_text(json.dumps(get_config().to_dict()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return diagnose(folder)


def test_a_healthy_run_is_fine(tmp_path):
    result = answer(tmp_path)
    assert result.of(PROBLEM, NOTE) == []
    assert result.trend == "rises"
    names = {finding.name for finding in result.of(FINE)}
    assert {"signal", "KL of the rewriter", "length", "last words", "sampler and replay"} <= names
    assert len(names) >= len(REWRITER_CHECKS) - 3  # some need correlations or noise


@pytest.mark.parametrize(
    ("fault", "flat", "name", "severity", "remedy"),
    [
        (("signal/rewrites", 0.01), True, "signal", PROBLEM, "images_per_rewrite=2"),
        (("kl", 3.0), True, "KL of the rewriter", PROBLEM, "--config.train.beta=0.5"),
        (("text/words", 14.0), False, "length", NOTE, "text_rewards.length=1.0"),
        (("gap_flips", 0.1), False, "sampler and replay", NOTE, "rewriter.dtype=float32"),
        (("text/unusable", 0.4), False, "unusable rewrites", PROBLEM, "max_new_tokens"),
        (("first_ratio_deviation", 0.1), False, "ratio deviation", PROBLEM, "recompute_old"),
    ],
)
def test_an_illness_is_found_with_its_remedy(tmp_path, fault, flat, name, severity, remedy):
    findings = answer(tmp_path, fault, flat=flat).of(PROBLEM, NOTE)
    finding = next(finding for finding in findings if finding.name == name)
    assert finding.severity == severity
    assert remedy in finding.remedy
    assert finding.says


def test_a_suffix_that_every_prompt_gets_is_found(tmp_path):
    """Unless the language model always had it."""
    rows = healthy()
    trained = [row for row in rows if row["kind"] == "train"]
    for row, share in zip(trained, np.linspace(0.1, 0.9, len(trained)), strict=True):
        row["text/tail"] = float(share)
    (tmp_path / "config.json").write_text(json.dumps(get_config().to_dict()))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [finding.name for finding in diagnose(tmp_path).of(PROBLEM, NOTE)]
    assert names == ["last words"]
    assert answer(tmp_path, ("text/tail", 0.9)).of(PROBLEM, NOTE) == []
