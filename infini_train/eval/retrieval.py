"""Retrieval tests: grids of prompts that hide something, a model's answers to them, and scores by cell.

What the tests of passkeys, needles and BABILong share; each of them writes its own prompts. A grid is made of lengths
and columns; a column is whatever else distinguishes cells: a depth, a number of needles and a depth, a task. An answer
has parts (digits, words), each right or wrong. Imports torch late.
"""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from infini_train.config.errors import ConfigError
from infini_train.data.tokenizer import Tokenizer
from infini_train.statistics import wilson_interval

if TYPE_CHECKING:
    from infini_train.inference.streaming import PromptText
    from infini_train.model.transformer import Transformer

# Multiples of these, modulo 1, fill the interval evenly, and in pairs the square: the golden ratio, the root of 2.
EVEN_STEPS = np.array([0.6180339887498949, 0.4142135623730951])


# ---------------------------------------------------------------------------------------------------------------- grid


@dataclass(frozen=True, kw_only=True)
class RetrievalGrid(ABC):
    """Which prompts. A prompt depends on its place in the grid and on the seed, not on the rest of the grid.

    Attributes:
        prompt_type: NamedTuple of a prompt: `length_tokens`, the fields of a column, `sample`. A cell is a prompt
            without its sample: the prompts that are scored together.
    """

    prompt_type: ClassVar[type[Any]]

    lengths_tokens: tuple[int, ...]  # of prompt and answer, at most: they end anywhere in the last segment's length
    depths: tuple[float, ...] = (0.0, 0.5, 1.0)  # of what is asked for, in the text around it: 0 start, 1 end
    samples: int = 10  # of each cell
    seed: int = 0
    digits: int = 5

    def __post_init__(self) -> None:
        if not self.lengths_tokens or min(self.lengths_tokens) <= 0:
            raise ConfigError("--lengths: give at least one, each positive")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError("--depths: give at least one, each between 0 (start) and 1 (end)")
        for name, values in (("--lengths", self.lengths_tokens), ("--depths", self.depths)):
            if len(set(values)) < len(values):
                raise ConfigError(f"{name}: the same one is given twice")
        for name in ("samples", "digits"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}: must be positive")
        if self.seed < 0:
            raise ConfigError("--seed: must not be negative")

    @abstractmethod
    def columns(self) -> list[tuple[Any, ...]]:
        """What cells of one length have besides it, in the order of the test."""

    def cells(self) -> list[tuple[Any, ...]]:
        """All cells, in the order of the test."""
        return [(length, *column) for length in self.lengths_tokens for column in self.columns()]

    def prompts(self, length_tokens: int) -> list[Any]:
        """All prompts of one length, cell by cell."""
        return [self.prompt_type(length_tokens, *c, sample) for c in self.columns() for sample in range(self.samples)]


@dataclass(frozen=True, kw_only=True)
class RetrievalAnswer(ABC):
    """What the model answered to one prompt; a line of answers.jsonl. Places count the tokens of the lane, bos first.

    Subclasses add the other fields of `prompt_type`.
    """

    prompt_type: ClassVar[type[Any]]

    length_tokens: int  # of the grid
    sample: int
    tokens: int  # read before the answer
    question_token: int
    said: str  # the prediction
    start_tokens_per_s: float | None  # read, of all lanes together; see `streaming.PromptAnswers`
    end_tokens_per_s: float | None  # None: too short to measure
    lanes: int
    peak_memory_bytes: int  # of the process, when the answer was there

    @property
    def prompt(self) -> Any:
        return self.prompt_type(*(getattr(self, name) for name in self.prompt_type._fields))

    @property
    def cell(self) -> tuple[Any, ...]:
        return tuple(self.prompt[:-1])

    @property
    @abstractmethod
    def parts(self) -> int:
        """Digits or words that were asked for."""

    @property
    @abstractmethod
    def right_parts(self) -> int:
        """Digits or words that were predicted right."""

    @property
    def is_exact(self) -> bool:
        return self.right_parts == self.parts


# ------------------------------------------------------------------------------------------------------------- answers


