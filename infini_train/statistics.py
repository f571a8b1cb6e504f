"""Confidence intervals for proportions, ratios and means, and how a proportion is written. Imports no torch."""

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054  # 95 % of a normal distribution lie within this many standard deviations
DRAWS = 2000  # resamples of a bootstrap


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (E. B. Wilson, 1927).

    Unlike the textbook's p +- 1.96 sqrt(p (1 - p) / n) it stays inside [0, 1] and does not shrink to nothing when all
    trials succeed: 20 of 20 give 84 to 100 %. Without trials nothing is known: 0 to 1.
    """
    assert 0 <= successes <= trials
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    low, high = centre - half, centre + half
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)


def bootstrap_rows(rows: int, draws: int = DRAWS) -> np.ndarray:
    """(draws, rows) numbers of rows, drawn with replacement; always the same draws."""
    return np.random.default_rng(0).integers(0, rows, (draws, rows))


def bootstrap_ratio(
    sums: Sequence[float] | np.ndarray, sizes: Sequence[int], draws: int = DRAWS
) -> tuple[float, float]:
    """95 % interval of sum(sums) / sum(sizes) by bootstrap over the pairs, always with the same draws.

    The pairs are what was sampled (documents); what lies inside one is not independent. A single pair says nothing
    beyond itself: both ends are its ratio.

    Args:
        sums: of each pair.
        sizes: of each pair, positive.
        draws: resamples of as many pairs, with replacement.
    """
    n = len(sizes)
    assert n == len(sums) and min(sizes) > 0
    chosen = bootstrap_rows(n, draws)
    return percentile_interval(
        np.asarray(sums, np.float64)[chosen].sum(1) / np.asarray(sizes, np.float64)[chosen].sum(1)
    )


def percentile_interval(drawn: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a statistic from its values over the draws of a bootstrap."""
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)


def format_percent(share: float) -> str:
    """A proportion in percent with one decimal; 100 and 0 only where it is all or nothing."""
    shown = f"{100 * share:.1f}".removesuffix(".0")
    return {"100": "99.9", "0": "0.1"}.get(shown, shown) if 0 < share < 1 else shown


def format_share(share: float, interval: Sequence[float]) -> str:
    """A proportion in percent, with its interval."""
    return f"{format_percent(share)} ({format_percent(interval[0])}-{format_percent(interval[1])})"
