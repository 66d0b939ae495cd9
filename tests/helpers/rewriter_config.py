"""The golden config with a language model that rewrites: a run of seconds.

The language model is a test's own: --config.rewriter.path.
"""

from ml_collections import ConfigDict

from tests.helpers import golden_config


def get_config(family: str = "flux") -> ConfigDict:
    c = golden_config.get_config(family)
    c.stage = "rewriter"
    c.train.cfg_gradient = ""
    c.train.learning_rate = 1e-2
    c.train.beta = 0.01
    c.prompts.max_tokens = 16

    c.rewriter.prompts_per_epoch = 2
    c.rewriter.rewrites_per_prompt = 4
    c.rewriter.images_per_rewrite = 2
    c.rewriter.max_prompt_tokens = 128
    c.rewriter.max_new_tokens = 8
    c.rewriter.microbatch = 4
    c.rewriter.logit_chunk = 4
    c.rewriter.min_words = 1
    c.rewriter.text_rewards = ConfigDict({"usable": 1.0, "length": 0.5})
    return c
