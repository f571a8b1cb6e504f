"""Wilson's interval against published values, the bootstrap against the textbook's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infini_train.statistics import bootstrap_ratio, format_percent, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
    ],
)
def test_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(trials=st.integers(1, 10**6), data=st.data())
def test_it_holds_the_share_and_mirrors(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1 and low < high
    assert wilson_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_nothing_is_known_without_trials():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("share", "shown"), [(1, "100"), (0.9999, "99.9"), (0.5, "50"), (0.0001, "0.1"), (0, "0"), (2 / 3, "66.7")]
)
def test_only_all_is_a_hundred_percent(share, shown):
    assert format_percent(share) == shown


def test_bootstrap_holds_the_mean_and_narrows():
    random = np.random.default_rng(1)
    sizes = random.integers(50, 500, 400)
    sums = 3 * sizes + random.normal(0, 1, 400) * sizes
    few, many = bootstrap_ratio(sums[:20], sizes[:20]), bootstrap_ratio(sums, sizes)
    assert many[0] < 3.0 + 0.1 and many[1] > 3.0 - 0.1 and many[1] - many[0] < (few[1] - few[0]) / 3
    # of independent pairs of one size it is about the textbook's interval
    even = bootstrap_ratio(sums / sizes, [1] * 400)
    expected = 2 * 1.96 * np.std(sums / sizes) / np.sqrt(400)
    assert even[1] - even[0] == pytest.approx(expected, rel=0.1)
    assert bootstrap_ratio([6.0], [2]) == (3.0, 3.0)
