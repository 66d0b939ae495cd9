"""scripts/make_references.py as a user calls it, on a tiny FluxPipeline of diffusers."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from tests.helpers.goldens import PIPELINE, ROOT

pytest.importorskip("torch")


def make(*words):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "make_references.py"), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env=dict(os.environ),
    )


@pytest.mark.slow
def test_references_are_made_and_continued(tmp_path):
    pytest.importorskip("diffusers")
    prompts = tmp_path / "prompts.txt"
    done = make("--model", PIPELINE, "--prompts", prompts, "--out", tmp_path / "references")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {prompts} does not exist; expected a prompt file")
    assert done.stderr.count("\n") == 1

    prompts.write_text("a cat\na dog\n")
    out = tmp_path / "references"
    words = ["--model", PIPELINE, "--prompts", prompts, "--out", out, "--device", "cpu"]
    words += ["--dtype", "float32", "--width", 64, "--height", 64, "--steps", 2]
    words += ["--argument", "guidance_scale=3.5"]
    done = make(*words, "--variations", 1)
    assert done.returncode == 0, done.stderr
    assert "2 pictures in" in done.stdout
    first = {file: file.stat().st_mtime_ns for file in out.glob("*.png")}
    assert len(first) == 2
    assert all(Image.open(file).size == (64, 64) for file in first)

    done = make(*words, "--variations", 2)
    assert done.returncode == 0, done.stderr
    assert "4 pictures in" in done.stdout
    assert "2 of them still to make" in done.stdout
    assert len(list(out.glob("*.png"))) == 4
    assert all(file.stat().st_mtime_ns == time for file, time in first.items())
    assert done.stdout.splitlines()[-1].startswith("references: config.reward.references.path = ")

    done = make(*words, "--variations", 2, "--seed", 1)
    assert done.returncode == 1
    assert "were made with seed 0, now it is 1; use another folder" in done.stderr
    done = make(*words[:4], "--out", tmp_path / "other", *words[6:], "--argument", "cfg=1")
    assert "FluxPipeline takes no argument 'cfg'; it takes prompt," in done.stderr
