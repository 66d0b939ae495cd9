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


def test_a_made_up_family_runs_through_the_real_programs(config, cache, tmp_path):
    def train(name, *words):
        options = (f"--config.run_root={tmp_path}", f"--config.run_name={name}", *words)
        done = call("train.py", cache, *options, config=config)
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    # Two epochs, and the same with a stop in between.
    whole = train("whole")
    train("parts", "--config.num_epochs=1")
    parts = train("parts", "--resume")
    assert [row["epoch"] for row in rows(whole) if row["kind"] == "train"] == [1, 2]
    train_rows = [row for row in rows(whole) if row["kind"] == "train"]
    assert [row for row in rows(parts) if row["kind"] == "train"] == train_rows
    assert train_rows[0]["first_ratio_deviation"] == 0
    assert (parts / LORA).read_bytes() == (whole / LORA).read_bytes()

    # The export has the family's own names, and learnt something.
    tensors = load_file(whole / LORA)
    assert set(tensors) == {
        f"transformer.blocks.{layer}.linear.lora_{factor}.weight"
        for layer in range(2)
        for factor in "AB"
    }
    assert any(tensors[name].any() for name in tensors if "lora_B" in name)

    # Pictures, with and without it.
    pictures = {}
    for name, words in (("base", ()), ("tuned", ("--lora", whole / "lora"))):
        done = call("sample.py", cache, "a boat", *words, "--out", tmp_path / name, config=config)
        assert done.returncode == 0, done.stderr
        pictures[name] = np.asarray(Image.open(tmp_path / name / "00000.png"))
    assert pictures["base"].shape == (64, 64, 3)
    assert (pictures["base"] != pictures["tuned"]).any()
