"""The grid of a passkey test, and what its answers amount to. Imports no torch."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from infini_train.config.errors import ConfigError, naming
from infini_train.data.synthetic.wordings import find_wording

LENGTHS = ("32K", "128K", "256K", "512K", "1M")  # the paper's
POSITIONS = ("0", "0.5", "1")
_UNITS = {"": 1, "K": 2**10, "M": 2**20}


class Prompt(NamedTuple):
    """One prompt of the grid."""

    length_tokens: int
    position: float
    sample: int


class PasskeyCell(NamedTuple):
    """Prompts that are scored together."""

    length_tokens: int
    position: float


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
        with naming("--wording"):
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

    def cells(self) -> Iterator[PasskeyCell]:
        """Lengths and positions, in the order of the test."""
        yield from (PasskeyCell(length, position) for length in self.lengths_tokens for position in self.positions)


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
    start_tokens_per_s: float | None  # read, of all lanes together; see `streaming.Reading`
    end_tokens_per_s: float | None  # None: too short to tell
    lanes: int
    peak_memory_bytes: int  # of the process, when the answer was there

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.length_tokens, self.position, self.sample)

    @property
    def is_exact(self) -> bool:
        return self.said == self.key

    @property
    def cell(self) -> "PasskeyCell":
        return PasskeyCell(self.length_tokens, self.position)

    @property
    def parts(self) -> int:
        """Digits of the key."""
        return len(self.key)

    @property
    def right_parts(self) -> int:
        """Of them, those that were said in their places."""
        return sum(said == digit for said, digit in zip(self.said, self.key, strict=True))


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


def parse_positions(texts: Sequence[str], option: str = "--positions") -> tuple[float, ...]:
    """Positions from 0 to 1, given with an option; one whole number above 1 is an even grid of so many."""
    try:
        values = tuple(map(float, texts))
    except ValueError as error:
        raise ConfigError(f"{option}: {' '.join(texts)}: write numbers from 0 (start) to 1 (end)") from error
    if len(texts) == 1 and texts[0].isdecimal() and int(texts[0]) > 1:
        count = int(texts[0])
        return tuple(place / (count - 1) for place in range(count))
    return values
