"""A run of seconds, for tests of train.py: the golden pipeline (random weights), rewarded by the embedded detector."""

from ml_collections import ConfigDict

from realgen_configs import flux_grpo
from tests.helpers.goldens import PIPELINE, TESTS


def get_config() -> ConfigDict:
    c = flux_grpo.get_config("tiny").unlock()
    c.preset = "golden"
    c.num_epochs, c.save_freq, c.eval_freq = 4, 2, 2
    c.pretrained.model = str(PIPELINE)
    c.prompts.train = str(TESTS / "data" / "train.txt")
    c.prompts.test = str(TESTS / "data" / "test.jsonl")
    c.sample.num_steps = c.sample.eval_num_steps = 4
    c.sample.sde_window_size, c.sample.sde_window_range = 2, (0, 4)
    c.sample.train_batch_size, c.sample.num_image_per_prompt, c.sample.branches = 8, 4, 2
    c.sample.num_batches_per_epoch, c.train.gradient_accumulation_steps = 2, 1
    c.sample.test_batch_size, c.sample.test_images_per_prompt = 4, 2
    c.train.lora_rank, c.train.lora_alpha = 4, 8.0
    c.reward.fn = ConfigDict({"embedded_detector": 1.0})
    c.reward.held_out, c.reward.metrics = ("jpeg_compressibility",), ()
    c.reward.options = ConfigDict()
    c.evaluate.after_training = False
    return c.lock()
