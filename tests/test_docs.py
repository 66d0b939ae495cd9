"""The code in docs/extending.md runs as it stands there; docs/rewards.md lists what there is."""

import importlib
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.helpers.goldens import ROOT, TESTS
from tests.helpers.running import call, rows

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
FILES = {re.match(r"# (\w+)\.py\n", block)[1]: block for block in BLOCKS if block[0] == "#"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The page's files, importable."""
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name, None)


def test_the_page_has_all_of_its_files():
    assert set(FILES) == {
        "sharpness", "my_config", "reinforce", "reinforce_config", "largest_file",
    }  # fmt: skip


def test_a_reward_of_ones_own(folder):
    from reward_bridge.rewards import make_reward

    config = importlib.import_module("my_config").get_config()
    options = config.reward.options.to_dict()["sharpness"]
    reward = make_reward("sharpness", "cpu", options)
    pictures = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    pictures[1, :, :, ::2] = 255
    np.testing.assert_allclose(reward(pictures, ["a", "b"]), [0.0, 2.0])


@pytest.mark.slow
def test_an_objective_of_ones_own_trains(folder, cache):
    """On the golden model instead of the demo's."""
    text = (folder / "reinforce_config.py").read_text()
    text = text.replace(
        "from realgen_configs import flux_grpo", "from tests.helpers import golden_config"
    )
    text = text.replace("flux_grpo.tiny()", "golden_config.get_config()")
    config = folder / "golden_reinforce.py"
    config.write_text(text)
    path = f"{folder}:{ROOT}"
    options = (f"--config.run_root={folder}", "--config.run_name=run", "--config.num_epochs=1")
    done = call("train.py", cache, *options, config=config, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    (row,) = [row for row in rows(folder / "run") if row["kind"] == "train"]
    assert np.isfinite(row["log_prob"])
    assert row["grad_norm"] > 0


def test_the_family_on_the_page_is_the_one_that_is_tested():
    """tests/scripts/test_families.py runs it."""
    (block,) = [block for block in BLOCKS if block.startswith("MADE_UP")]
    code = (TESTS / "helpers" / "made_up.py").read_text()
    assert without_layout(block) in without_layout(code)


def without_layout(code: str) -> str:
    """Code without what the formatter decides: white space, and commas before a bracket."""
    return re.sub(r"\s|,(?=\s*\))", "", code)


def test_a_judge_of_ones_own(folder):
    from reward_bridge.judges import make_judge

    judge = make_judge("largest_file:LargestFile", SimpleNamespace())
    question = SimpleNamespace(picture=lambda side: b"12" if side == "first" else b"1")
    verdicts = []
    judge.compare([question], answered=0, keep=lambda *verdict: verdicts.append(verdict), say=print)
    assert verdicts == [(question, "first", "2 and 1 bytes")]


# -- docs/rewards.md

REWARDS_PAGE = (ROOT / "docs" / "rewards.md").read_text()


def test_the_page_has_every_way_to_compute_advantages():
    from realgen_jax.advantages import ADVANTAGES

    section = REWARDS_PAGE.partition("## Advantages\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", section, re.MULTILINE) == list(ADVANTAGES)


def test_every_reward_is_on_the_page():
    from reward_bridge.rewards import REWARDS

    names = [name for name in REWARDS if not name.startswith("embedded_")]
    assert [name for name in names if f"`{name}`" not in REWARDS_PAGE] == []


def test_a_reward_of_ones_own_that_compares_pictures():
    from tests.helpers.bridges import bridge, images

    blocks = re.findall(r"```python\n(.*?)```", REWARDS_PAGE, re.DOTALL)
    (block,) = [block for block in blocks if "class Rank" in block]
    scope = {}
    exec(block, scope)
    pending = bridge(scope["Rank"]("cpu"), batch_size=1).submit(images(6), ["a"] * 6, group=3)
    assert pending.result().rewards["odd"].tolist() == [0.0, 0.5, 1.0] * 2
