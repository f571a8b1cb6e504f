"""What the answers of a retrieval test amount to: by cell, by length, in all. Imports no torch.

A cell is a NamedTuple that begins with its length; an answer has parts (digits, words), each right or wrong.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from infini_train.eval.intervals import wilson_interval


class Grid(Protocol):
    """Which prompts a test has."""

    @property
    def lengths_tokens(self) -> tuple[int, ...]: ...

    @property
    def samples(self) -> int:
        """Of each cell."""
        ...

    def cells(self) -> Iterator[Any]:
        """In the order of the test."""
        ...

    def prompts(self, length_tokens: int) -> Sequence[Any]:
        """All of one length."""
        ...


@dataclass(frozen=True)
class Score:
    """Of some answers: of one cell, of a length, of all."""

    samples: int
    exact: int
    parts: int
    right_parts: int

    @classmethod
    def of(cls, answers: Iterable[Any]) -> "Score":
        answers = list(answers)
        return cls(
            len(answers),
            sum(answer.is_exact for answer in answers),
            sum(answer.parts for answer in answers),
            sum(answer.right_parts for answer in answers),
        )

    @property
    def exact_match(self) -> float:
        return self.exact / self.samples if self.samples else math.nan

    @property
    def accuracy(self) -> float:
        return self.right_parts / self.parts if self.parts else math.nan

    @property
    def exact_interval(self) -> tuple[float, float]:
        return wilson_interval(self.exact, self.samples)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the accuracy, as if the parts of an answer were independent."""
        return wilson_interval(self.right_parts, self.parts)

    def to_json(self, part: str) -> dict[str, Any]:
        """As plain values, the parts by their name (digit, word); needs at least one answer."""
        return {
            "samples": self.samples,
            "exact": self.exact,
            "exact_match": self.exact_match,
            "exact_match_95": list(self.exact_interval),
            f"{part}s": self.parts,
            f"right_{part}s": self.right_parts,
            f"{part}_accuracy": self.accuracy,
            f"{part}_accuracy_95": list(self.interval),
        }


def score_cells(grid: Grid, answers: Iterable[Any]) -> dict[Any, Score]:
    """Scores of the cells that have answers; others' answers are left out."""
    found: dict[Any, list[Any]] = {cell: [] for cell in grid.cells()}
    for answer in answers:
        if answer.cell in found and answer.sample < grid.samples:
            found[answer.cell].append(answer)
    return {cell: Score.of(own) for cell, own in found.items() if own}


def summarise(
    grid: Grid,
    answers: Sequence[Any],
    segment_tokens: int | None,
    part: str = "digit",
    places: Sequence[str] = ("key",),
) -> dict[str, Any]:
    """Scores of the cells, of the lengths and of all, phases covered, speed and memory, as plain values.

    Args:
        grid: of the test.
        answers: to its prompts, at least one.
        segment_tokens: of the model, None without segments.
        part: what an answer consists of.
        places: names of the fields (with _token) whose phases against the segments are counted.
    """
    longest = [answer for answer in answers if answer.length_tokens == max(grid.lengths_tokens)]
    cells = score_cells(grid, answers)
    lengths = [length for length in grid.lengths_tokens if any(cell[0] == length for cell in cells)]
    of_length = {length: [a for a in answers if a.length_tokens == length] for length in lengths}
    summary: dict[str, Any] = {
        "complete": len(answers) == grid.samples * len(list(grid.cells())),
        "cells": [{**at._asdict(), **score.to_json(part)} for at, score in cells.items()],
        "lengths": [
            {
                "length_tokens": length,
                "peak_memory_mb": max(a.peak_memory_bytes for a in own) / 2**20,
                **Score.of(own).to_json(part),
            }
            for length, own in of_length.items()
        ],
        "all": Score.of(answers).to_json(part),
    }
    if segment_tokens:
        for name in (*places, "question"):
            phases = {getattr(answer, f"{name}_token") % segment_tokens for answer in answers}
            summary[f"{name}_phases"] = len(phases)  # of segment_tokens possible ones
    for name in ("start_tokens_per_s", "end_tokens_per_s"):
        speeds = [speed for speed in (getattr(answer, name) for answer in longest) if speed is not None]
        summary[name] = statistics.median(speeds) if speeds else None
    return summary
