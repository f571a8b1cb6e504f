"""Types of numbers on the command line, with limits: beyond them libraries overflow, or the machine gives up."""

import argparse
from collections.abc import Callable
from typing import TypeVar

from infini_train.command_line import non_negative, positive, positive_float

_N = TypeVar("_N", int, float)


def at_most(limit: int, convert: Callable[[str], _N]) -> Callable[[str], _N]:
    """A type of `argparse` that also refuses what lies above a limit."""

    def number(text: str) -> _N:  # argparse shows this name
        value = convert(text)
        if value > limit:
            raise argparse.ArgumentTypeError(f"must be at most {limit:,}")
        return value

    return number


megabytes = at_most(1_000_000_000, positive_float)
gigabytes = at_most(1_000_000, positive)
processes = at_most(4096, non_negative)
tokens = at_most(10_000_000, positive)  # of a vocabulary
count = at_most(1_000_000_000_000, non_negative)
positive_count = at_most(1_000_000_000_000, positive)
