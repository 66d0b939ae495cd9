"""Diagnose a recorded healthy run, that run with one fault at a time, and real runs with faults."""

import copy
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from realgen_configs.flux_grpo import get_config
from realgen_jax.diagnosis.diagnose import diagnose
from realgen_jax.diagnosis.finding import FINE, NOTE, PROBLEM
from realgen_jax.diagnosis.metrics import Metrics
from realgen_scripts import diagnose as program
from tests.helpers import running
from tests.helpers.running import ROOT, command

# 12 epochs of the embedded model
HEALTHY = json.loads((ROOT / "tests" / "data" / "healthy_run.json").read_text())
NAMES = [
    "zero-spread groups",
    "one reward drowning the others",
    "reward noise",
    "ratio deviation",
    "clip range",
    "vanishing gradient",
    "learning rate",
    "KL penalty",
    "gradient norm",
    "clip fraction",
    "sides of clipping",
    "held-out checks",
    "correlation",
    "diversity",
]
# Of runs that record more.
MORE = [
    "pictures of a prompt",
    "old policy",
    "matching error",
    "dropped pictures",
    "velocity norm",
    "previews",
]


def write(folder, run):
    """Write the run to a folder as train.py does, and return the folder."""
    (folder / "config.json").write_text(json.dumps(run["config"]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run["rows"]))
    return folder


def rows_of(run, kind):
    return [row for row in run["rows"] if row["kind"] == kind]


def put(run, kind="train", **values):
    """Set metrics in every row of a kind.

    "__" in a name stands for "/". A pair of values is the first and the last row's; the rest is
    interpolated.
    """
    rows = rows_of(run, kind)
    for key, value in values.items():
        first, last = np.broadcast_to(value, 2)
        for row, number in zip(rows, np.linspace(first, last, len(rows)), strict=True):
            row[key.replace("__", "/")] = float(number)


def option(run, path, value):
    *parents, last = path.split(".")
    section = run["config"]
    for parent in parents:
        section = section[parent]
    section[last] = value


def stuck(run):
    """The reward keeps its noise and loses its rise."""
    for kind in ("train", "eval"):
        rows = rows_of(run, kind)
        for key in ("reward", "embedded_detector", "reward/embedded_detector"):
            if key in rows[0]:
                remove_trend(rows, key)


def remove_trend(rows, key):
    epochs = np.array([row["epoch"] for row in rows], float)
    values = np.array([row[key] for row in rows])
    slope, _ = np.polyfit(epochs, values, 1)
    for row, epoch in zip(rows, epochs, strict=True):
        row[key] -= slope * epoch


SECTIONS = ("dppo", "nft", "awm", "norm_guard")  # of config.train, which the healthy run lacks


def zero_spread(run, share):
    put(run, zero_spread=share)


def weight(run, value):
    option(run, "reward.fn.embedded_detector", value)


def faint(run, std):
    put(run, reward_std__clip_score=std)


def solved(run, share):
    put(run, zero_spread__clip_score=share)


def noise(run, value):
    put(run, "eval", noise__embedded_detector=value)


def ratio(run, value):
    put(run, first_ratio_deviation=value)


def narrow(run, value):
    stuck(run)
    option(run, "train.clip_range", value)


def steps(run, relative):
    """Every step changes the weights by this much of their norm."""
    stuck(run)
    for row in rows_of(run, "train"):
        row["update_norm"] = relative * row["param_norm"]


def beta(run, value):
    stuck(run)
    option(run, "train.beta", value)


def vanishing(run, norm):
    """If the gradient g is below Adam's epsilon, 1e-8, a step is lr g / eps."""
    stuck(run)
    for row in rows_of(run, "train"):
        row["grad_norm"] = norm
        row["update_norm"] = min(row["update_norm"], 1e-3 * norm / 1e-8)


def gradient(run, norm):
    stuck(run)
    put(run, grad_norm=norm)


