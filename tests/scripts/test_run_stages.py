"""scripts/run_stages.py: which programs it calls, and how it goes on."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from realgen_scripts import run_stages
from tests.helpers.chat import parrot
from tests.helpers.goldens import ROOT, TESTS
from tests.helpers.running import GOLDEN, QUICK

LEAVES = {
    "rewriter": "rewriter/rewriter/rewriter.json",
    "prompts": "prompts.jsonl",
    "image": "image/lora/adapter_config.json",
    "report": "image/report/index.html",
}


class Programs:
    """Stands in for the programs: records how they are called, and leaves their results."""

    def __init__(self, folder):
        self.folder = folder
        self.calls = []
        self.fails = None

    def __call__(self, command):
        name = self.name(command)
        self.calls.append((name, command))
        if name == self.fails:
            return 1
        file = self.folder / LEAVES[name]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
        if name in ("rewriter", "image"):
            config = {
                "prompts": {"train": "short.txt", "max_tokens": 24},
                "pretrained": {"model": "models/looks"},
                "train": {"lora": True},
            }
            (self.folder / name / "config.json").write_text(json.dumps(config))
        return 0

    @staticmethod
    def name(command):
        script = Path(command[1]).name
        if script == "train.py":
            return "rewriter" if "--config.run_name=rewriter" in command else "image"
        return {"rewrite.py": "prompts", "evaluate.py": "report"}[script]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    programs = Programs(tmp_path / "both")
    monkeypatch.setattr(run_stages, "run_child", programs)
    return programs


def run(monkeypatch, root, *options):
    words = ["run_stages.py", "--name=both", f"--run_root={root}", *options]
    monkeypatch.setattr(sys, "argv", words)
    run_stages.main()


def test_the_parts_are_called_in_turn_with_what_they_share(programs, tmp_path, monkeypatch, capsys):
    run(monkeypatch, tmp_path, "--keep=0.5", "--to_image=--config.num_epochs=3",
        "--to_rewriter=--config.seed=7", "--to_evaluate=--judge=embedded")  # fmt: skip
    assert [name for name, _ in programs.calls] == ["rewriter", "prompts", "image", "report"]
    rewriter, prompts, image, report = [command for _, command in programs.calls]
    folder = tmp_path / "both"
    assert "--config.seed=7" in rewriter
    assert "--config.seed=7" not in image
    assert {
        "--prompts=short.txt",
        "--pipeline=models/looks",
        "--max_tokens=24",
        "--keep=0.5",
    } <= set(prompts)
    for command in (image, report):
        assert {"--config.pretrained.model=models/looks", "--config.num_epochs=3"} <= set(command)
    assert f"--config.prompts.train={folder / 'prompts.jsonl'}" in image
    assert {f"--rewriter=rewriter={folder}/rewriter/rewriter", "--judge=embedded"} <= set(report)
    assert f"--lora=trained={folder}/image/lora" in report
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {folder}/image/report/index.html"


@pytest.mark.parametrize("part", ["rewriter", "prompts", "image", "report"])
def test_it_goes_on_with_the_part_that_failed(programs, tmp_path, monkeypatch, part):
    programs.fails = part
    with pytest.raises(SystemExit, match=r"^error: the .* failed \(see above\); the same command"):
        run(monkeypatch, tmp_path)
    assert [name for name, _ in programs.calls][-1] == part
    programs.calls.clear()
    programs.fails = None
    run(monkeypatch, tmp_path)
    names = list(LEAVES)
    assert [name for name, _ in programs.calls] == names[names.index(part) :]
    programs.calls.clear()
    run(monkeypatch, tmp_path)
    assert programs.calls == []

    # A result that is gone is made again.
    (programs.folder / LEAVES["prompts"]).unlink()
    run(monkeypatch, tmp_path)
    assert [name for name, _ in programs.calls] == ["prompts"]


def test_a_part_that_is_done_otherwise_is_refused(programs, tmp_path, monkeypatch):
    run(monkeypatch, tmp_path)
    message = (
        r"^error: the prompts: done with --keep=0\.25, but is now asked for with --keep=0\.5; "
    )
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, tmp_path, "--keep=0.5")


def test_a_config_of_the_other_stage_is_refused(programs, tmp_path, monkeypatch):
    message = (
        r"^error: --image is configs/rewriter_grpo\.py, whose config\.stage is 'rewriter'; exp"
    )
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, tmp_path, "--image=configs/rewriter_grpo.py")
    with pytest.raises(SystemExit, match=r"^error: --config nothing: no such file"):
        run(monkeypatch, tmp_path, "--rewriter=nothing")
    assert programs.calls == []
    assert not (tmp_path / "both").exists()


def test_a_program_that_leaves_nothing_is_named(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(run_stages, "run_child", lambda command: 0)
    with pytest.raises(
        SystemExit, match=r"the rewriter left no .*rewriter\.json; the same command"
    ):
        run(monkeypatch, tmp_path)


@pytest.mark.slow
def test_both_stages_and_the_comparison(cache, tmp_path):
    """Of the golden models: whole once, then nothing is left to do."""
    model = parrot(tmp_path / "words", ["cat", "frog", "husk"])
    shared = [
        f"--config.compilation_cache={cache / 'xla'}",
        f"--config.prompts.cache={cache / 'text'}",
        "--config.num_epochs=1",
        "--config.evaluate.images_per_prompt=1",
        "--config.evaluate.scores=('embedded_detector',)",
        "--config.evaluate.detectors=('embedded_detector',)",
        "--config.evaluate.resamples=100",
    ]
    words = [
        *("--name=both", f"--run_root={tmp_path}", "--keep=0.5"),
        f"--rewriter={TESTS / 'helpers' / 'rewriter_config.py'}",
        f"--image={GOLDEN}",
        f"--to_rewriter=--config.rewriter.path={model}",
        *(f"--to_rewriter={word}" for word in shared),
        *(f"--to_image={word}" for word in shared),
        "--to_evaluate=--judge=embedded",
    ]
    command = [sys.executable, str(ROOT / "scripts" / "run_stages.py"), *words]

    def called():
        return subprocess.run(
            command, capture_output=True, text=True, timeout=500, env={**os.environ, **QUICK}
        )

    done = called()
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "both"
    report = folder / "image" / "report"
    assert done.stdout.splitlines()[-1] == f"report: {report}/index.html"
    prompts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    rewritten = [line["prompt"] != line["original"] for line in prompts]
    assert sum(rewritten) == len(prompts) // 2
    with (report / "scores.csv").open(newline="") as file:
        entries = [row["entry"] for row in csv.DictReader(file)]
    assert list(dict.fromkeys(entries)) == ["base", "rewriter", "trained", "trained+rewriter"]
    assert "What the rewriter learnt" in (report / "index.html").read_text()
    assert (report / "rewriter.html").exists()

    done = called()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:-1] == [
        f"{part}: done before"
        for part in ("the rewriter", "the prompts", "the image model", "the comparison")
    ]
