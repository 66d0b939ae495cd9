import numpy as np
import pytest
import scipy.stats

from realgen_jax.realbench.bootstrap import (
    draw,
    draw_in_blocks,
    percentile_interval,
    ratio_intervals,
)


def test_intervals_are_those_of_scipys_bootstrap():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 4, 60).astype(float)
    sums = rng.random(60) * counts
    expected = scipy.stats.bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        n_resamples=20000,
        paired=True,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    for draws in ([draw(60, 20000, rng)], draw_in_blocks(60, 20000, rng)):
        low, high = ratio_intervals(draws, sums[:, None], counts, 0.9)[:, 0]
        np.testing.assert_allclose((low, high), expected, atol=0.003)


def test_every_resample_has_as_many_units(monkeypatch):
    monkeypatch.setattr("realgen_jax.realbench.bootstrap.BLOCK", 25)
    blocks = list(draw_in_blocks(10, 5, np.random.default_rng(0)))
    assert [block.shape for block in blocks] == [(2, 10), (2, 10), (1, 10)]
    assert all((block.sum(1) == 10).all() for block in blocks)
    assert (draw(10, 5, np.random.default_rng(0)).sum(1) == 10).all()


@pytest.mark.filterwarnings("error")
def test_what_no_resample_defines_has_no_interval():
    assert np.isnan(percentile_interval(np.zeros((0, 3)), 0.9)).all()
    values = np.array([[1.0, np.nan, np.nan], [2.0, np.nan, 5.0], [3.0, np.nan, 7.0]])
    ends = percentile_interval(values, 1.0)
    np.testing.assert_array_equal(ends, [[1.0, np.nan, 5.0], [3.0, np.nan, 7.0]])
