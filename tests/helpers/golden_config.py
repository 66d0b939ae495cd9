"""A run of seconds, for tests of train.py: the golden pipeline and the embedded detector.

The pipeline has random weights.
"""

from ml_collections import ConfigDict

from realgen_configs.flux_grpo import tiny
from tests.helpers.goldens import PIPELINE, TESTS


def get_config() -> ConfigDict:
    c = tiny()
    c.preset = "golden"
    c.num_epochs = 4
    c.save_freq = 2
    c.eval_freq = 2

    c.pretrained.model = str(PIPELINE)
    c.prompts.train = str(TESTS / "data" / "train.txt")
    c.prompts.test = str(TESTS / "data" / "test.jsonl")

    c.sample.num_steps = 4
    c.sample.eval_num_steps = 4
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
    return c.lock()
