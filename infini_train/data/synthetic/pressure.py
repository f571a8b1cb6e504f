"""Memory pressure in training: larger write weights make a text act like a much longer one. Imports no torch."""

from collections.abc import Iterable

import numpy as np


def weigh_writes(
    random: np.random.Generator,
    tokens: int,
    window_tokens: int,
    segment_tokens: int,
    kept: Iterable[slice],
    pressure: float,
    share: float,
) -> np.ndarray:
    """Write weights of a text: 1, or more in segments that hold nothing to remember.

    A weight of n writes a segment as if it had been read n times, so that a window fills the memory like a far longer
    one. This augmentation is not in the paper.

    Args:
        random: decides whether the text gets pressure, and how much.
        tokens: length of the text, without bos; position i is the input before token i.
        window_tokens: sequence length of a training window.
        segment_tokens: the model's; the text starts at a segment's edge.
        kept: tokens to remember; their segments, and the first one, keep a weight of 1.
        pressure: the text acts like one of up to this many windows, drawn log-uniformly; 1 turns it off.
        share: probability that a text gets pressure.

    Returns:
        float32 (tokens,).
    """
    weights = np.ones(tokens, np.float32)
    drawn, power = random.random(2)
    if pressure == 1 or drawn >= share:
        return weights
    segment = np.arange(tokens) // segment_tokens
    holds = segment == 0
    for span in kept:  # shifted by the bos
        holds |= (segment >= (span.start + 1) // segment_tokens) & (segment <= span.stop // segment_tokens)
    weights[~holds] = (pressure * window_tokens / tokens) ** power
    return weights
