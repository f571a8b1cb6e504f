"""What needles are hidden in: endless token ids, made as they are read, and texts put together of stretches of them.

Imports no torch.
"""

import bisect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from infini_train.config.errors import ConfigError
from infini_train.data.passkey_wordings import SENTENCES, find_wording
from infini_train.data.tokenizer import Tokenizer

HAYSTACKS = ("repeated", "varied")  # any other name is a file of prose
SENTENCE_END = "."  # whatever is encoded stands behind it, as in the text; alone it might begin with a space of its own
_BLOCK_SENTENCES = 64


class Haystack(Protocol):
    """Endless ids, the same at every reading."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """The int32 ids [start, stop)."""
        ...


@dataclass(frozen=True, eq=False)
class RepeatedHaystack:
    """Ids repeated for ever, from a place in them on."""

    ids: np.ndarray
    offset: int = 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `Haystack.read`."""
        size = len(self.ids)
        begin = (self.offset + start) % size
        length = stop - start
        if begin + length <= size:
            return self.ids[begin : begin + length]
        return np.tile(self.ids, -(-(begin + length) // size))[begin : begin + length]


class VariedHaystack:
    """Sentences in random order for ever: no stretch comes back, though its sentences do.

    Args:
        sentences: ids of each.
        seed: of the order.
    """

    def __init__(self, sentences: Sequence[np.ndarray], seed: Sequence[int]) -> None:
        self._sentences, self._seed = sentences, list(seed)
        self._ends = [0]  # of the blocks met so far: a number each, whatever the length

    def _block(self, number: int) -> np.ndarray:
        order = np.random.default_rng([*self._seed, number]).integers(0, len(self._sentences), _BLOCK_SENTENCES)
        return np.concatenate([self._sentences[i] for i in order])

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `Haystack.read`."""
        while self._ends[-1] < stop:
            self._ends.append(self._ends[-1] + len(self._block(len(self._ends) - 1)))
        pieces = [np.zeros(0, np.int32)]
        number = bisect.bisect_right(self._ends, start) - 1
        while start < stop:
            begin, end = self._ends[number], self._ends[number + 1]
            pieces.append(self._block(number)[start - begin : min(stop, end) - begin])
            start, number = min(stop, end), number + 1
        return np.concatenate(pieces)


class HaystackSource:
    """Gives each text its haystack.

    Args:
        name: "repeated" (the filler of the paper's passkey), "varied" (sentences in random order), or a text file
            (.jsonl: the "text" field of every line), from a random place of which each text reads on.
        tokenizer: of the model.

    Raises:
        ConfigError: the file can't be read or holds no text.
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self._sentences: list[np.ndarray] = []
        self._ids = np.zeros(0, np.int32)
        if name == "varied":
            self._sentences = [encode_behind(tokenizer, f" {sentence}") for sentence in SENTENCES]
        elif name == "repeated":
            self._ids = encode_behind(tokenizer, " " + " ".join(find_wording("paper").filler))
        else:
            self._ids = np.concatenate([encode_behind(tokenizer, f" {text}") for text in _read_prose(Path(name))])

    def draw(self, seed: Sequence[int]) -> Haystack:
        """A haystack as a pure function of the seed."""
        if self._sentences:
            return VariedHaystack(self._sentences, seed)
        if self.name == "repeated":
            return RepeatedHaystack(self._ids)
        return RepeatedHaystack(self._ids, int(np.random.default_rng(seed).integers(0, len(self._ids))))

    @property
    def prose_tokens(self) -> int | None:
        """Of a file: longer texts meet parts of it again. None: no file."""
        return None if self.name in HAYSTACKS else len(self._ids)


def _read_prose(path: Path) -> list[str]:
    """The texts of a file, without line breaks inside paragraphs' ends being lost."""
    try:
        whole = path.read_text(encoding="utf-8")
    except OSError as error:
        advice = f"give {', '.join(HAYSTACKS)}, or a text or .jsonl file"
        raise ConfigError(f"--haystack: {path} can't be read ({error.strerror}); {advice}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--haystack: {path} is not UTF-8 text; give a text or .jsonl file") from error
    texts = [whole]
    if path.suffix == ".jsonl":
        try:
            texts = [str(json.loads(line)["text"]) for line in whole.splitlines() if line.strip()]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f'--haystack: {path}: every line must be a JSON object with a "text" field') from error
    texts = [text for text in map(str.strip, texts) if text]
    if not texts:
        raise ConfigError(f"--haystack: {path} holds no text")
    return texts


def encode_behind(
    tokenizer: Tokenizer,
    text: str,
    before: str = SENTENCE_END,
    joins: str = "the end of a sentence with what follows; needles can't be hidden with it",
) -> np.ndarray:
    """int32 ids of the text as it stands behind another one, by default behind the end of a sentence.

    Args:
        tokenizer: of the model.
        text: not empty.
        before: what it stands behind.
        joins: what a tokenizer joins that can't keep the two apart, for the message.

    Raises:
        ConfigError: the tokenizer joins the two.
    """
    known, ids = tokenizer.encode(before), tokenizer.encode(before + text)
    if len(ids) <= len(known) or not np.array_equal(known, ids[: len(known)]):
        raise ConfigError(f"tokenizer: joins {joins}")
    return ids[len(known) :]


class Stretch(NamedTuple):
    """Ids [start, start + tokens) of a haystack."""

    source: Haystack
    start: int
    tokens: int


def read_stretches(stretches: Sequence[Stretch], start: int, stop: int) -> np.ndarray:
    """The int32 ids [start, stop) of stretches put together."""
    pieces, begin = [np.zeros(0, np.int32)], 0
    for stretch in stretches:
        first, last = max(start - begin, 0), min(stop - begin, stretch.tokens)
        if first < last:
            pieces.append(stretch.source.read(stretch.start + first, stretch.start + last))
        begin += stretch.tokens
    return np.concatenate(pieces)
