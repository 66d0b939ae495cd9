"""scripts/rewrite.py with a language model that knows a few words."""

import json
import sys
from collections import Counter

import pytest

pytest.importorskip("torch")

from realgen_jax.data import read_originals, read_prompts
from realgen_jax.rewriter import writer
from realgen_scripts import rewrite
from tests.helpers.chat import parrot, rewriter_folder
from tests.helpers.goldens import PIPELINE

PROMPTS = [f"a cat number {i}" for i in range(8)]


@pytest.fixture(scope="module")
def rewriter(tmp_path_factory):
    """It answers "bold" or "sky"."""
    root = tmp_path_factory.mktemp("parrot")
    return rewriter_folder(root / "rewriter", parrot(root / "model", ["bold", "sky"]))


@pytest.fixture
def run(tmp_path, rewriter, monkeypatch):
    """Run the program in this process; return the lines of its output."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")

    def call(*options, out="out.jsonl", folder=rewriter):
        words = [f"--rewriter={folder}", f"--prompts={tmp_path / 'prompts.txt'}"]
        words += [f"--out={tmp_path / out}", "--batch=8", *options]
        monkeypatch.setattr(sys, "argv", ["rewrite.py", *map(str, words)])
        rewrite.main()
        return [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]

    return call


def test_rewrites_are_written_beside_their_originals(run, tmp_path, capsys):
    rows = run("--keep=0.25")
    counts = Counter(row["prompt"] for row in rows)
    assert counts["bold"] + counts["sky"] == 6
    assert [row["original"] for row in rows] == PROMPTS
    kept = [row for row in rows if row["prompt"] == row["original"]]
    assert len(kept) == 2
    summary = f"8 prompts in {tmp_path}/out.jsonl: 6 rewritten, 2 left as they are (--keep)"
    assert capsys.readouterr().out.splitlines()[-1] == summary
    assert read_prompts(tmp_path / "out.jsonl") == [row["prompt"] for row in rows]

    # The same command has nothing to do.
    assert run("--keep=0.25") == rows
    assert "out.jsonl is there, made with the same settings" in capsys.readouterr().out


@pytest.mark.slow
def test_without_temperature_the_likeliest_words_are_written(run):
    rows = run("--keep=0", "--temperature=0")
    assert {row["prompt"] for row in rows} == {"bold"}


def test_a_rewrite_depends_on_seed_line_and_copy_alone(run, monkeypatch):
    whole = run("--keep=0", "--per_prompt=3", out="whole.jsonl")
    assert {row["prompt"] for row in whole} == {"bold", "sky"}
    assert [row["original"] for row in whole] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len({tuple(row["prompt"] for row in whole[i : i + 3]) for i in range(0, 24, 3)}) > 1
    assert run("--keep=0", out="one.jsonl") == whole[::3]
    assert run("--keep=0", "--per_prompt=3", "--seed=1", out="seed.jsonl") != whole

    # Killed in the third call, it goes on with that call.
    sample = writer.Writer.rewrite
    calls = []

    def killed(self, prompts, numbers, key):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(self, prompts, numbers, key)

    monkeypatch.setattr(writer.Writer, "rewrite", killed)
    with pytest.raises(KeyboardInterrupt):
        run("--keep=0", "--per_prompt=3", out="killed.jsonl")
    assert run("--keep=0", "--per_prompt=3", out="killed.jsonl") == whole
    assert calls == [8, 8, 8, 8]


def test_rewrites_that_cannot_be_drawn_are_not_written(run, tmp_path, capsys):
    """FLUX would read one token of them, which is T5's end."""
    rows = run("--keep=0", "--max_tokens=1", f"--pipeline={PIPELINE}")
    assert [row["prompt"] for row in rows] == PROMPTS
    assert "8 left as they are because their rewrites cannot be drawn" in capsys.readouterr().out
    assert read_originals(tmp_path / "out.jsonl") == PROMPTS

    # It reads them whole.
    rows = run("--keep=0", "--max_tokens=8", f"--pipeline={PIPELINE}", out="long.jsonl")
    assert {row["prompt"] for row in rows} <= {"bold", "sky"}


def test_what_is_wrong_is_told_in_one_line(run, tmp_path, rewriter):
    run("--keep=1")
    for options, message in (
        (
            ["--keep=0.5"],
            r"^error: .*out\.jsonl was made with other settings: keep 1\.0 then and 0\.5 now",
        ),
        ([f"--model={PIPELINE}"], r"^error: .*pipeline holds no config\.json; the adapters in"),
        ([f"--rewriter={tmp_path}"], r"^error: .*rewriter\.json is missing"),
        ([f"--prompts={tmp_path}/none.txt"], r"^error: .*none\.txt does not exist"),
        ([f"--pipeline={rewriter}"], r"^error: .* holds no model_index\.json of diffusers"),
    ):
        with pytest.raises(SystemExit, match=message) as refusal:
            run(*options)
        assert len(str(refusal.value).splitlines()) == 1

    (tmp_path / "prompts.txt").write_text("a cat\n" + "a long prompt " * 9 + "\n")
    with pytest.raises(
        SystemExit, match=r"prompts\.txt, line 2 has 1\d\d tokens .* more than conf"
    ):
        run("--keep=0", out="new.jsonl")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--out=x.txt", r"--out is x\.txt; expected a name that ends in \.jsonl"),
        ("--keep=1.5", r"--keep is 1\.5; expected 0 to 1"),
        ("--batch=0", r"--batch is 0; expected 1 or more"),
        ("--seed=-1", r"--seed is -1; expected 0 to 4294967295"),
        ("--temperature=nan", r"--temperature is nan; expected 0 or more"),
        ("--top_p=0", r"--top_p is 0\.0; expected above 0, at most 1"),
    ],
)
def test_wrong_options_are_refused(run, capsys, option, message):
    with pytest.raises(SystemExit, match="2"):
        run(option)
    assert message.replace("\\", "") in capsys.readouterr().err