class RetrievalPrompts(ABC):
    """Writes the prompts of a grid, and makes records of what a model answers to them.

    Args:
        grid: of the test.
        tokenizer: of the model.
        segment_tokens: of the model; what is asked for, and the ends of texts, are spread over one.

    Raises:
        ConfigError: a length can't hold its prompts, or the tokenizer does not do.
    """

    def __init__(self, grid: Any, tokenizer: Tokenizer, segment_tokens: int) -> None:
        self.grid, self.tokenizer, self.segment_tokens = grid, tokenizer, segment_tokens

    @abstractmethod
    def write(self, prompt: Any) -> Any:
        """The text of a prompt: a `PromptText`."""

    @abstractmethod
    def record(self, prompt: Any, text: Any, predicted: list[int], measured: dict[str, Any]) -> Any:
        """The answer as a `RetrievalAnswer`, from predicted token ids and the fields that are the same in all tests."""

    def spread(self, prompt: Any, seed: list[int], min_tokens: int) -> tuple[float, int]:
        """Phases of a prompt against the segment grid, from an evenly filling sequence.

        So few samples cover a segment well, and more samples go on with it. The text is up to a segment shorter than
        the prompt's length: the question may lie across an edge, as in real prompts.

        Args:
            prompt: of the grid.
            seed: of its cell.
            min_tokens: of its text, without anything to hide in.

        Returns:
            The phase of what is asked for, 0 to 1, and the tokens of the text, without bos.
        """
        phase, end = (np.random.default_rng(seed).random(2) + prompt.sample * EVEN_STEPS) % 1
        longest = prompt.length_tokens - 1  # bos
        return float(phase), longest - int(end * min(self.segment_tokens, longest - min_tokens + 1))


def answer_prompts(
    model: "Transformer",
    prompts: RetrievalPrompts,
    *,
    lanes: int,
    done: Collection[Any] = (),
    on_progress: Callable[[int], object] = lambda tokens: None,
) -> Iterator[list[Any]]:
    """Answers to the prompts of a grid, a batch at a time, shorter lengths first.

    The model may write as many tokens as the right answer has, always the most likely one.

    Args:
        model: any variant, on its device.
        prompts: of the grid.
        lanes: prompts of one length read side by side.
        done: prompts to leave out.
        on_progress: called with tokens read.
    """
    from infini_train.inference.streaming import read_prompts
    from infini_train.parallel import device

    for length in sorted(prompts.grid.lengths_tokens):
        missing = [prompt for prompt in prompts.grid.prompts(length) if prompt not in done]
        for batch in (missing[first : first + lanes] for first in range(0, len(missing), lanes)):
            texts: list[PromptText] = [prompts.write(prompt) for prompt in batch]
            answers = read_prompts(model, texts, prompts.tokenizer.bos_id, on_progress)
            measured = {
                "start_tokens_per_s": answers.start_tokens_per_s,
                "end_tokens_per_s": answers.end_tokens_per_s,
                "lanes": len(batch),
                "peak_memory_bytes": device.peak_memory_bytes(),
            }
            yield [
                prompts.record(prompt, text, predicted, {"tokens": text.prompt_tokens + 1, **measured})
                for prompt, text, predicted in zip(batch, texts, answers.predicted, strict=True)
            ]


# -------------------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class RetrievalScore:
    """Aggregate score of the answers of a cell, of a length, or of all."""

    samples: int
    exact: int
    parts: int
    right_parts: int

    @classmethod
    def of(cls, answers: Iterable[RetrievalAnswer]) -> "RetrievalScore":
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
        """Interval of the accuracy, as if the parts of an answer were independent."""
        return wilson_interval(self.right_parts, self.parts)

    @property
    def score(self) -> float:
        """The accuracy as a mean over samples, whose answers have equally many parts."""
        return self.accuracy

    @property
    def score_interval(self) -> tuple[float, float]:
        """Interval of the score, as if the parts of an answer were right or wrong together: at least wide enough."""
        return wilson_interval(self.samples * self.right_parts / self.parts if self.parts else 0, self.samples)

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


def score_cells(grid: RetrievalGrid, answers: Iterable[Any]) -> dict[tuple[Any, ...], RetrievalScore]:
    """Scores of the cells that have answers; answers of other cells are left out."""
    found: dict[tuple[Any, ...], list[Any]] = {cell: [] for cell in grid.cells()}
    for answer in answers:
        if answer.cell in found and answer.sample < grid.samples:
            found[answer.cell].append(answer)
    return {cell: RetrievalScore.of(own) for cell, own in found.items() if own}


def summarise_answers(
    grid: RetrievalGrid,
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
        "complete": len(answers) == grid.samples * len(grid.cells()),
        "cells": [
            {**dict(zip(grid.prompt_type._fields[:-1], cell, strict=True)), **score.to_json(part)}
            for cell, score in cells.items()
        ],
        "lengths": [
            {
                "length_tokens": length,
                "peak_memory_mb": max(a.peak_memory_bytes for a in own) / 2**20,
                **RetrievalScore.of(own).to_json(part),
            }
            for length, own in of_length.items()
        ],
        "all": RetrievalScore.of(answers).to_json(part),
    }
    if segment_tokens:
        for name in (*places, "question"):
            phases = {getattr(answer, f"{name}_token") % segment_tokens for answer in answers}
            summary[f"{name}_phases"] = len(phases)  # of segment_tokens possible ones
    for name in ("start_tokens_per_s", "end_tokens_per_s"):
        speeds = [speed for speed in (getattr(answer, name) for answer in longest) if speed is not None]
        summary[name] = statistics.median(speeds) if speeds else None
    return summary
