"""What is wrong with config.rewriter, before anything is loaded."""

from pathlib import Path
from typing import Any

from realgen_jax.files import expand_home
from realgen_jax.rewriter.texts import TEXT_REWARDS, text_settings


def rewriter_problems(config: Any) -> list[str]:
    """Return one line for each key that contradicts config.stage or another key."""
    settings = config.rewriter
    if config.stage != "rewriter":
        if settings.path or settings.adapter:
            return [
                f"config.rewriter.path is {settings.path!r}, but config.stage is {config.stage!r}, "
                "which trains the image model; expected config.stage='rewriter', or prompts that "
                "scripts/rewrite.py has rewritten"
            ]
        return []

    problems = []
    if not settings.path:
        problems.append("config.rewriter.path is empty; expected a Hugging Face folder of Qwen3")
    for key in ("path", "adapter"):
        value = settings[key]
        if value and not Path(expand_home(value)).is_dir():
            problems.append(
                f"config.rewriter.{key} is {value!r}, which does not exist; expected "
                + ("a Hugging Face folder of Qwen3" if key == "path" else "a peft folder")
            )
    problems += _contradictions(config)
    problems += _wrong_texts(settings)
    return problems


def _contradictions(config: Any) -> list[str]:
    """Keys of the image model's training that this stage does not have."""
    problems = []
    for key, value, expected in (
        ("reward.adversarial", config.reward.adversarial.to_dict(), {}),
        ("train.kl_gate.against", tuple(config.train.kl_gate.against), ()),
        ("train.norm_guard.weight", config.train.norm_guard.weight, 0.0),
        ("sample.scout.previews", config.sample.scout.previews, 0),
        ("sample.cached_steps", config.sample.cached_steps, 0),
        ("sample.buckets", tuple(config.sample.buckets), ()),
    ):
        if value != expected:
            problems.append(
                f"config.{key} is {value!r}, but config.stage is 'rewriter', which has no such "
                f"thing; expected {expected!r}"
            )
    if config.train.advantages == "gardo":
        problems.append(
            "config.train.advantages is 'gardo', which weighs pictures, but config.stage is "
            "'rewriter', which compares rewrites"
        )
    return problems


def _wrong_texts(settings: Any) -> list[str]:
    """Lines about lengths and text rewards."""
    problems = []
    if settings.min_words >= settings.max_words:
        problems.append(
            f"config.rewriter.min_words is {settings.min_words}; expected less than max_words "
            f"{settings.max_words}"
        )
    for name in settings.text_rewards:
        if name not in TEXT_REWARDS:
            problems.append(
                f"config.rewriter.text_rewards has {name!r}; choose from {', '.join(TEXT_REWARDS)}"
            )
    if settings.text_rewards.get("spam") and not settings.spam_patterns:
        problems.append(
            "config.rewriter.text_rewards has 'spam', but config.rewriter.spam_patterns is empty, "
            "so that nothing is counted"
        )
    if not problems:
        try:
            text_settings(settings)
        except ValueError as error:
            problems.append(str(error))
    return problems
