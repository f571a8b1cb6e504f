"""The grid of a passkey test, and what its answers amount to. Imports no torch."""

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from infini_train.config.errors import ConfigError
from infini_train.data.passkey_wordings import find_wording
from infini_train.eval.intervals import wilson_interval

LENGTHS = ("32K", "128K", "256K", "512K", "1M")  # the paper's
POSITIONS = ("0", "0.5", "1")
_UNITS = {"": 1, "K": 2**10, "M": 2**20}


class Prompt(NamedTuple):
    """One prompt of the grid."""

    length_tokens: int
    position: float
    sample: int


@dataclass(frozen=True, kw_only=True)
class PasskeyGrid:
    """Which prompts. A prompt depends on its place in the grid and on the seed, not on the rest of the grid."""

    lengths_tokens: tuple[int, ...]  # of prompt and answer, at most: they end anywhere in the last segment's length
    positions: tuple[float, ...]  # of the key in the filler, 0 to 1
    samples: int = 10  # of each length and position
    seed: int = 0
    digits: int = 5
    wording: str = "paper"

    def __post_init__(self) -> None:
        find_wording(self.wording)
        if not self.lengths_tokens or min(self.lengths_tokens) <= 0:
            raise ConfigError("--lengths: give at least one, each positive")
        if not self.positions or not all(0 <= position <= 1 for position in self.positions):
            raise ConfigError("--positions: give at least one, each between 0 (start) and 1 (end)")
        for name, values in (("--lengths", self.lengths_tokens), ("--positions", self.positions)):
            if len(set(values)) < len(values):
                raise ConfigError(f"{name}: the same one is given twice")
        for name in ("samples", "digits"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}: must be positive")
        if self.seed < 0:
            raise ConfigError("--seed: must not be negative")

    def prompts(self, length_tokens: int) -> list[Prompt]:
        """All of one length, position by position."""
        return [Prompt(length_tokens, place, sample) for place in self.positions for sample in range(self.samples)]

    def cells(self) -> Iterator[tuple[int, float]]:
        """Lengths and positions, in the order of the test."""
        yield from ((length, position) for length in self.lengths_tokens for position in self.positions)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model answered to one prompt. Places count the tokens of the lane, bos first."""

    length_tokens: int  # of the grid
    position: float
    sample: int
    tokens: int  # read before the answer
    key_token: int  # place of the first digit of the key's first mention
    question_token: int
    key: str
    said: str  # digit by digit as the model wrote them; what is no digit is ?
    start_tokens_per_s: float | None  # of all lanes together, while the first tenth of the prompt was read
    end_tokens_per_s: float | None  # and the last; None: too short to tell
    lanes: int
    peak_memory_bytes: int  # of the process, when the answer was there

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.length_tokens, self.position, self.sample)

    @property
    def is_exact(self) -> bool:
        return self.said == self.key

    @property
    def right_digits(self) -> int:
        return sum(said == digit for said, digit in zip(self.said, self.key, strict=True))


@dataclass(frozen=True)
class Score:
    """Of some answers: of one cell, of a length, of all."""

    samples: int
    exact: int
    digits: int
    right_digits: int

    @classmethod
    def of(cls, answers: Iterable[Answer]) -> "Score":
        answers = list(answers)
        return cls(
            len(answers),
            sum(answer.is_exact for answer in answers),
            sum(len(answer.key) for answer in answers),
            sum(answer.right_digits for answer in answers),
        )

    @property
    def exact_match(self) -> float:
        return self.exact / self.samples if self.samples else math.nan

    @property
    def digit_accuracy(self) -> float:
        return self.right_digits / self.digits if self.digits else math.nan

    @property
    def exact_interval(self) -> tuple[float, float]:
        return wilson_interval(self.exact, self.samples)

    @property
    def digit_interval(self) -> tuple[float, float]:
        """As if the digits of a key were independent."""
        return wilson_interval(self.right_digits, self.digits)

    def to_json(self) -> dict[str, Any]:
        """As plain values; needs at least one answer."""
        return {
            "samples": self.samples,
            "exact": self.exact,
            "exact_match": self.exact_match,
            "exact_match_95": list(self.exact_interval),
            "digits": self.digits,
            "right_digits": self.right_digits,
            "digit_accuracy": self.digit_accuracy,
            "digit_accuracy_95": list(self.digit_interval),
        }


def score_cells(grid: PasskeyGrid, answers: Iterable[Answer]) -> dict[tuple[int, float], Score]:
    """Scores by length and position, of the cells that have answers; others' answers are left out."""
    found: dict[tuple[int, float], list[Answer]] = {cell: [] for cell in grid.cells()}
    for answer in answers:
        cell = answer.length_tokens, answer.position
        if cell in found and answer.sample < grid.samples:
            found[cell].append(answer)
    return {cell: Score.of(own) for cell, own in found.items() if own}