def clipped(run, share, ranges=40):
    """With two steps per epoch, the second step's share is twice the mean."""
    stuck(run)
    deviation = ranges * run["config"]["train"]["clip_range"]
    put(
        run,
        clipfrac=share / 2,
        clipfrac_gt_one=share / 4,
        clipfrac_lt_one=share / 4,
        ratio_deviation=deviation,
    )


def clipped_nearby(run, share):
    clipped(run, share, ranges=10)


def one_sided(run, above):
    put(run, clipfrac_gt_one=above, clipfrac_lt_one=0.04, clipfrac=above + 0.04)


def held_out(run, last):
    put(run, "eval", embedded_held_out=[0.316, last])


def frechet(run, last):
    put(run, "eval", embedded_frechet=[0.07, last])


def correlation(run, last):
    put(run, "eval", correlation__embedded_held_out=[0.57, last])


def alike(run, last):
    stuck(run)
    put(run, "eval", prompt_std=[0.05, last * 0.05])


def copies(run, last):
    """The pictures of a prompt grow alike; the scores keep their spread."""
    option(run, "reward.watched", ["diversity"])
    put(run, diversity=[0.08, last * 0.08])


def added(run, std):
    """One reward has a small scale, and the rewards are added as they are."""
    option(run, "train.advantages", "dr_grpo")
    put(run, reward_std__clip_score=std, reward_std__embedded_detector=0.05)


def objective(run, loss, **recorded):
    """A run of another objective, which records other figures and does not clip by clip_range."""
    run["config"]["train"] |= {key: get_config("tiny").to_dict()["train"][key] for key in SECTIONS}
    option(run, "train.loss", loss)
    option(run, "train.clip_range", 1e-12)
    for row in rows_of(run, "train"):
        for key in [key for key in row if "ratio_deviation" in key or key.startswith("clipfrac")]:
            del row[key]
    put(run, **recorded)


def nft(run, distance):
    """As the embedded model with a tenfold learning rate and without KL."""
    stuck(run)
    objective(run, "nft", old_distance=[distance, distance / 2], loss_pos=0.4)
    option(run, "train.beta", 0.0)


def awm(run, last):
    """As the embedded model without clips and KLs, and with a fivefold learning rate."""
    stuck(run)
    objective(run, "awm", matching_error=[0.9, last])


def dppo(run, divergence):
    """Two steps an epoch: the mean over them has half of what the second one has."""
    stuck(run)
    objective(run, "dppo", kept_share=0.6, divergence=divergence, first_ratio_deviation=0.0)


def dppo_that_rises(run, divergence):
    objective(run, "dppo", kept_share=0.6, divergence=divergence, first_ratio_deviation=0.0)


def dppo_ratio(run, value):
    objective(run, "dppo", kept_share=0.9, divergence=1e-6, first_ratio_deviation=value)


def long(run, norm):
    put(run, velocity_norm=[1.0, norm])


def too_long(run, norm):
    stuck(run)
    long(run, norm)


def previews(run, correlation):
    put(run, scout__rank_correlation=correlation)


def falling(run, slope):
    stuck(run)
    for row in run["rows"]:
        row["reward"] += slope * row["epoch"]


