"""A run of seconds, for tests of train.py: the golden pipeline (random weights), rewarded by the embedded detector."""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

TESTS = Path(__file__).resolve().parent


def get_config() -> ConfigDict:
    spec = importlib.util.spec_from_file_location("flux_grpo", TESTS.parent / "configs" / "flux_grpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config("tiny").unlock()
    c.preset = "golden"
    c.num_epochs, c.save_freq, c.eval_freq = 4, 2, 2
    c.pretrained.model = str(TESTS / "goldens" / "08_pipeline" / "pipeline")
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
