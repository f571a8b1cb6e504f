"""Memory pressure while training: texts that feel far longer than they are. Imports no torch."""

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
    """Write weights of a text (tokens,), float32: 1, or more in segments that hold nothing to remember.

    More is as if the segment had been read that many times, so that a window feels like a far longer one. This
    augmentation is not in the paper.

    Args:
        random: gives whether the text is pressed, and how much.
        tokens: of the text, without bos; position i is the input before token i.
        window_tokens: of a lane.
        segment_tokens: of the model; the text begins at a segment's edge.
        kept: tokens to remember; their segments, and the first one, keep a weight of 1.
        pressure: up to so many windows the text feels long, log-uniform; 1 presses none.
        share: of the texts that are pressed.
    """
    weights = np.ones(tokens, np.float32)
    drawn, power = random.random(2)
    if pressure == 1 or drawn >= share:
        return weights
    segment = np.arange(tokens) // segment_tokens
    holds = segment == 0
    for span in kept:  # behind the bos
        holds |= (segment >= (span.start + 1) // segment_tokens) & (segment <= span.stop // segment_tokens)
    weights[~holds] = (pressure * window_tokens / tokens) ** power
    return weights
