"""Prompts that a reward cannot score are named before anything is loaded."""

from reward_bridge.prompts import prompt_problems
from tests.reward_bridge.test_setup import reward_config


def test_prompts_that_a_reward_cannot_score_are_named():
    reward = reward_config(options={"far": {"servers": ("http://a:1",)}})
    prompts = {
        "config.prompts.train": ['a sign "Open"', "a cat", "a dog"],
        "config.prompts.test": ['a cup "Tea"'],
    }
    (line,) = prompt_problems(reward, ["ocr", "jpeg_compressibility", "far", "ocr"], prompts)
    assert line.startswith(
        "config.prompts.train: 2 of 3 prompts cannot be scored by 'ocr'; the prompt 'a cat' quotes"
    )
    assert prompt_problems(reward, ["jpeg_compressibility"], prompts) == []
