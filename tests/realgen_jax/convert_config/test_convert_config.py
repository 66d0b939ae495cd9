"""Configs of Flow-GRPO's form are read without executing them, and what is written loads here."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from realgen_configs import flux_grpo, sd3_grpo
from realgen_jax.config import adversary, base
from realgen_jax.config_files import load_config
from realgen_jax.config_ranges import wrong_values
from realgen_jax.convert_config.__main__ import main, write
from realgen_jax.convert_config.flow_factory import FLOW_FACTORY
from realgen_jax.convert_config.keys import KEYS, REWARDS
from realgen_jax.convert_config.page import tables
from realgen_jax.convert_config.reading import preset_names, read_config
from reward_bridge.registry import find_class
from reward_bridge.rewards import REWARDS as OURS
from tests.helpers.goldens import ROOT

BASE = """
import ml_collections

def get_config():
    c = ml_collections.ConfigDict()
    c.run_name = ""
    c.debug = True
    c.num_epochs = 100000
    c.resume_from = None
    c.seed = 42
    c.save_freq = 20
    c.mixed_precision = "fp16"
    c.use_lora = True
    c.dataset = ""
    c.resolution = 768
    c.pretrained = pretrained = ml_collections.ConfigDict()
    pretrained.model = "runwayml/stable-diffusion-v1-5"
    c.sample = sample = ml_collections.ConfigDict()
    sample.num_steps = 40
    sample.eval_num_steps = 40
    sample.guidance_scale = 4.5
    sample.eval_guidance_scale = 9.0
    sample.train_batch_size = 1
    sample.num_image_per_prompt = 1
    sample.test_batch_size = 1
    sample.num_batches_per_epoch = 2
    sample.global_std = True
    sample.noise_level = 0.7
    sample.sde_window_size = 2
    sample.sde_window_range = (0, 10)
    c.train = train = ml_collections.ConfigDict()
    train.learning_rate = 3e-4
    train.gradient_accumulation_steps = 1
    train.max_grad_norm = 1.0
    train.adv_clip_max = 5
    train.clip_range = 1e-4
    train.clip_range_lt = 1e-4
    train.timestep_fraction = 1.0
    train.beta = 0.0
    train.lora_path = None
    train.ema = False
    c.prompt_fn = "imagenet_animals"
    c.reward_fn = ml_collections.ConfigDict()
    c.per_prompt_stat_tracking = True
    return c
"""
PRESETS = """
import imp, os

base = imp.load_source("base", os.path.join(os.path.dirname(__file__), "base.py"))

def common():
    config = base.get_config()
    config.dataset = os.path.join(os.getcwd(), "dataset/pickscore")
    config.prompt_fn = "general_ocr"
    return config