# Fault, a bad value, a good value near it, the finding, its severity, a part of its text.
FAULTS = [
    (zero_spread, 0.6, 0.19, "zero-spread groups", PROBLEM, "sample.num_image_per_prompt=32)"),
    (zero_spread, 0.3, 0.19, "zero-spread groups", NOTE, "In 30% of the groups"),
    (weight, 500.0, 4.0, "one reward drowning the others", PROBLEM, "the weights are the cause"),
    (weight, 10.0, 4.0, "one reward drowning the others", NOTE, "--config.reward.fn.clip_score=10"),
    (faint, 1e-7, 1e-3, "one reward drowning the others", PROBLEM, "vanishes beside the 0.0001"),
    (solved, 1.0, 0.1, "one reward drowning the others", PROBLEM, "none at all in 100% of the"),
    (solved, 1.0, 0.1, "one reward drowning the others", PROBLEM, "check its options, or drop it"),
    (noise, 0.12, 0.03, "reward noise", PROBLEM, "--config.reward.fn.embedded_detector=0.25"),
    (noise, 0.075, 0.03, "reward noise", NOTE, "different scores"),
    (ratio, 2e-4, 9e-5, "ratio deviation", PROBLEM, "--config.train.recompute_old=True"),
    (narrow, 1e-6, 3e-5, "clip range", PROBLEM, "8 float32 steps wide"),
    (steps, 1e-7, 0.005, "learning rate", PROBLEM, "hardly move"),
    (steps, 0.3, 0.05, "learning rate", PROBLEM, "--config.train.learning_rate=2e-05, or lower"),
    (beta, 3.0, 0.1, "KL penalty", PROBLEM, "whether this is the cause: --config.train.beta=0."),
    (vanishing, 1e-6, 5e-5, "vanishing gradient", PROBLEM, "next to no gradient"),
    (gradient, 50.0, 0.9, "gradient norm", PROBLEM, "--config.train.max_grad_norm=1e+02"),
    (gradient, 5.0, 0.9, "gradient norm", NOTE, "Every gradient is clipped"),
    (clipped, 0.98, 0.8, "clip fraction", PROBLEM, "--config.train.clip_range=0.01"),
    (clipped_nearby, 0.98, 0.8, "clip fraction", NOTE, "by up to 10 ranges"),
    (one_sided, 0.3, 0.1, "sides of clipping", NOTE, "Nearly all clipped ratios are above 1"),
    (held_out, 0.25, 0.3, "held-out checks", PROBLEM, "The reward rises, so the model exploits"),
    (frechet, 0.1, 0.08, "held-out checks", PROBLEM, "--config.train.beta=0.1"),
    (correlation, 0.05, 0.2, "correlation", NOTE, "other pictures"),
    (alike, 0.1, 0.5, "diversity", PROBLEM, "Look at RUN/samples"),
    (copies, 0.05, 0.5, "pictures of a prompt", PROBLEM, "'diversity': 0.5}\""),
    (added, 1e-3, 0.05, "one reward drowning the others", PROBLEM, "advantages=per_reward, or"),
    (dppo_ratio, 2e-3, 1e-3, "ratio deviation", PROBLEM, "what config.train.dppo.threshold allows"),
    (nft, 0.05, 0.005, "old policy", PROBLEM, "Nothing holds it: beta is 0"),
    (awm, 5.0, 1.2, "matching error", PROBLEM, "--config.train.awm.beta_ema=2"),
    (dppo, 1e-3, 1e-5, "dropped pictures", PROBLEM, "80% are dropped"),
    (dppo_that_rises, 1e-3, 1e-5, "dropped pictures", NOTE, "--config.train.dppo.threshold=0.0007"),
    (long, 1.3, 1.1, "velocity norm", NOTE, "--config.train.norm_guard.weight=1, or"),
    (too_long, 2.0, 1.1, "velocity norm", PROBLEM, "as long as the base model's"),
    (previews, 0.1, 0.5, "previews", NOTE, "chosen at random"),
    (falling, -0.01, 0.01, "no cause found", PROBLEM, "No check explains it"),
    (falling, 0.0, 0.01, "no cause found", NOTE, "could hide in the noise"),
]  # fmt: skip


def answer_of(folder, fault=None, value=None):
    """Diagnose the healthy run with a fault."""
    run = copy.deepcopy(HEALTHY)
    if fault:
        fault(run, value)
    return diagnose(write(folder, run))


def names(findings):
    return [finding.name for finding in findings]


