"""How far a share found in a sample may lie from the truth. Imports no torch."""

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054  # the normal distribution holds 95 % within so many standard deviations


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share (E. B. Wilson, 1927).

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


def bootstrap_ratio(sums: Sequence[float] | np.ndarray, sizes: Sequence[int], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of sum(sums) / sum(sizes) by bootstrap over the pairs, always with the same draws.

    The pairs are what was sampled (documents); what lies inside one is not independent. Of a single pair nothing is
    known beyond itself: both ends are its ratio.

    Args:
        sums: of each pair.
        sizes: of each pair, positive.
        draws: resamples of as many pairs, with replacement.
    """
    n = len(sizes)
    assert n == len(sums) and min(sizes) > 0
    chosen = np.random.default_rng(0).integers(0, n, (draws, n))
    ratios = np.asarray(sums, np.float64)[chosen].sum(1) / np.asarray(sizes, np.float64)[chosen].sum(1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)


def format_percent(share: float) -> str:
    """A share in percent with one decimal; 100 and 0 only where it is all or nothing."""
    shown = f"{100 * share:.1f}".removesuffix(".0")
    return {"100": "99.9", "0": "0.1"}.get(shown, shown) if 0 < share < 1 else shown


def format_share(share: float, interval: Sequence[float]) -> str:
    """In percent, with its interval."""
    return f"{format_percent(share)} ({format_percent(interval[0])}-{format_percent(interval[1])})"
