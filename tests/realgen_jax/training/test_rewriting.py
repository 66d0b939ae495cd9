"""Parts of the rewriter's stage; tests/scripts/test_rewriter.py runs it whole."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from realgen_configs.rewriter_grpo import get_config
from realgen_jax.rewriter.texts import text_settings
from realgen_jax.training.rewriting import (
    RewriteError,
    RewriterStage,
    Rewrites,
    rewrite_keys,
    signal_share,
)
from realgen_jax.training.scoring import BatchScores


def stage(**values):
    """A stage without models; the values are those of config.rewriter."""
    config = get_config()
    config.rewriter.update(values)
    return RewriterStage(SimpleNamespace(config=config), None, text_settings(config.rewriter))


def test_a_rewrite_has_a_key_of_its_own():
    """Rewrite n of prompt p has the same key, however many others there are."""
    root = jax.random.key(3)
    keys = jax.random.key_data(rewrite_keys(root, 4, 3)).reshape(4, 3, -1)
    fewer = jax.random.key_data(rewrite_keys(root, 2, 2)).reshape(2, 2, -1)
    np.testing.assert_array_equal(keys[:2, :2], fewer)
    assert len(np.unique(keys.reshape(12, -1), axis=0)) == 12
    one = jax.random.fold_in(jax.random.fold_in(root, 1), 2)
    np.testing.assert_array_equal(keys[1, 2], jax.random.key_data(one))


def test_the_rewrites_of_a_prompt_are_drawn_on_the_same_noise():
    two = stage(rewrites_per_prompt=3, images_per_rewrite=2)
    pictures = np.arange(12)
    shared = two._noise_numbers(pictures)
    assert shared.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    two.run.config.sample.same_latent = False
    assert two._noise_numbers(pictures).tolist() == list(range(12))


def test_a_rewrites_score_is_the_mean_of_its_pictures():
    two = stage(prompts_per_epoch=2, rewrites_per_prompt=2, images_per_rewrite=2)
    scores = BatchScores({"value": np.arange(8, dtype=np.float32)}, {})
    prompts = ["a red cat", "a red cat", "a dog", "a dog"]
    texts = ["a red cat, grey", "a cat", "a dog", ""]
    good = np.array([True, True, True, False])
    rewrites = Rewrites(prompts, texts, good, None, None, None)
    groups = two.groups(SimpleNamespace(own=rewrites), scores)
    assert groups["value"].tolist() == [[0.5, 2.5], [4.5, 6.5]]
    assert groups["usable"].tolist() == [[1, 1], [1, 0]]
    assert groups["kept"].tolist() == [[1, 0.5], [1, 0]]
    assert rewrites.drawn == ["a red cat, grey", "a cat", "a dog", "a dog"]


def test_signal_is_the_share_of_variance_between_rewrites():
    """Of made-up rewards with known variances, and where either is absent."""
    rng = np.random.default_rng(0)
    rewrites = rng.normal(size=(400, 8, 1))
    pictures = rng.normal(size=(400, 8, 2))
    assert signal_share(rewrites + pictures) == pytest.approx(0.5, abs=0.04)
    assert signal_share(0.5 * rewrites + pictures) == pytest.approx(0.2, abs=0.04)
    assert signal_share(pictures) == pytest.approx(0.0, abs=0.04)
    assert signal_share(np.repeat(rewrites, 2, axis=2)) == 1.0
    assert signal_share(np.ones((3, 4, 2))) is None


def unusable(count):
    """Eight rewrites, of which the first ones cannot be drawn."""
    good = np.arange(8) >= count
    return Rewrites(["a cat"] * 8, ["a\nb"] * 8, good, None, None, None)


def test_an_epoch_without_a_rewrite_to_draw_ends_the_run():
    stage(rewrites_per_prompt=8)._stop_if_none_usable(3, unusable(7))
    message = r"epoch 3: no rewrite can be drawn; .*max_new_tokens.*; for example 'a\\nb', 'a\\nb'"
    with pytest.raises(RewriteError, match=message):
        stage()._stop_if_none_usable(3, unusable(8))


def test_too_many_unusable_rewrites_for_three_epochs_end_the_run(monkeypatch):
    """The count is in the history, which checkpoints hold; a better epoch starts it again."""
    monkeypatch.setattr(RewriterStage, "_flips", lambda *_: 0.0)
    ill = stage(rewrites_per_prompt=8, max_unusable=0.5)
    history = {}

    def epoch(count):
        sampled = SimpleNamespace(own=unusable(count))
        return ill.columns(None, 0, sampled, None, None, history, False)

    assert epoch(5)["text/unusable"] == 5 / 8
    epoch(5)
    epoch(4)
    assert history == {"unusable_epochs": 0}
    epoch(5)
    epoch(6)
    with pytest.raises(RewriteError, match=r"for 3 epochs more than 50% of the .* now 62%"):
        epoch(5)
