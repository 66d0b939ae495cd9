import re

import pytest

from realgen_configs.rewriter_grpo import get_config
from realgen_jax.rewriter.problems import rewriter_problems


def changed(**values):
    """The config of `tiny_rewriter` with these values; "__" in a name stands for "."."""
    config = get_config()
    for key, value in values.items():
        section, name = config, key.split("__")
        for part in name[:-1]:
            section = section[part]
        section[name[-1]] = value
    return config


def test_the_shipped_config_has_no_problem():
    assert rewriter_problems(get_config()) == []


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"stage": "diffusion"}, r"config.rewriter.path is .*, but config.stage is 'diffusion'"),
        ({"rewriter__path": "nowhere"}, "config.rewriter.path is 'nowhere', which does not exist"),
        ({"rewriter__path": ""}, "config.rewriter.path is empty"),
        ({"rewriter__adapter": "no"}, "config.rewriter.adapter is 'no', .* expected a peft folder"),
        ({"sample__scout__previews": 9}, "config.sample.scout.previews is 9, .*; expected 0"),
        ({"sample__cached_steps": 1}, "config.sample.cached_steps is 1, .*; expected 0"),
        ({"sample__buckets": ((64, 64),)}, "config.sample.buckets is .*; expected ()"),
        ({"train__advantages": "gardo"}, "'gardo', which weighs pictures"),
        ({"train__kl_gate__against": ("x",)}, "config.train.kl_gate.against is .*; expected ()"),
        ({"train__norm_guard__weight": 1.0}, "config.train.norm_guard.weight is 1.0"),
        ({"rewriter__min_words": 14}, "min_words is 14; expected less than max_words 14"),
        ({"rewriter__min_words": 0}, "config.rewriter.min_words is 0 and max_words is 14"),
        ({"rewriter__text_rewards__typo": 1.0}, "text_rewards has 'typo'; choose from usable"),
        ({"rewriter__text_rewards__spam": 1.0}, "spam_patterns is empty"),
    ],
)
def test_contradictions(values, says):
    (problem,) = rewriter_problems(changed(**values))

    assert re.search(says, problem), problem