@pytest.fixture
def call(monkeypatch):
    """Call the program in this process and return its exit status."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["diagnose.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            program.main()
        return ended.value.code

    return call


def test_a_healthy_run_is_called_healthy(tmp_path, capsys, call):
    answer = answer_of(tmp_path)
    assert answer.trend == "rises"
    assert names(answer.findings) == NAMES
    assert {finding.severity for finding in answer.findings} == {FINE}
    assert not answer.not_recorded
    assert call(tmp_path) == 0
    printed = capsys.readouterr().out
    start = "The reward rises. In training, epochs 1-12: +0.0059 per epoch (standard error"
    assert printed.startswith(start)
    assert "Healthy: no problems found." in printed
    assert "ratio deviation: largest |ratio - 1| before any step 0 (<= 1.0e-04)" in printed


@pytest.mark.parametrize(("advantages", "is_told"), [("per_reward", True), ("gardo", False)])
def test_a_bonus_for_pictures_that_differ_is_watched_too(tmp_path, advantages, is_told):
    def rewarded(run, last):
        option(run, "train.advantages", advantages)
        run["config"]["reward"]["fn"]["diversity"] = 0.5
        put(run, noise__diversity=0.0, kind="eval")
        put(run, reward_std__diversity=0.05, zero_spread__diversity=0.0)
        put(run, reward__diversity=[0.08, last * 0.08])

    (problem,) = answer_of(tmp_path, rewarded, 0.05).of(PROBLEM)
    assert problem.name == "pictures of a prompt"
    assert ("config.train.advantages=gardo" in problem.remedy) == is_told
    assert not answer_of(tmp_path, rewarded, 0.6).of(PROBLEM)


# `diversity` in 20 epochs of the demo, and of the demo with reward.fn = {"diversity": -1.0},
# train.beta = 0 and train.learning_rate = 0.003: trained towards copies.
DEMO = (0.113, 0.190, 0.148, 0.085, 0.154, 0.069, 0.125, 0.130, 0.132, 0.158, 0.102, 0.138, 0.155,
        0.133, 0.094, 0.086, 0.120, 0.128, 0.048, 0.112)  # fmt: skip
COPIES = (0.113, 0.186, 0.132, 0.066, 0.100, 0.032, 0.065, 0.057, 0.043, 0.049, 0.031, 0.027, 0.036,
          0.039, 0.024, 0.020, 0.030, 0.039, 0.020, 0.027)  # fmt: skip


@pytest.mark.parametrize(("values", "severity"), [(DEMO, FINE), (COPIES, PROBLEM)])
def test_a_run_trained_towards_copies_is_told(tmp_path, values, severity):
    def recorded(run, _):
        option(run, "reward.watched", ["diversity"])
        evaluations = rows_of(run, "eval")
        rows = rows_of(run, "train")
        run["rows"] = evaluations
        for epoch, value in enumerate(values, start=1):
            row = rows[min(epoch, len(rows)) - 1]
            run["rows"].append({**row, "epoch": epoch, "diversity": value})

    answer = answer_of(tmp_path, recorded)
    (found,) = [finding for finding in answer.findings if finding.name == MORE[0]]
    assert found.severity == severity


def test_pareto_fronts_have_no_shares(tmp_path):
    def front(run, _):
        option(run, "train.advantages", "pareto")
        weight(run, 500.0)

    assert "one reward drowning the others" not in names(answer_of(tmp_path, front).findings)


def learns(run, held_out=("embedded_held_out",), metrics=("embedded_frechet",)):
    """The detector learns: its reward falls, and the generator rests in some epochs."""
    falling(run, -0.01)
    run["config"]["reward"]["adversarial"] = {"embedded_detector": {}}
    run["config"]["reward"]["held_out"] = held_out
    run["config"]["reward"]["metrics"] = metrics
    for row in rows_of(run, "train"):
        row["reward_std"] /= row["epoch"]
    for row in rows_of(run, "train")[::3]:
        row.pop("ratio_deviation")
        row.pop("first_ratio_deviation")


def test_a_run_whose_rewards_learn_is_judged_by_a_check(tmp_path):
    answer = answer_of(tmp_path, lambda run, _: learns(run))
    assert answer.trend == "rises"
    assert answer.verdict.startswith("embedded_held_out rises. In evaluations, epochs 0-12: ")
    learned = "embedded_detector learned during the run, so the level of this reward says little"
    assert learned in answer.verdict
    assert "Each reward in training: clip_score " in answer.verdict
    assert "learned during the run" not in answer_of(tmp_path).verdict
    assert names(answer.findings) == NAMES
    assert not answer.of(PROBLEM, NOTE)


@pytest.mark.parametrize(
    ("held_out", "metrics", "values", "trend", "problems"),
    [
        (("embedded_held_out",), (), (0.4, 0.2), "falls", ["held-out checks"]),
        ((), ("embedded_frechet",), (0.07, 0.05), "falls", []),
        ((), ("embedded_frechet",), (0.07, 0.0701), "barely rises", []),
        ((), ("embedded_frechet",), (0.05, 0.058), "rises", ["no cause found"]),
        ((), ("embedded_frechet",), (0.05, 0.07), "rises", ["held-out checks"]),
        ((), (), (0, 0), "unknown", []),
    ],
)
def test_checks_judge_a_run_whose_rewards_learn(
    tmp_path, held_out, metrics, values, trend, problems
):
    def fault(run, _):
        learns(run, held_out, metrics)
        for name in (*held_out, *metrics):
            put(run, "eval", **{name: values})

    answer = answer_of(tmp_path, fault)
    assert answer.trend == trend
    assert names(answer.of(PROBLEM)) == problems
    if problems == ["held-out checks"]:
        assert "they do not keep up" in answer.findings[0].says


def test_a_run_that_nothing_can_judge_says_so(tmp_path):
    def fault(run, _):
        learns(run, (), ())
        option(run, "train.beta", 3.0)  # a problem, unless the run improves

    answer = answer_of(tmp_path, fault)
    assert answer.verdict.startswith("Whether the run improves is unknown")
    assert not answer.trends
    skipped = "three rows of eval a held-out reward or a metric (for kl_penalty)"
    assert skipped in answer.not_recorded
    assert "learning rate" in names(answer.findings)  # for which the direction does not matter


@pytest.mark.parametrize(("fault", "bad", "good", "name", "severity", "text"), FAULTS)
def test_a_fault_is_found_and_nothing_else(tmp_path, fault, bad, good, name, severity, text):
    answer = answer_of(tmp_path, fault, bad)
    first = answer.findings[0]
    assert (first.name, first.severity) == (name, severity)
    assert text in f"{first.says} {first.remedy}"
    assert first.figures

    # A problem may have notes beside it.
    severities = (PROBLEM,) if severity == PROBLEM else (PROBLEM, NOTE)
    assert names(answer.of(*severities)) == [name]
    assert name not in names(answer_of(tmp_path, fault, good).of(PROBLEM, NOTE))


def test_every_finding_has_a_test_and_every_remedy_names_real_keys(tmp_path):
    assert {name for *_, name, _, _ in FAULTS} == {*NAMES, *MORE, "no cause found"}

    keys = set()
    for fault, bad, *_ in FAULTS:
        for finding in answer_of(tmp_path, fault, bad).of(PROBLEM, NOTE):
            keys.update(re.findall(r"--config\.([\w.]+)=", finding.remedy))
    keys.discard("reward.fn.NAME")
    assert len(keys) > 10

    config = get_config("tiny").to_dict()
    for key in keys:
        section = config
        for part in key.split("."):
            assert part in section, key
            section = section[part]


def test_what_is_usual_in_a_rising_run_is_not_reported(tmp_path):
    """RealGen's clip range of 2e-6 clips nearly everything after an epoch's first step."""

    def realgen(run, _):
        option(run, "train.clip_range", 2e-6)
        option(run, "train.beta", 4e-4)
        put(run, clipfrac=0.48, clipfrac_gt_one=0.25, clipfrac_lt_one=0.23)

    def hardly_clipped(run, _):
        put(run, clipfrac=0.02, clipfrac_gt_one=0.02)

    for usual in (realgen, hardly_clipped):
        assert not answer_of(tmp_path, usual).of(PROBLEM, NOTE)


def test_a_run_at_its_start_is_told_to_wait(tmp_path):
    def young(run, _):
        steps(run, 5e-4)
        option(run, "num_epochs", 1000)

    answer = answer_of(tmp_path, young)
    assert names(answer.of(PROBLEM, NOTE)) == ["learning rate"]
    assert answer.findings[0].severity == NOTE
    assert "too early to tell" in answer.findings[0].says
    assert answer.findings[0].remedy == "Wait until epoch 50 or later."


def test_without_a_gradient_no_larger_learning_rate_is_proposed(tmp_path):
    def constant(run, _):
        stuck(run)
        put(run, zero_spread=1.0, reward_std=0.0, grad_norm=0.0, update_norm=2e-6)
        for name in ("clip_score", "embedded_detector"):
            put(run, **{f"zero_spread/{name}": 1.0, f"reward_std/{name}": 0.0})

    problems = answer_of(tmp_path, constant).of(PROBLEM)
    assert names(problems) == ["zero-spread groups", "vanishing gradient", "learning rate"]
    assert problems[2].remedy == "Nothing here: there is no gradient to follow."


def test_checks_that_fall_with_the_reward_are_damage(tmp_path):
    def damage(run, _):
        falling(run, -0.01)
        held_out(run, 0.2)

    answer = answer_of(tmp_path, damage)
    assert answer.trend == "falls"
    assert names(answer.of(PROBLEM)) == ["held-out checks"]
    assert "training damages the pictures" in answer.findings[0].says


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("embedded_held_out", (0.32, 0.40, 0.42, 0.38, 0.35)),
        ("embedded_frechet", (0.07, 0.05, 0.04, 0.055, 0.065)),
    ],
)
def test_a_check_is_compared_with_its_best_value(tmp_path, name, values):
    def hacked(run, _):
        for row, value in zip(rows_of(run, "eval"), values, strict=True):
            row[name] = value

    answer = answer_of(tmp_path, hacked)
    assert names(answer.of(PROBLEM)) == ["held-out checks"]
    assert answer.findings[0].says.startswith(f"{name} got worse")


def test_an_old_run_lists_once_what_it_did_not_record(tmp_path, capsys, call):
    run = copy.deepcopy(HEALTHY)
    newer = re.compile(r"update_norm|steps|zero_spread$|noise/|std/|correlation/")
    for row in run["rows"]:
        for key in [key for key in row if newer.match(key)]:
            del row[key]

    assert call(write(tmp_path, run)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("not recorded") == 1
    assert "train steps (for clip_fraction)" in printed
    assert "train update_norm (for no_gradient, step_size)" in printed
    assert "held-out checks: embedded_held_out 0.35" in printed

    # Without a spread to compare with, a fall of 0.02 counts.
    for last, status in ((0.30, 0), (0.29, 1)):
        held_out(run, last)
        assert call(write(tmp_path, run)) == status


def test_json_holds_the_same_answer(tmp_path, capsys, call):
    run = copy.deepcopy(HEALTHY)
    zero_spread(run, 0.6)
    assert call(write(tmp_path, run), "--json") == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["trend"] == "rises"
    assert len(answer["trends"]) == 2
    assert len(answer["findings"]) == len(NAMES)
    first = answer["findings"][0]
    assert (first["name"], first["severity"]) == ("zero-spread groups", "problem")
    assert first["figures"] == [
        {"what": "groups without any spread", "value": 0.6, "healthy": "<= 0.2", "epochs": "9-12"}
    ]


def cut_short(run):
    run["rows"] = run["rows"][:5]


def without_learning_rate(run):
    del run["config"]["train"]["learning_rate"]


def without_reward(run):
    for row in rows_of(run, "train"):
        del row["reward"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_short, "has 3 finished epochs; expected 4 or more"),
        (without_learning_rate, "has no key 'learning_rate' in config.json"),
        (without_reward, "has no values of train reward"),
    ],
)
def test_a_run_that_cannot_be_judged_is_an_error_of_one_line(
    tmp_path, capsys, call, change, message
):
    run = copy.deepcopy(HEALTHY)
    change(run)
    assert call(write(tmp_path, run)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path} {message}")


def test_the_program_starts_by_itself(tmp_path):
    folder = tmp_path / "nowhere"
    command = [sys.executable, ROOT / "scripts" / "diagnose.py", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {folder} is not a run's folder: it has no config.json")


def test_an_incomplete_last_line_is_ignored(tmp_path):
    write(tmp_path, HEALTHY)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "epo')
    assert not diagnose(tmp_path).of(PROBLEM, NOTE)


def test_it_needs_neither_jax_nor_torch():
    code = (
        "import sys, realgen_scripts.diagnose; "
        "print(*{'jax', 'torch', 'ml_collections'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def trend_of(epochs, values, spread):
    rows = []
    for epoch, value in zip(epochs, values, strict=True):
        rows.append({"kind": "train", "epoch": int(epoch), "reward": float(value)})
    return Metrics(rows).trend("reward", spread)


# Student's t, 97.5 % quantile, from printed tables, by degrees of freedom.
@pytest.mark.parametrize(
    ("free", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (30, 2.042), (1000, 1.962)],
)
def test_the_margin_is_students(free, quantile):
    epochs = np.arange(free + 2)
    trend = trend_of(epochs, epochs % 2, 1.0)
    assert trend.margin / trend.error == pytest.approx(quantile, abs=6e-4)


def test_the_trend_is_a_least_squares_line():
    epochs = np.arange(1, 21)
    values = np.random.default_rng(0).normal(size=20)
    trend = trend_of(epochs, values, 2.0)

    x = epochs - epochs.mean()
    slope = x @ values / (x @ x)
    residuals = values - values.mean() - slope * x
    assert trend.slope == pytest.approx(slope)
    assert trend.error == pytest.approx(np.sqrt(residuals @ residuals / 18 / (x @ x)))
    assert trend.rise == pytest.approx(19 * slope)
    assert trend.effect == pytest.approx(19 * slope / 2)
    assert trend.direction == "flat"


def test_a_constant_reward_is_flat():
    trend = trend_of(range(5), [0.5] * 5, 0.0)
    assert (trend.slope, trend.error, trend.margin) == (0, 0, 0)
    assert trend.direction == "flat"


# Real runs. The reward is the brightness of a picture, which the golden model (random weights)
# raises within eight epochs.
REWARD = """
import torch


