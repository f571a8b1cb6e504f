"""Haystacks: endless token ids generated as they are read, and texts assembled from stretches of them.

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
from infini_train.data.synthetic.wordings import SENTENCES, WORDS, find_wording
from infini_train.data.tokenizer import Tokenizer

HAYSTACKS = ("repeated", "varied", "words", "tokens", "assorted")  # any other name is a file of prose
SENTENCE_END = "."  # text is encoded as it stands after a sentence; encoded alone it might start with an extra space
_BLOCK_PARTS = 64
UNKNOWN = " \N{DOUBLE QUESTION MARK} "  # what SentencePiece writes for its unknown token


class Haystack(Protocol):
    """Endless ids, the same at every reading."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """int32 ids [start, stop)."""
        ...


@dataclass(frozen=True, eq=False)
class RepeatedHaystack:
    """The same int32 ids over and over, starting at `offset`."""

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
    """Sentences, words or tokens in random order: they recur, longer stretches do not.

    Args:
        parts: int32 ids of each.
        seed: determines the order.
    """

    def __init__(self, parts: Sequence[np.ndarray], seed: Sequence[int]) -> None:
        self._parts, self._seed = parts, list(seed)
        self._ends = [0]  # ends of the blocks read so far: one number per block, however long the haystack

    def _block(self, number: int) -> np.ndarray:
        order = np.random.default_rng([*self._seed, number]).integers(0, len(self._parts), _BLOCK_PARTS)
        return np.concatenate([self._parts[i] for i in order])

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `Haystack.read`."""
        while self._ends[-1] < stop:
            self._ends.append(self._ends[-1] + len(self._block(len(self._ends) - 1)))
        chunks = [np.zeros(0, np.int32)]
        number = bisect.bisect_right(self._ends, start) - 1
        while start < stop:
            begin, end = self._ends[number], self._ends[number + 1]
            chunks.append(self._block(number)[start - begin : min(stop, end) - begin])
            start, number = min(stop, end), number + 1
        return np.concatenate(chunks)


class HaystackSource:
    """Draws a haystack for each text.

    Args:
        name: "repeated" (the filler of the paper's passkey test), "varied" (sentences in random order), "words" (words
            in random order), "tokens" (any of the tokenizer's), "assorted" (one of the last three for each text), or a
            file of prose (.jsonl: the "text" field of every line), which each text reads from a random place on.
        tokenizer: the model's.

    Attributes:
        prose_tokens: length of the prose; longer texts repeat it. None: no file.

    Raises:
        ConfigError: the file can't be read or holds no text.
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self._ids = np.zeros(0, np.int32)
        self._parts = [_PARTS[part](tokenizer) for part in (_PARTS if name == "assorted" else [name]) if part in _PARTS]
        if name == "repeated":
            self._ids = encode_after(tokenizer, " " + " ".join(find_wording("paper").filler))
        elif not self._parts:
            texts = read_prose(Path(name), f"give {', '.join(HAYSTACKS)}, or a text or .jsonl file")
            self._ids = np.concatenate([encode_after(tokenizer, f" {text}") for text in texts])
        self.prose_tokens = None if name in HAYSTACKS else len(self._ids)

    def draw(self, seed: Sequence[int]) -> Haystack:
        """A haystack, as a pure function of the seed."""
        if self._parts:
            return VariedHaystack(self._parts[self._choose(seed)], seed)
        if self.name == "repeated":
            return RepeatedHaystack(self._ids)
        return RepeatedHaystack(self._ids, int(np.random.default_rng(seed).integers(0, len(self._ids))))

    def _choose(self, seed: Sequence[int]) -> int:
        return 0 if len(self._parts) == 1 else int(np.random.default_rng([*seed, 1]).integers(0, len(self._parts)))


def _sentences(tokenizer: Tokenizer) -> list[np.ndarray]:
    return [encode_after(tokenizer, f" {sentence}") for sentence in SENTENCES]


def _words(tokenizer: Tokenizer) -> list[np.ndarray]:
    return [encode_after(tokenizer, f" {word}") for word in WORDS]


def _tokens(tokenizer: Tokenizer) -> list[np.ndarray]:
    """Each token that stands for text, not for text that the tokenizer does not know."""
    texts = ((i, tokenizer.decode([i])) for i in range(tokenizer.vocab_size))
    return [np.array([i], np.int32) for i, text in texts if text and text != UNKNOWN]


_PARTS = {"varied": _sentences, "words": _words, "tokens": _tokens}  # what hay of this name is made of


def read_prose(path: Path, advice: str = "give a text or .jsonl file") -> list[str]:
    """The texts of a file, stripped, without empty ones; line breaks inside a text stay.

    Args:
        path: a text, or JSON lines with a "text" each.
        advice: what to do if it can't be read.

    Raises:
        ConfigError: it can't be read or holds no text.
    """
    try:
        whole = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror}); {advice}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text; give a text or .jsonl file") from error
    texts = [whole]
    if path.suffix == ".jsonl":
        try:
            texts = [str(json.loads(line)["text"]) for line in whole.splitlines() if line.strip()]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f'{path}: every line must be a JSON object with a "text" field') from error
    texts = [text for text in map(str.strip, texts) if text]
    if not texts:
        raise ConfigError(f"{path} holds no text")
    return texts


def encode_after(
    tokenizer: Tokenizer,
    text: str,
    before: str = SENTENCE_END,
    joins: str = "the end of a sentence with what follows; needles can't be hidden with it",
) -> np.ndarray:
    """int32 ids of a text as it stands after another one, by default after the end of a sentence.

    Args:
        tokenizer: the model's.
        text: not empty.
        before: the text before it.
        joins: for the message: what a tokenizer joins that can't keep the two apart.

    Raises:
        ConfigError: a token spans the boundary.
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


def stretch_of(ids: np.ndarray) -> Stretch:
    """All of these int32 ids, once."""
    return Stretch(RepeatedHaystack(ids), 0, len(ids))


def read_stretches(stretches: Sequence[Stretch], start: int, stop: int) -> np.ndarray:
    """int32 ids [start, stop) of the concatenated stretches."""
    chunks, begin = [np.zeros(0, np.int32)], 0
    for stretch in stretches:
        first, last = max(start - begin, 0), min(stop - begin, stretch.tokens)
        if first < last:
            chunks.append(stretch.source.read(stretch.start + first, stretch.start + last))
        begin += stretch.tokens
    return np.concatenate(chunks)
