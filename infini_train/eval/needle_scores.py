"""The grid of a needle test, and what its answers amount to. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from infini_train.config.data import VALUE_EACH
from infini_train.config.errors import ConfigError
from infini_train.data.synthetic.needles import ONE_ASKED, TASKS, THINGS, Task, find_words

LENGTHS = ("4K", "16K", "64K")
DEPTHS = ("0", "0.5", "1")
SPREAD = 0.5  # stands for the depth where all needles matter


class NeedlePrompt(NamedTuple):
    """One prompt of the grid."""

    length_tokens: int
    needles: int
    depth: float
    sample: int

    @property
    def cell(self) -> "NeedleCell":
        return NeedleCell(*self[:3])


class NeedleCell(NamedTuple):
    """Prompts that are scored together."""

    length_tokens: int
    needles: int
    depth: float


@dataclass(frozen=True, kw_only=True)
class NeedleGrid:
    """Which prompts. A prompt depends on its place in the grid and on the seed, not on the rest of the grid."""

    task: Task
    lengths_tokens: tuple[int, ...]  # of prompt and answer, at most
    needles: tuple[int, ...] = (4,)  # hidden in a text; with variables, links of the asked chain
    depths: tuple[float, ...] = (0.0, 0.5, 1.0)  # of the asked needle in the hay, where one is asked
    samples: int = 10  # of each cell
    seed: int = 0
    digits: int = 5
    haystack: str = "repeated"

    def __post_init__(self) -> None:
        self._check()
        if self.task == "single" and self.needles != (1,):
            object.__setattr__(self, "needles", (1,))
        if self.task not in ONE_ASKED:
            object.__setattr__(self, "depths", (SPREAD,))

    def _check(self) -> None:
        positive = {"lengths": self.lengths_tokens, "needles": self.needles, "samples": (self.samples,)}
        for name, values in {**positive, "digits": (self.digits,)}.items():
            if not values or min(values) < 1:
                raise ConfigError(f"--{name}: must be positive")
        for name, values in {"lengths": self.lengths_tokens, "needles": self.needles, "depths": self.depths}.items():
            if len(set(values)) < len(values):
                raise ConfigError(f"--{name}: the same one is given twice")
        if self.task not in TASKS:
            raise ConfigError(f"--task: {self.task}: no such task; choose one of {', '.join(TASKS)}")
        if max(self.needles) > len(THINGS):
            raise ConfigError(f"--needles: {max(self.needles)} are too many; at most {len(THINGS)}")
        if self.task in VALUE_EACH and max(self.needles) > 10**self.digits:
            raise ConfigError(f"--digits: there are not {max(self.needles)} values of so few; raise it")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError("--depths: give at least one, each between 0 (start) and 1 (end)")
        if self.seed < 0:
            raise ConfigError("--seed: must not be negative")

    def prompts(self, length_tokens: int) -> list[NeedlePrompt]:
        """All of one length, cell by cell."""
        cells = [cell for cell in self.cells() if cell.length_tokens == length_tokens]
        return [NeedlePrompt(*cell, sample) for cell in cells for sample in range(self.samples)]

    def columns(self) -> list[tuple[int, float]]:
        """Needles and depths of the cells of one length."""
        return [(needles, depth) for needles in self.needles for depth in self.depths]

    def cells(self) -> Iterator[NeedleCell]:
        """In the order of the test."""
        yield from (NeedleCell(length, *column) for length in self.lengths_tokens for column in self.columns())


@dataclass(frozen=True, kw_only=True)
class NeedleAnswer:
    """What the model answered to one prompt. Places count the tokens of the lane, bos first."""

    length_tokens: int
    needles: int
    depth: float
    sample: int
    tokens: int  # read before the answer
    needle_tokens: list[int]  # places of the needles that hold the answer
    question_token: int
    expected: list[str]
    said: str
    start_tokens_per_s: float | None  # read, of all lanes together; see `streaming.Reading`
    end_tokens_per_s: float | None
    lanes: int
    peak_memory_bytes: int

    @property
    def prompt(self) -> NeedlePrompt:
        return NeedlePrompt(self.length_tokens, self.needles, self.depth, self.sample)

    @property
    def cell(self) -> NeedleCell:
        return self.prompt.cell

    @property
    def is_exact(self) -> bool:
        return self.right_parts == self.parts

    @property
    def parts(self) -> int:
        """Words that were asked for."""
        return len(self.expected)

    @property
    def right_parts(self) -> int:
        """Of them, those that were said."""
        return sum(find_words(self.expected, self.said))