class Brightness:
    def __init__(self, device, constant, noise, scale):
        self.constant = constant
        self.noise = noise
        self.scale = scale

    def __call__(self, images, prompts):
        x = images.float().mean((1, 2, 3)) / 255
        x = torch.full_like(x, 0.5) if self.constant else x
        return self.scale * (x + self.noise * torch.randn(len(x)))
"""
CONFIG = """
from tests.helpers import golden_config
from ml_collections import ConfigDict
from reward_bridge.rewards import REWARDS

for name in ("brightness", "darkness"):
    REWARDS[name] = "bad_rewards:Brightness"


def get_config():
    c = golden_config.get_config().unlock()
    c.num_epochs = 8
    c.eval_freq = 2
    c.save_freq = 8
    c.train.learning_rate = 2e-3
    c.reward.options = ConfigDict({{
        "brightness": {{"constant": False, "noise": 0.0, "scale": 1.0}},
        "darkness": {{"constant": False, "noise": 0.0, "scale": -1.0}},
    }})
    c.reward.fn = ConfigDict({{"brightness": 1.0}})
    c.reward.held_out = ()
    {more}
    return c.lock()
"""


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """Train with a line added to the config, and return the diagnosis."""
    cache = tmp_path_factory.mktemp("cache")

    def train(more="pass"):
        folder = tmp_path_factory.mktemp("run")
        (folder / "bad_rewards.py").write_text(REWARD)
        (folder / "config.py").write_text(CONFIG.format(more=more))
        options = (f"--config.run_root={folder}", "--config.run_name=run")
        words = command("train.py", cache, *options, config=folder / "config.py")
        env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}"}
        done = subprocess.run(words, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return diagnose(folder / "run")

    return train


@pytest.mark.slow
def test_a_real_healthy_run(real_run):
    answer = real_run()
    assert answer.trend == "rises"
    assert not answer.of(PROBLEM, NOTE)
    assert len(answer.not_recorded) == 1  # it has no held-out checks


REAL_FAULTS = [
    ("learning rate", "hardly move", "c.train.learning_rate = 1e-9"),
    ("learning rate", "too high", "c.train.learning_rate = 10.0"),
    ("KL penalty", "pulls the weights back", "c.train.beta = 1e4"),
    ("clip range", "float32 steps wide", "c.train.clip_range = 1e-9"),
    ("vanishing gradient", "next to no gradient", "c.train.adam_epsilon = 1.0"),
    ("zero-spread groups", "In 100% of the groups", "c.reward.options.brightness.constant = True"),
    ("reward noise", "different scores", "c.reward.options.brightness.noise = 0.05"),
    ("held-out checks", "darkness got worse", "c.reward.held_out = ('darkness',)"),
    (
        "one reward drowning the others",
        "the weights are the cause",
        "c.reward.fn.embedded_detector = 1e-3",
    ),
    (
        "one reward drowning the others",
        "vanishes beside",
        "c.reward.fn.darkness = 1.0; c.reward.options.darkness.scale = -1e-6",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text", "more"), REAL_FAULTS)
def test_a_real_run_with_a_fault(real_run, name, text, more):
    first = real_run(more).findings[0]
    assert (first.name, first.severity) == (name, PROBLEM)
    assert text in first.says


# Runs of the embedded model: a random one has nothing to unlearn.
SHORT = (
    "--config.num_epochs=8",
    "--config.eval_freq=4",
    "--config.evaluate.after_training=False",
)
# The config has a window, which decoupled objectives do not: back to the defaults.
NO_WINDOW = (
    "--config.sample.sde_window_size=3",
    "--config.sample.sde_window_range=(0,8)",
    "--config.sample.branches=1",
    "--config.sample.noise_level=0.9",
)
OBJECTIVE_FAULTS = [
    (
        "old policy",
        "beta is 0",
        *NO_WINDOW,
        "--config.train.loss=nft",
        "--config.train.nft.sigmas=4",
        "--config.train.beta=0",
        "--config.train.learning_rate=0.01",
    ),
    (
        "matching error",
        "unlearns how to draw",
        *NO_WINDOW,
        "--config.train.loss=awm",
        "--config.train.awm.sigmas=4",
        "--config.train.awm.beta_ema=0",
        "--config.train.awm.clip_range=1e6",
        "--config.train.beta=0",
        "--config.train.learning_rate=0.005",
        "--config.train.num_inner_epochs=4",
    ),
    (
        "dropped pictures",
        "all that moved as they should",
        "--config.train.loss=dppo",
        "--config.train.dppo.threshold=1e-12",
        "--config.train.num_inner_epochs=2",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text", "words"), [(n, t, w) for n, t, *w in OBJECTIVE_FAULTS])
def test_a_real_run_of_an_objective_with_a_fault(cache, tmp_path, name, text, words):
    where = (f"--config.run_root={tmp_path}", "--config.run_name=run", *SHORT)
    tiny = f"{ROOT / 'configs' / 'flux_grpo.py'}:tiny"
    done = running.call("train.py", cache, *where, *words, config=tiny, XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    findings = diagnose(tmp_path / "run").of(PROBLEM, NOTE)
    (found,) = [finding for finding in findings if finding.name == name]
    assert text in found.says