def windowed():
    "A FLUX with a window."
    gpu_number = 32
    config = common()
    config.pretrained.model = "black-forest-labs/FLUX.1-dev"
    config.sample.num_steps = 6
    config.sample.eval_num_steps = 28
    config.sample.guidance_scale = 3.5
    config.resolution = 512
    config.sample.train_batch_size = 3
    config.sample.num_image_per_prompt = 24
    calls = int(48 / (gpu_number * config.sample.train_batch_size / 24))
    config.sample.num_batches_per_epoch = calls if calls > 1 else 1
    assert config.sample.num_batches_per_epoch % 2 == 0, "an even number"
    config.train.gradient_accumulation_steps = config.sample.num_batches_per_epoch//2
    config.sample.sde_window_size = 3
    config.sample.sde_window_range = (0, config.sample.num_steps//2)
    config.sample.sde_type = "cps"
    config.train.ema = True
    config.mixed_precision = "bf16"
    config.run_name = f"flux_{gpu_number}"
    config.reward_fn = {"pickscore": 1.0, "unheard_of": 0.5}
    return config

def every_step():
    gpu_number = 8
    config = windowed()
    config.pretrained.model = "stabilityai/stable-diffusion-3.5-medium"
    config.sample.sde_window_size = 0
    config.sample.num_steps = 10
    config.sample.guidance_scale = 4.5
    config.train.timestep_fraction = 0.99
    config.train.beta = 0.04
    config.sample.kl_reward = 0.1
    config.reward_fn = {"pickscore": 2.0, "aesthetic": 1}
    return config

def realgen():
    config = windowed()
    config.prompt_fn = "realgen"
    config.d_lr = {"omniaid": 4e-5, "omniaid-dino": 3e-5}
    config.d_threshold = 0.6
    config.d_batch_size = 32
    config.rationorm = True
    config.train.vkl = True
    config.reward_fn = {"omniaid": 1.0, "omniaid-dino": 1.0, "visualquality": 1.0}
    return config

def summed():
    config = windowed()
    config.prompt_fn = "realgen"
    config.sample.train_batch_size = 1
    config.sample.mini_num_image_per_prompt = 3
    config.sample.train_num_steps = 2
    config.reward_fn = {"omniaid": 1.0, "longclip": 1.0}
    return config

def no_gpus():
    return common()

def get_config(name):
    return globals()[name]()
"""


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "base.py").write_text(BASE)
    path = tmp_path / "grpo.py"
    path.write_text(PRESETS)
    return path


def converted(file: Path, preset: str, gpus: int | None = None):
    """The config that the written file makes, and the conversion."""
    out, conversion = write(f"{file}:{preset}", gpus, file.with_name(f"own_{preset}.py"))
    config = load_config(str(out))
    assert wrong_values(config) == []
    return config, conversion


def test_a_window_and_sizes_of_all_gpus(file):
    config, conversion = converted(file, "windowed")
    assert config.preset == "windowed"
    assert config.run_name == "flux_32"
    assert config.pretrained.model == "models/FLUX.1-dev"
    assert config.pretrained.dtype == config.prompts.dtype == "bfloat16"
    assert config.prompts.train == "dataset/pickscore/train.txt"
    assert config.prompts.max_tokens == 128
    assert config.reward.share_gpu
    assert config.sample.train_batch_size == 32 * 3
    assert config.sample.num_batches_per_epoch == 12
    assert config.train.gradient_accumulation_steps == 6
    assert (config.sample.sde_window_size, config.sample.sde_window_range) == (3, (0, 3))
    assert config.sample.sde_type == "cps"
    assert config.train.cfg_gradient == ""
    assert config.evaluate.sample.guidance_scale == 3.5  # base.py's 9.0 is not read by theirs
    assert config.train.adv_clip_max == 5.0
    assert config.reward.fn.to_dict() == {"pickscore": 1.0}
    assert any("unheard_of" in remark for remark in conversion.remarks)
    assert set(conversion.left_out) >= {"debug", "train.clip_range_lt"}
    text = file.with_name("own_windowed.py").read_text()
    for remark in (*conversion.remarks, *conversion.left_out):
        assert remark in text


def test_other_gpus_keep_the_images_of_an_epoch(file):
    config, _ = converted(file, "windowed", gpus=8)
    assert config.sample.train_batch_size == 8 * 3
    assert config.sample.num_batches_per_epoch == 48
    assert config.train.gradient_accumulation_steps == 24
    assert config.preflight.devices == 8


def test_noise_in_all_steps_and_a_sum_of_rewards(file):
    config, conversion = converted(file, "every_step")
    assert (config.sample.sde_window_size, config.sample.sde_window_range) == (9, (0, 9))
    assert config.sample.train_batch_size == 8 * 3
    assert config.train.cfg_gradient == "both"
    assert config.train.loss == "grpo"
    assert config.train.kl == "mean_reference"
    assert config.train.advantages == "weighted_sum"
    assert config.reward.fn.to_dict() == {"pickscore": 2.0, "aesthetic": 1.0}
    assert any("sample.kl_reward = 0.1" in remark for remark in conversion.remarks)


def test_detectors_that_learn(file):
    config, _ = converted(file, "realgen")
    assert config.prompts.train == "dataset/pickscore/train.jsonl"
    assert config.train.loss == "guard"
    assert config.train.kl == "velocity"
    assert config.train.advantages == "per_reward"
    assert set(config.reward.adversarial) == set(config.reward.fn) == {"omniaid", "omniaid_dino"}
    learner = config.reward.adversarial.omniaid_dino
    assert (learner.learning_rate, learner.threshold) == (3e-5, 0.6)
    assert learner.batch_size == learner.history_batch_size == 16


def test_a_sum_of_advantages_is_a_mean_of_smaller_ones(file):
    config, _ = converted(file, "summed")
    assert (config.train.adv_clip_max, config.train.max_grad_norm) == (2.5, 0.5)
    assert config.sample.branches == 3
    assert not config.reward.share_gpu
    assert config.sample.sde_window_range == (0, 5)


@pytest.mark.parametrize(
    ("change", "gpus", "message"),
    [
        ("config.prompt_fn = open('x').read()", 8, "line 4: cannot read \"open('x').read()\""),
        ("config.reward_fn = {}", 8, "reward_fn is {}"),
        ("config.reward_fn = {'geneval': 1.0}", 8, "expected some of pickscore"),
        ("config.pretrained.model = 'Qwen/Qwen-Image'", 8, "pretrained.model is 'Qwen/Qwen-Image'"),
        ("config.resolution = 'big'", 8, "resolution is 'big'; expected a number"),
        ("config.mixed_precision = 'fp8'", 8, "mixed_precision is 'fp8'"),
        ("config.train.clip_range = -1", 8, "config.train.clip_range is -1"),
        ("config.seed = 'x'", 8, "config.seed is 'x'"),
        ("config.seed = config.sed", 8, "config.sed has no value"),
        ("config.seed = 1 / 0", 8, "division by zero"),
        ("while True: pass", 8, "line 4: cannot read 'while True:'"),
        ("config = bad()", 8, "bad() calls itself"),
        ("pass", 7, "which groups of 24 do not divide"),
        ("pass", 0, "--gpus is 0"),
    ],
)
def test_bad_input_is_one_line(file, change, gpus, message):
    text = file.read_text().split("\ndef no_gpus")[0].replace("imp, os", "os")
    body = f"\ndef bad():\n    config = windowed()\n    {change}\n    return config\n"
    bad = file.with_name("bad.py")
    bad.write_text(body + text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        write(f"{bad}:bad", gpus, None)
    assert "\n" not in str(error.value)


def test_files_and_presets_that_do_not_exist(file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.py: no such file"):
        write(str(tmp_path / "nothing.py"), 1, None)
    with pytest.raises(ValueError, match=r"has presets; name one.*common, windowed"):
        write(str(file), 1, None)
    with pytest.raises(ValueError, match="no preset 'other'; its presets are common"):
        write(f"{file}:other", 1, None)
    with pytest.raises(ValueError, match="no gpu_number; pass --gpus"):
        write(f"{file}:no_gpus", None, None)
    with pytest.raises(ValueError, match="exists; name another file"):
        write(f"{file}:windowed", None, file)
    (tmp_path / "base.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"base.py: no such file"):
        write(f"{file}:windowed", None, None)
    file.write_text("def (")
    with pytest.raises(ValueError, match=r"grpo.py, line 1: invalid syntax"):
        preset_names(file)


def test_nothing_of_the_file_is_executed(file):
    file.write_text(f"open({str(file) + '.ran'!r}, 'w')\n" + file.read_text())
    read_config(file, "windowed")
    assert not Path(f"{file}.ran").exists()


def test_the_command(file, tmp_path):
    command = [sys.executable, "-m", "realgen_jax.convert_config", "grpo.py:other"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: grpo.py has no preset")
    assert done.stderr.count("\n") == 1


def test_what_the_command_prints(file, monkeypatch, capsys):
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "argv", ["convert_config", "grpo.py:windowed"])
    main()
    assert capsys.readouterr().out.startswith("wrote windowed.py\nDifferent:\n")


# -- The table


def test_the_table_is_on_the_page():
    assert tables() in (ROOT / "docs" / "from_elsewhere.md").read_text()


@pytest.mark.parametrize("keys", [KEYS, FLOW_FACTORY], ids=["convert", "flow_factory"])
def test_every_key_of_ours_exists(keys):
    config = base()
    for theirs, entry in keys.items():
        assert entry.ours or entry.note, theirs
        for key in entry.ours:
            tree = config
            if key.startswith("reward.adversarial.*."):
                tree, key = adversary(), key.rpartition(".")[2]
            for name in key.split("."):
                assert name in tree, key
                tree = tree[name]


def test_every_reward_of_ours_exists():
    for name, options in REWARDS.values():
        make = find_class("reward", name, OURS, {})
        inspect.signature(make).bind(device="cpu", **options)


@pytest.mark.parametrize(
    ("preset", "config"),
    [("flux", flux_grpo.flux_dev_8xh200()), ("sd3", sd3_grpo.realgen_sd3_large_8xh200())],
)
def test_the_options_are_those_of_the_presets(preset, config):
    options = dict(REWARDS.values())
    for name in config.reward.fn:
        assert config.reward.options[name].to_dict() == options[name]