def summarise(grid: PasskeyGrid, answers: Sequence[Answer], segment_tokens: int | None) -> dict[str, Any]:
    """Scores of the cells, of the lengths and of all, phases covered, speed and memory, as plain values.

    Args:
        grid: of the test.
        answers: to its prompts, at least one.
        segment_tokens: of the model, None without segments.
    """
    longest = [answer for answer in answers if answer.length_tokens == max(grid.lengths_tokens)]
    cells = score_cells(grid, answers)
    lengths = [length for length in grid.lengths_tokens if any(cell[0] == length for cell in cells)]
    of_length = {length: [a for a in answers if a.length_tokens == length] for length in lengths}
    summary: dict[str, Any] = {
        "complete": len(answers) == grid.samples * len(grid.lengths_tokens) * len(grid.positions),
        "cells": [{"length_tokens": at[0], "position": at[1], **score.to_json()} for at, score in cells.items()],
        "lengths": [
            {
                "length_tokens": length,
                "peak_memory_mb": max(a.peak_memory_bytes for a in own) / 2**20,
                **Score.of(own).to_json(),
            }
            for length, own in of_length.items()
        ],
        "all": Score.of(answers).to_json(),
    }
    if segment_tokens:
        for name in ("key", "question"):
            phases = {getattr(answer, f"{name}_token") % segment_tokens for answer in answers}
            summary[f"{name}_phases"] = len(phases)  # of segment_tokens possible ones
    for name in ("start_tokens_per_s", "end_tokens_per_s"):
        speeds = [speed for speed in (getattr(answer, name) for answer in longest) if speed is not None]
        summary[name] = statistics.median(speeds) if speeds else None
    return summary


def parse_length(text: str, option: str = "--lengths") -> int:
    """Tokens of a length such as 5000, 32K or 1M (K: 1024, M: 1024 K), given with an option."""
    match = re.fullmatch(r"(\d+)([KM]?)", text.upper())
    if match is None:
        raise ConfigError(f"{option}: {text} is no length; write tokens as 5000, 32K or 1M")
    return int(match[1]) * _UNITS[match[2]]


def format_length(tokens: int) -> str:
    """32K, 1M; other numbers in full."""
    unit = next(unit for unit in ("M", "K", "") if tokens % _UNITS[unit] == 0)
    return f"{tokens // _UNITS[unit]}{unit}"


def parse_positions(texts: Sequence[str]) -> tuple[float, ...]:
    """Positions from 0 to 1; one whole number above 1 is an even grid of as many from start to end."""
    try:
        values = tuple(map(float, texts))
    except ValueError as error:
        raise ConfigError(f"--positions: {' '.join(texts)}: write numbers from 0 (start) to 1 (end)") from error
    if len(texts) == 1 and texts[0].isdecimal() and int(texts[0]) > 1:
        count = int(texts[0])
        return tuple(place / (count - 1) for place in range(count))
    return values
