"""scripts/evaluate.py as a user calls it."""

import csv
import signal

import pytest
from PIL import Image, ImageDraw, ImageFont

from tests.helpers.found_pictures import found_folder
from tests.helpers.running import ROOT, begin, call, command, until

pytest.importorskip("torch")


@pytest.fixture
def words(tmp_path):
    """What evaluate.py is called with: two sets of four prompts, one reward."""
    prompts = ROOT / "tests" / "data" / "train.txt"
    words = [
        f"--config.run_root={tmp_path}",
        "--config.run_name=run",
        "--config.evaluate.batch_size=2",
    ]
    words += [f"--config.evaluate.prompts.{name}={prompts}" for name in ("short", "long")]
    words += [
        "--config.evaluate.scores=('embedded_detector',)",
        "--config.evaluate.detectors=('embedded_detector',)",
    ]
    return [*words, "--config.evaluate.resamples=100"]


def rows_of_scores(folder):
    with (folder / "report" / "scores.csv").open(newline="") as file:
        return len(list(csv.DictReader(file)))


def test_evaluate_py_as_a_user_calls_it(cache, tmp_path, words):
    found = found_folder(tmp_path, lines=4)
    done = call(
        "evaluate.py",
        cache,
        *words,
        "--judge=embedded",
        "--nobase",
        f"--pictures={found}",
        f"--pictures=b={found}",
    )
    assert done.returncode == 0, done.stderr
    assert "found against b: wins 50.0 % " in done.stdout
    warning = "warning: 4 of the 4 prompts in config.evaluate.prompts.short are also in config.prom"
    assert warning in done.stdout
    assert done.stdout.splitlines()[-1] == f"report: {tmp_path}/run/report/index.html"
    assert '<section id="arena">' in (tmp_path / "run" / "report" / "index.html").read_text()
    assert rows_of_scores(tmp_path / "run") == 16


@pytest.mark.slow
def test_evaluate_py_goes_on_after_a_kill(cache, tmp_path, words):
    folder, output = tmp_path / "run", tmp_path / "output.txt"
    done = call("evaluate.py", cache, *words, "--judge=embedded")
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        == "error: the arena compares entries, but there is only 'base'; add another entry"
    )
    assert not folder.exists()
    made = lambda: list((folder / "evaluation").rglob("*.png"))  # noqa: E731
    program = begin(
        command("evaluate.py", cache, *words, "--config.evaluate.images_per_prompt=100"), output
    )
    until(lambda: len(made()) > 3, program, output)
    program.send_signal(signal.SIGKILL)
    program.wait()
    times = {file: file.stat().st_mtime_ns for file in made()}
    done = call("evaluate.py", cache, *words, "--config.evaluate.images_per_prompt=2")
    assert done.returncode == 0, done.stderr
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    assert not [
        file for file in folder.rglob("*") if file.suffix == ".png" and not file.stat().st_size
    ]
    assert rows_of_scores(folder) == 16


@pytest.mark.slow
def test_geneval_of_a_model(cache, tmp_path):
    """Four pictures of each prompt, scored by a tiny random detector."""
    from tests.helpers.tiny_detector import write_geneval

    models = write_geneval(tmp_path)
    options = {"path": str(models / "detector"), "clip": str(models / "clip"), "side": 64}
    done = call(
        "evaluate.py",
        cache,
        "--benchmark=geneval",
        f"--config.run_root={tmp_path}",
        "--config.run_name=run",
        "--config.evaluate.batch_size=8",
        f"--config.evaluate.benchmarks.geneval={models / 'metadata.jsonl'}",
        f"--config.reward.options={ {'geneval': options} }",
    )
    assert done.returncode == 0, done.stderr
    assert "Protocol: 2 prompts of 553 (not the published number) x 4 pictures, " in done.stdout
    assert "base, geneval: geneval " in done.stdout  # the mean over both tasks
    with (tmp_path / "run" / "report-geneval" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["category"] for row in rows] == ["colors"] * 4 + ["single_object"] * 4
    assert {row["geneval"] for row in rows} <= {"0.0", "1.0"}
    assert len(list((tmp_path / "run" / "evaluation" / "base" / "geneval").glob("*.png"))) == 8


@pytest.mark.slow
def test_a_benchmark_on_pictures_whose_right_answer_is_known(cache, tmp_path):
    """Flow-GRPO's OCR prompts: one picture shows its text, the other one a letter too few."""
    pytest.importorskip("rapidocr")
    pytest.importorskip("rapidfuzz")
    (tmp_path / "test.txt").write_text('a sign that says "Open"\na cup with "Coffee"\n')
    (tmp_path / "pictures").mkdir()
    for line, text in enumerate(("Open", "Coffe")):
        picture = Image.new("RGB", (256, 96), "white")
        font = ImageFont.load_default(40)
        ImageDraw.Draw(picture).text((20, 20), text, fill="black", font=font)
        picture.save(tmp_path / "pictures" / f"{line:05}.png")

    words = [
        "--benchmark=ocr",
        "--nobase",
        f"--pictures={tmp_path / 'pictures'}",
        f"--config.run_root={tmp_path}",
        "--config.run_name=run",
    ]
    named = f"--config.evaluate.benchmarks.ocr={tmp_path / 'test.txt'}"
    done = call("evaluate.py", cache, *words, named)
    assert done.returncode == 0, done.stderr
    assert "Protocol: 2 prompts x 1 pictures, 64 x 64 px," in done.stdout
    report = (tmp_path / "run" / "report-ocr" / "report.md").read_text()
    assert "- Benchmark: ocr, from github.com/yifan123/flow_grpo, dataset/ocr/test.txt;" in report
    with (tmp_path / "run" / "report-ocr" / "scores.csv").open(newline="") as file:
        scores = [float(row["ocr"]) for row in csv.DictReader(file)]
    assert scores == pytest.approx([1.0, 5 / 6])

    # A prompt that cannot be scored is named before anything is loaded.
    (tmp_path / "test.txt").write_text("a sign\n")
    done = call("evaluate.py", cache, *words, named)
    assert done.returncode == 1
    assert done.stderr.startswith("error: config.evaluate.benchmarks.ocr: 1 of 1 prompts cannot be")
