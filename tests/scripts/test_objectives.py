"""train.py with each objective beside GRPO: a run, and a resumed run."""

import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.helpers.made_up import write_model
from tests.helpers.running import GOLDEN, call, rows

pytest.importorskip("torch")

# The golden config has a window, which decoupled objectives do not: back to the defaults.
NO_WINDOW = (
    "--config.sample.sde_window_size=3",
    "--config.sample.sde_window_range=(0,8)",
    "--config.sample.branches=1",
)
WORDS = {
    "nft": (*NO_WINDOW, "--config.train.loss=nft", "--config.train.nft.sigmas=2"),
    "scout": (
        *NO_WINDOW,
        "--config.train.loss=nft",
        "--config.train.nft.sigmas=2",
        "--config.sample.scout.previews=8",
        "--config.sample.scout.num_steps=2",
    ),
    "awm": (
        *NO_WINDOW,
        "--config.train.loss=awm",
        "--config.train.awm.sigmas=2",
        "--config.sample.solver=dpm2",
        "--config.train.num_inner_epochs=2",
        "--config.train.norm_guard.weight=1.0",
        "--config.reward.watched=embedded_held_out",
        "--config.train.kl_gate.against=embedded_held_out",
        "--config.sample.cached_steps=1",
    ),
    "dppo": (
        "--config.train.loss=dppo",
        "--config.sample.sde_type=dance",
        "--config.sample.sde_window.strategy=progressive",
        "--config.sample.sde_window.epochs=1",
        "--config.sample.sde_window.trained_steps=1",
    ),
}
COLUMNS = {
    "nft": ("old_distance", "velocity_norm", "kl_loss"),
    "scout": ("old_distance", "kl_loss", "scout/reward", "scout/rank_correlation"),
    "awm": ("old_distance", "velocity_norm", "norm_penalty", "kl_gate/share"),
    "dppo": ("kept_share", "divergence", "kl_loss"),
}


GUIDED = """
from tests.helpers import golden_config

from realgen_jax.models import FAMILIES

FAMILIES["MadeUpPipeline"] = "tests.helpers.made_up:MADE_UP"


def get_config():
    config = golden_config.get_config().unlock()
    config.pretrained.model = {model!r}
    config.sample.guidance_scale = 2.0
    config.train.cfg_gradient = "bound"
    return config.lock()
"""


def train(cache, tmp_path, *words, config=GOLDEN):
    where = (f"--config.run_root={tmp_path}", "--config.run_name=run")
    done = call("train.py", cache, *where, *words, config=config)
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def columns_of(folder):
    return [row for row in rows(folder) if row["kind"] == "train"]


@pytest.mark.slow
def test_a_run_of_nft(cache, tmp_path):
    words = (*WORDS["nft"], "--config.num_epochs=2")
    first, second = columns_of(train(cache, tmp_path, *words))
    for name in COLUMNS["nft"]:
        assert np.isfinite(first[name])
    # The base model is the start of both policies: they part within the first epoch.
    assert 0 < first["old_distance"] == pytest.approx(first["kl_loss"], rel=1e-3)
    assert second["kl_loss"] > 2 * second["old_distance"]


@pytest.mark.slow
@pytest.mark.parametrize("loss", WORDS)
def test_a_resumed_run_is_the_same_bit_for_bit(cache, tmp_path, loss):
    folder = train(cache, tmp_path, *WORDS[loss])
    first, *_, last = columns_of(folder)
    assert last["epoch"] == 4
    for name in COLUMNS[loss]:
        assert np.isfinite(first[name])
    assert first.get("first_ratio_deviation", 0) == 0

    # Go back to the checkpoint of epoch 2.
    whole = tmp_path / "whole"
    folder.rename(whole)
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "4")
    train(cache, tmp_path, *WORDS[loss], "--resume")

    assert rows(folder) == rows(whole)
    one, other = (
        ocp.StandardCheckpointer().restore(run / "checkpoints" / "4" / "state")
        for run in (folder, whole)
    )
    assert any(name.startswith("old.") for name in one) == (loss != "dppo")
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
@pytest.mark.parametrize("loss", WORDS)
def test_a_family_with_guidance_takes_every_objective(cache, tmp_path, loss):
    write_model(tmp_path / "model")
    file = tmp_path / "config.py"
    file.write_text(GUIDED.format(model=str(tmp_path / "model")))
    words = (*WORDS[loss], "--config.num_epochs=2")
    _, last = columns_of(train(cache, tmp_path, *words, config=file))
    assert all(np.isfinite(last[name]) for name in COLUMNS[loss])
    assert last["grad_norm"] > 0
    assert last["kl_loss"] > 0
