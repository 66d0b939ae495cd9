"""Configs: all keys in one place, experiments as their docstrings say, mistakes in one line."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from realgen_configs import (
    flux_grpo,
    flux_objectives,
    sd3_grpo,
    serve_rewards,
    small_cards,
    zimage_grpo,
)
from realgen_jax.config import adversary, base
from realgen_jax.config_files import load_config, missing_keys
from realgen_jax.training.run import check
from tests.helpers.goldens import ROOT

# -- Keys


def test_a_misspelled_key_is_an_error():
    c = base()
    with pytest.raises(AttributeError, match="lerning_rate"):
        c.train.lerning_rate = 1e-4
    with pytest.raises(AttributeError, match="epochs"):
        c.epochs = 3
    with pytest.raises(TypeError, match="learning_rate"):
        c.train.learning_rate = "high"
    with pytest.raises(AttributeError, match="scedule"):
        adversary().scedule = "every"


def test_mappings_of_rewards_and_prompt_sets_take_new_names():
    c = base()
    c.reward.fn.omniaid = 1.0
    c.reward.options.omniaid = ConfigDict({"path": "models/omniaid"})
    c.reward.devices.omniaid = "cuda:1"
    c.reward.adversarial.omniaid = adversary()
    c.evaluate.prompts.short = "short.txt"


def test_evaluations_have_the_size_of_the_rollouts_unless_they_have_one_of_their_own():
    c = base()
    c.sample.width = 768
    assert (c.evaluate.sample.width, c.evaluate.sample.height) == (768, 512)
    c.evaluate.sample.width = 1024
    c.sample.update(width=256, height=384)
    assert (c.sample.width, c.evaluate.sample.width, c.evaluate.sample.height) == (256, 1024, 384)

    # A saved config has numbers, and a config made of it follows nothing.
    saved = ConfigDict(json.loads(json.dumps(c.to_dict())))
    saved.sample.height = 64
    assert (saved.evaluate.sample.width, saved.evaluate.sample.height) == (1024, 384)


def test_base_is_refused_with_a_line_for_each_gap():
    with pytest.raises(ValueError, match=r"pretrained\.model") as error:
        check(base())
    lines = str(error.value).splitlines()
    assert [line.partition(" is ")[0] for line in lines] == [
        "config.pretrained.model",
        "config.prompts.train",
        "config.prompts.test",
        "config.reward.fn",
    ]


# -- Experiments


# The configs that train, and each of their experiments.
TRAINING = (flux_grpo, flux_objectives, sd3_grpo, small_cards, zimage_grpo)
EXPERIMENTS = [
    pytest.param(module, name, id=name) for module in TRAINING for name in module.PRESETS
]
LARGE = [experiment for experiment in EXPERIMENTS if "tiny" not in experiment.id]


@pytest.mark.parametrize(("module", "name"), EXPERIMENTS)
def test_an_experiment_is_complete_and_names_its_command(module, name):
    config = module.get_config(name)
    assert config.preset == name
    assert config.is_locked
    assert not missing_keys(config, base())

    description = module.PRESETS[name].__doc__
    for part in ("Command:", "Machine:", "Time:"):
        assert part in description
    # The file alone is its default.
    file = re.escape(f"configs/{module.__name__.rpartition('.')[2]}.py")
    suffix = rf"(:{name})?[\s,]" if name == module.get_config().preset else rf":{name}\b"
    example = (ROOT / "examples" / "slurm.sh").read_text()
    assert re.search(file + suffix, description + example)


@pytest.mark.parametrize(("module", "name"), LARGE)
def test_an_epoch_has_the_sizes_of_the_docstring(module, name):
    description = " ".join(module.PRESETS[name].__doc__.split())
    sizes = re.search(r"(\d+) images of (\d+) prompts and (\d+) optimizer steps", description)

    config = module.get_config(name)
    images = config.sample.train_batch_size * config.sample.num_batches_per_epoch
    prompts = images / config.sample.num_image_per_prompt
    steps = config.sample.num_batches_per_epoch / config.train.gradient_accumulation_steps
    assert [images, prompts, steps] == [int(size) for size in sizes.groups()]


def test_the_embedded_files_are_there():
    config = flux_grpo.get_config("tiny_soft")
    files = [
        config.pretrained.model,
        config.prompts.train,
        config.prompts.test,
        config.reward.references.path,
        *config.evaluate.prompts.values(),
        flux_grpo.get_config("tiny").reward.options.clip_score.path,
    ]
    for file in files:
        assert Path(file).is_absolute()
        assert Path(file).exists()


@pytest.mark.parametrize(
    ("module", "name"), [(flux_grpo, "flux_dino_adv"), (sd3_grpo, "adv_dino_8xh200")]
)
def test_the_discriminator_follows_the_seed(module, name):
    config = module.get_config(name)
    config.seed = 7
    assert config.reward.adversarial.dino_discriminator.options.seed == 7


# -- Names and files


@pytest.mark.parametrize(
    "name", ["flux_grpo", "flux_grpo.py", "configs/flux_grpo.py", "configs/flux_grpo"]
)
def test_shipped_configs_are_found_by_name(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    assert load_config(name).preset == "tiny"
    assert load_config(f"{name}:tiny_soft").preset == "tiny_soft"


@pytest.mark.parametrize("name", ["flux_grpo", "configs/flux_grpo.py"])
def test_a_file_wins_over_a_name(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        "from realgen_jax.config import base\n"
        "def get_config():\n"
        "    c = base()\n"
        "    c.preset = 'own'\n"
        "    return c\n"
    )
    assert load_config(name).preset == "own"


def test_a_key_of_an_older_version_is_refused_with_todays(tmp_path):
    file = tmp_path / "old.py"
    file.write_text(
        "from realgen_jax.config import base\n"
        "def get_config():\n"
        "    c = base()\n"
        "    c.sample.eval_num_steps = 28\n"
        "    return c\n"
    )
    expected = r"old\.py, line 4: .* is now config\.evaluate\.sample\.num_steps\.$"
    with pytest.raises(ValueError, match=expected):
        load_config(str(file))


@pytest.mark.parametrize("module", [*TRAINING, serve_rewards], ids=lambda module: module.__name__)
def test_a_copy_works_in_any_folder(monkeypatch, tmp_path, module):
    monkeypatch.chdir(tmp_path)
    shutil.copy(module.__file__, "own.py")
    assert load_config("own.py").to_dict() == module.get_config().to_dict()
    last = list(module.PRESETS)[-1]
    assert load_config(f"own.py:{last}").to_dict() == module.get_config(last).to_dict()


def test_a_file_imports_its_neighbours(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own").mkdir()
    Path("own/neighbour_of_a_config.py").write_text("NAME = 'next door'\n")
    text = "from realgen_jax.config import base\nfrom neighbour_of_a_config import NAME\n"
    text += "def get_config():\n    c = base()\n    c.preset = NAME\n    return c\n"
    Path("own/config.py").write_text(text)
    assert load_config("own/config.py").preset == "next door"


# -- Mistakes

MISTAKES = {
    "x = 1": "own.py has no get_config(); expected a function that returns the config",
    "def get_config(:": "own.py, line 1: invalid syntax",
    "import no_such_module": "own.py, line 1: ModuleNotFoundError: No module named",
    "def get_config():\n    return {}['a']": "own.py, line 2: KeyError: 'a'",
    "def get_config():\n    return 3": "own.py: get_config() returned 3; expected a ConfigDict",
    "from realgen_jax.config import base\ndef get_config():\n    base().train.rate = 1": (
        'own.py, line 3: AttributeError: \'Key "rate" does not exist'
    ),
    "from ml_collections import ConfigDict\nConfigDict({'my.reward': 1.0})": (
        "own.py: ConfigDict does not accept dots in field names"
    ),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.items())
def test_a_broken_file_is_an_error_of_one_line(monkeypatch, tmp_path, text, message):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        load_config("own.py")
    assert "\n" not in str(error.value)


def test_unknown_names_and_presets_list_the_known_ones(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shipped = "shipped are embedded, flux_grpo, flux_objectives, rewriter_grpo, sd3_grpo, serve_r"
    with pytest.raises(FileNotFoundError, match=shipped):
        load_config("flux_grop")
    with pytest.raises(ValueError, match=r"flux_grpo\.py has no preset 'flux'; choose from tiny,"):
        load_config("flux_grpo:flux")
    with pytest.raises(ValueError, match=r"serve_rewards\.py has no preset '8'; choose from tiny"):
        load_config("serve_rewards:8")

    Path("own.py").write_text("def get_config():\n    pass\n")
    with pytest.raises(ValueError, match=r"own\.py has no presets; leave out ':tiny'"):
        load_config("own.py:tiny")


# -- What is missing


def test_the_big_preset_says_what_is_missing(monkeypatch, tmp_path):
    """In an empty folder: the model, the prompts and the rewards' weights, each in a line."""
    pytest.importorskip("torch")
    from reward_bridge.setup import reward_problems

    monkeypatch.chdir(tmp_path)
    config = flux_grpo.get_config("flux_dev_8xh200")
    with pytest.raises(ValueError, match=r"hf download black-forest-labs/FLUX\.1-dev") as error:
        check(config, reward_problems(config.reward))
    for text in (
        "--config.pretrained.model=",
        "config.prompts.train is 'dataset/realgen/train.txt'",
        "config.reward.options.forensic_chat.path is 'models/forensic_chat', which does not exist",
    ):
        assert text in str(error.value)
    with pytest.raises(ValueError, match="no preset 'flux'; choose from tiny, tiny_awm"):
        flux_grpo.get_config("flux")
