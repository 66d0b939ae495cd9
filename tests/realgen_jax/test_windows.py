import numpy as np
import pytest

from realgen_jax.windows import STAYS, Moves
from tests.helpers.objective_goldens import case


def moving_cases():
    meta = case("windows").meta
    return [name for name in meta if meta[name]["strategy"] in STAYS]


@pytest.mark.parametrize("name", moving_cases())
def test_starts_match_the_golden(name):
    windows = case("windows")
    settings = dict(windows.meta[name])
    size, last = settings.pop("size"), settings.pop("last")
    settings["epochs"] = settings.pop("iters", 25)

    starts = np.array([Moves(**settings).start(epoch, last) for epoch in range(100)])
    windows.check(f"{name}/start", starts)
    # MixGRPO's window shrinks at the end; ours turns back where it would.
    windows.check(f"{name}/length", np.minimum(starts + size, last) - starts)


def test_drawn_starts_have_the_range_of_the_golden():
    windows = case("windows")
    settings = windows.meta["random"]
    assert windows["random/start"].max() <= settings["last"] - settings["size"]


def test_a_window_with_one_start_stays_there():
    for strategy in STAYS:
        for rollback in (True, False):
            moves = Moves(strategy, rollback=rollback)
            assert {moves.start(epoch, 0) for epoch in range(50)} == {0}


def test_without_rollback_it_stays_at_the_last_start():
    moves = Moves("progressive", epochs=2, stride=2, rollback=False)
    assert [moves.start(epoch, 5) for epoch in range(8)] == [0, 0, 2, 2, 4, 4, 5, 5]
    moves = Moves("progressive", epochs=2, stride=2)
    assert [moves.start(epoch, 5) for epoch in range(8)] == [0, 0, 2, 2, 4, 4, 0, 0]
