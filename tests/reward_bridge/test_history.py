"""The history of earlier pairs."""

import numpy as np
import torch

from reward_bridge.history import History


def test_history_is_bounded_and_replaces_at_random():
    torch.manual_seed(0)
    history = History(4)
    assert history.draw(3) == ([], [], [])
    history.add(np.arange(3), np.arange(3), "abc")
    assert [pair[2] for pair in history.pairs] == ["a", "b", "c"]
    history.add(np.arange(3, 30), np.arange(3, 30), "x" * 27)
    assert len(history.pairs) == 4
    real, fake, prompts = history.draw(50)
    assert real == fake
    assert len(prompts) == 50
    assert {*real} == {pair[0] for pair in history.pairs}
    empty = History(0)
    empty.add(np.arange(3), np.arange(3), "abc")
    assert not empty.pairs
