"""What a run refuses before anything is loaded."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from realgen_jax.training.run import check, check_shapes, defined_metrics
from tests.helpers import golden_config
from tests.helpers.goldens import PIPELINE

pytest.importorskip("torch")

from reward_bridge.setup import reward_problems


def refusals(**changes):
    """The lines that train.py would end with; keys of the config with __ for the dots."""
    config = golden_config.get_config()
    config.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    with pytest.raises((ValueError, OSError)) as error:
        check_all(config)
    return str(error.value)


def check_all(config):
    check(config, reward_problems(config.reward))
    check_shapes(config, devices=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sample__sde_window_size": 9},
            "config.sample.sde_window_size 9 does not fit sde_window_range (0, 4); expected "
            "0 <= lo, lo + window <= hi and hi <= 4 (4 steps)",
        ),
        ({"sample__noise_level": 0.0}, "config.sample.noise_level is 0.0"),
        (
            {
                "sample__sde_type": "cps",
                "sample__noise_level": 1.5,
                "sample__sde_window_range": (0, 3),
            },
            "config.sample.noise_level is 1.5",
        ),
        (
            {"sample__train_batch_size": 6},
            "cannot be divided into groups of num_image_per_prompt 4",
        ),
        (
            {"train__gradient_accumulation_steps": 3},
            "must be a multiple of gradient_accumulation_steps 3",
        ),
        (
            {"sample__width": 72},
            "config.sample.width is 72; expected a multiple of 16 pixels",
        ),
        ({"sample__height": 0}, "config.sample.height is 0"),
        (
            {"evaluate__sample__height": 40},
            "config.evaluate.sample.height is 40; expected a multiple of 16 pixels",
        ),
        (
            {"sample__buckets": ((64, 64), (72, 64))},
            "config.sample.buckets[1].width is 72; expected a multiple of 16 pixels",
        ),
        (
            {"evaluate__sample__tuned_share": 0.1},
            "config.evaluate.sample.tuned_share is 0.1, which is none of num_steps 4 steps; "
            "expected a number above 0.125",
        ),
        ({"train__lora_rank": 0}, "lora_rank is 0; expected 1 or more"),
        ({"train__lora_alpha": 0.0}, "lora_alpha is 0; expected a number above 0"),
        ({"train__lora_init": "ones"}, "lora_init is 'ones'; choose one of gaussian, kaiming"),
        ({"train__advantages": "ppo"}, "advantages is 'ppo'; choose one of per_reward, weighted"),
        ({"train__advantages": "pareto"}, "config.reward.fn has 1; expected 2 or more"),
        ({"train__loss": "ppo"}, "loss is 'ppo'; choose one of grpo, guard, dppo, nft, awm"),
        (
            {"sample__solver": "dpm2"},
            "config.sample.solver is 'dpm2', but 'guard' replays the steps that were sampled",
        ),
        (
            {"train__loss": "dppo", "train__gradient_accumulation_steps": 2},
            "config.train.loss is 'dppo', but an epoch has one optimizer step",
        ),
        (
            {"sample__sde_window__trained_steps": 3},
            "config.sample.sde_window.trained_steps is 3; expected at most sde_window_size 2",
        ),
        (
            {
                "train__loss": "nft",
                "sample__branches": 1,
                "sample__sde_window_size": 3,
                "sample__sde_window_range": (0, 8),
            },
            "config.train.nft.sigmas is 9, which is more than the 4 of 4 steps that",
        ),
        ({"pretrained__lora": "nowhere"}, "nowhere does not exist; expected a LoRA file or folder"),
        (
            {"train__ema_update_interval": 9},
            "config.train.ema_update_interval is 9, but the run has 8 optimizer steps",
        ),
        ({"pretrained__remat": "some"}, "remat is 'some'; choose one of full, attention, dots"),
        (
            {"reward__monitor": "embedded_detector"},
            "config.reward.monitor is 'embedded_detector'; choose auto, reward, or a name in",
        ),
        ({"mesh__fsdp": 3}, "mesh data=-1, fsdp=3, tensor=1 does not fit 1 devices"),
        ({"reward__device": "cuda:7"}, "there is no device 'cuda:7': torch sees 0 CUDA devices"),
    ],
)
def test_a_mistake_is_one_line(changes, message):
    refusal = refusals(**changes)
    assert message in refusal
    assert len(refusal.splitlines()) == 1


def test_files_that_do_not_fit_are_refused_before_anything_is_loaded(tmp_path):
    module = "transformer.context_embedder"
    factors = {f"{module}.lora_A.weight": np.ones((4, 48), np.float32)}
    factors |= {f"{module}.lora_B.weight": np.ones((64, 4), np.float32)}
    save_file(factors, tmp_path / "lora.safetensors")
    refusal = refusals(pretrained__lora=str(tmp_path / "lora.safetensors"))
    assert "holds context_embedder (1 such modules), which is not trained" in refusal

    shutil.copy(PIPELINE / "transformer" / "config.json", tmp_path)
    save_file(factors, tmp_path / "diffusion_pytorch_model.safetensors")
    refusal = refusals(pretrained__transformer=str(tmp_path))
    assert "it is not a complete checkpoint of this model" in refusal


def test_all_that_is_missing_is_named_at_once():
    lines = refusals(
        prompts__train="nowhere.txt",
        pretrained__model="nowhere",
        pretrained__lora="x",
        train__lora=False,
        profile__steps=(3, 5),
        evaluate__after_training=True,
        evaluate__arena__protocol="realgen",
    ).splitlines()
    for start in (
        "config.pretrained.model is 'nowhere', which holds no model_index.json",
        "config.prompts.train is 'nowhere.txt', which does not exist",
        "config.pretrained.lora is set, but config.train.lora=False trains all weights",
        "config.evaluate.arena.protocol is 'realgen', which compares with photographs",
        "config.profile.steps has 5; expected epochs of this run, 1 to 4",
    ):
        assert [line for line in lines if line.startswith(start)], start


def test_a_metric_that_is_monitored_must_be_defined():
    """A Fréchet distance of one picture is not."""
    config = golden_config.get_config().unlock()
    config.reward.metrics = ("embedded_frechet", "embedded_sharpness")
    config.reward.monitor = "embedded_frechet"
    config.sample.test_images_per_prompt = 1
    metrics = {
        name: SimpleNamespace(least=least)
        for name, least in zip(config.reward.metrics, (2, 1), strict=True)
    }
    with pytest.raises(ValueError, match=r"'embedded_frechet', which needs 2 pictures; .* has 1"):
        defined_metrics(metrics, config, 1)

    config.reward.monitor = "auto"
    assert list(defined_metrics(metrics, config, 1)) == ["embedded_sharpness"]
    assert list(defined_metrics(metrics, config, 2)) == ["embedded_frechet", "embedded_sharpness"]


PROGRAM = """
from realgen_configs.flux_grpo import get_config
from realgen_jax.training.run import check_shapes

config = get_config("flux_dev_8xh200")
check_shapes(config, 7)
config.sample.sde_window_size = 30
try:
    check_shapes(config, 7)
except ValueError as error:
    print(error)
"""


def test_shapes_are_checked_without_a_device_or_a_model():
    """The full-size recipe. A platform that does not exist would be an error once JAX starts."""
    environment = os.environ | {"JAX_PLATFORMS": "none"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("config.sample.sde_window_size 30 does not fit")
