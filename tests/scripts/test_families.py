"""A second model family trains, resumes, exports and samples with no edit outside its own file."""

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests.helpers.made_up import write_model
from tests.helpers.running import call, rows

CONFIG = """
from tests.helpers import golden_config

from realgen_jax.models import FAMILIES

FAMILIES["MadeUpPipeline"] = "tests.helpers.made_up:MADE_UP"


def get_config():
    config = golden_config.get_config().unlock()
    config.pretrained.model = {model!r}
    config.num_epochs, config.save_freq, config.eval_freq = 2, 1, 2
    config.sample.guidance_scale = 2.0
    config.train.cfg_gradient = "both"
    return config.lock()
"""
LORA = "lora/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made_up")
    write_model(folder / "model")
    file = folder / "config.py"
    file.write_text(CONFIG.format(model=str(folder / "model")))
    return file


def train(config, cache, tmp_path, name, *words):
    options = (f"--config.run_root={tmp_path}", f"--config.run_name={name}", *words)
    done = call("train.py", cache, *options, config=config)
    assert done.returncode == 0, done.stderr
    return tmp_path / name


def sample(config, cache, folder, *words):
    done = call("sample.py", cache, "a boat", *words, "--out", folder, config=config)
    assert done.returncode == 0, done.stderr
    return np.asarray(Image.open(folder / "00000.png"))


@pytest.mark.slow
def test_a_made_up_family_runs_through_the_real_programs(config, cache, tmp_path):
    run = train(config, cache, tmp_path, "run")
    train_rows = [row for row in rows(run) if row["kind"] == "train"]
    assert [row["epoch"] for row in train_rows] == [1, 2]
    assert train_rows[0]["first_ratio_deviation"] == 0

    # The export has the family's own names, and learnt something.
    tensors = load_file(run / LORA)
    assert set(tensors) == {
        f"transformer.blocks.{layer}.linear.lora_{factor}.weight"
        for layer in range(2)
        for factor in "AB"
    }
    assert any(tensors[name].any() for name in tensors if "lora_B" in name)
    picture = sample(config, cache, tmp_path / "tuned", "--lora", run / "lora")
    assert picture.shape == (64, 64, 3)


@pytest.mark.slow
def test_a_made_up_family_resumes_and_its_lora_is_applied(config, cache, tmp_path):
    whole = train(config, cache, tmp_path, "whole")
    train(config, cache, tmp_path, "parts", "--config.num_epochs=1")
    parts = train(config, cache, tmp_path, "parts", "--resume")
    train_rows = [[row for row in rows(run) if row["kind"] == "train"] for run in (whole, parts)]
    assert train_rows[0] == train_rows[1]
    assert (parts / LORA).read_bytes() == (whole / LORA).read_bytes()

    base = sample(config, cache, tmp_path / "base")
    tuned = sample(config, cache, tmp_path / "tuned", "--lora", whole / "lora")
    assert (base != tuned).any()
