"""A run of seconds, for tests of train.py: a golden pipeline and the embedded detector.

The pipelines have random weights. `--config golden_config.py:sd3` picks another one than FLUX's.
"""

from ml_collections import ConfigDict

from realgen_configs.flux_grpo import tiny
from tests.helpers.goldens import GOLDENS, PIPELINE, TESTS


def get_config(family: str = "flux") -> ConfigDict:
    c = tiny()
    c.preset = "golden"
    c.num_epochs = 4
    c.save_freq = 2
    c.eval_freq = 2

    c.pretrained.model = str(PIPELINE)
    c.prompts.train = str(TESTS / "data" / "train.txt")
    c.prompts.test = str(TESTS / "data" / "test.jsonl")

    c.sample.num_steps = 4
    c.evaluate.sample.num_steps = 4
    c.sample.sde_window_size = 2
    c.sample.sde_window_range = (0, 4)
    c.sample.train_batch_size = 8
    c.sample.num_image_per_prompt = 4
    c.sample.branches = 2
    c.sample.num_batches_per_epoch = 2
    c.sample.test_batch_size = 4
    c.sample.test_images_per_prompt = 2

    c.train.lora_rank = 4
    c.train.lora_alpha = 8.0
    c.train.gradient_accumulation_steps = 1

    c.reward.fn = ConfigDict({"embedded_detector": 1.0})
    c.reward.held_out = ("jpeg_compressibility",)
    c.reward.metrics = ()
    c.reward.options = ConfigDict()
    c.evaluate.after_training = False
    if family != "flux":
        GUIDED[family](c)
    return c.lock()


def sd3(c: ConfigDict) -> None:
    """SD3.5-M as Adv-GRPO trains it: the gradient goes through both passes of the guidance."""
    c.pretrained.model = str(GOLDENS / "12_sd3" / "pipeline")
    c.sample.guidance_scale = 4.5
    c.sample.sde_type = "cps"
    c.sample.noise_level = 0.8
    c.sample.sde_window_range = (0, 3)
    c.train.cfg_gradient = "both"
    c.evaluate.sample.guidance_scale = 4.5


def zimage(c: ConfigDict) -> None:
    """Z-Image, with the gradient through the prompt's pass alone."""
    c.pretrained.model = str(GOLDENS / "13_zimage" / "pipeline")
    c.prompts.max_tokens = 96
    c.sample.guidance_scale = 4.0
    c.train.cfg_gradient = "bound"
    c.evaluate.sample.guidance_scale = 4.0


GUIDED = {"sd3": sd3, "zimage": zimage}
