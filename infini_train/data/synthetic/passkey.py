"""Passkey texts: a key of a few digits inside any amount of filler, and the question for it at the end.

A text is laid out in tokens, so that its length and every place in it are exact: intro, filler, the key (mentioned
twice), filler, question, answer. Only the last sentence of either filler is cut, wherever the length requires. Ids are
generated as they are read, so a text of millions of tokens takes no memory. Imports no torch.

Legend: R probes, P digits of a key, C tokens of the key's sentences.
"""

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from infini_train.config.errors import ConfigError
from infini_train.data.synthetic.haystack import RepeatedHaystack, Stretch, encode_after, read_stretches, stretch_of
from infini_train.data.synthetic.wordings import PasskeyText
from infini_train.data.tokenizer import Tokenizer


class Spans(NamedTuple):
    """Where things lie in a text, as slices of its ids. The mentions and the answer are the digits alone."""

    key: slice  # the sentences about it
    first_mention: slice
    second_mention: slice
    question: slice
    answer: slice


@dataclass(frozen=True, eq=False)
class Passkey:
    """One text, from its intro to the last digit of the answer, without bos and eos.

    Attributes:
        digits: of the key.
        tokens: length of the text.
        spans: where things lie.
        answer_ids: int32, one per digit.
    """

    digits: tuple[int, ...]
    tokens: int
    spans: Spans
    answer_ids: np.ndarray
    _stretches: tuple[Stretch, ...]

    @property
    def ids(self) -> np.ndarray:
        """int32 ids of the whole text; ``ids[:spans.answer.start]`` is the prompt."""
        return self.read(0, self.tokens)

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the answer."""
        return self.spans.answer.start

    @property
    def answer_tokens(self) -> int:
        return len(self.answer_ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        """int32 ids [start, stop), for texts too long to hold."""
        assert 0 <= start <= stop <= self.tokens
        return read_stretches(self._stretches, start, stop)


def choose_before(filler_tokens: int, position: float, jitter_tokens: int, share: float) -> int:
    """Tokens of filler before the key.

    A window of `jitter_tokens` places slides from the filler's start (position 0) to its end (position 1); the key's
    place lies in it. Prompts that all put the key at one phase of the segment grid would hide errors at segment edges,
    so make the window a segment.

    Args:
        filler_tokens: of the whole text.
        position: 0 to 1.
        jitter_tokens: places in the window, at most those of the filler; 0 acts like 1.
        share: which place in the window, in [0, 1).
    """
    assert filler_tokens >= 0 and 0 <= position <= 1 and 0 <= share < 1
    window = min(max(jitter_tokens, 1), filler_tokens + 1)
    return round(position * (filler_tokens + 1 - window)) + int(share * window)


class PasskeyWriter:
    """Writes the texts of one wording in the ids of one tokenizer; every digit is one token.

    Args:
        tokenizer: the model's.
        text: the words.
        digits: of a key.

    Attributes:
        min_tokens: length of a text without filler.
        key_tokens: length of the sentences about the key.
        tail_tokens: length of question and answer.

    Raises:
        ConfigError: the tokenizer merges digits with each other or with their neighbours, or doesn't distinguish them.
    """

    def __init__(self, tokenizer: Tokenizer, text: PasskeyText, digits: int = 5) -> None:
        assert digits > 0
        self.text, self.digits, self._tokenizer = text, digits, tokenizer
        self._intro = tokenizer.encode(text.intro)
        self._filler = _encode_filler(tokenizer, text)
        self._encode_key(tokenizer)
        self.key_tokens, self.tail_tokens = len(self._key), len(self._question) + digits

    @property
    def min_tokens(self) -> int:
        return len(self._intro) + self.key_tokens + self.tail_tokens

    def _encode_key(self, tokenizer: Tokenizer) -> None:
        """Encodes key and question, and locates the digits with probes that put every digit in every place."""
        probes_RP = (np.arange(10)[:, None] + np.arange(self.digits)) % 10
        spelled = ["".join(map(str, probe)) for probe in probes_RP]
        keys = [_encode(tokenizer, " " + self.text.key.replace("{key}", probe)) for probe in spelled]
        asked = [_encode(tokenizer, f" {self.text.question} {probe}") for probe in spelled]
        places = _digit_places(keys, self.digits)
        if places is None or len({len(ids) for ids in asked}) > 1:
            raise _joined_digits()
        keys_RC, asked_RC = np.stack(keys), np.stack(asked)
        digit_ids = np.zeros(10, np.int32)
        digit_ids[probes_RP[:, 0]] = keys_RC[:, places[0]]
        expected_RP, question_RC = digit_ids[probes_RP], asked_RC[:, : -self.digits]
        mentions = [keys_RC[:, place : place + self.digits] for place in places] + [asked_RC[:, -self.digits :]]
        alike = all(np.array_equal(mention, expected_RP) for mention in mentions)
        if not alike or (question_RC != question_RC[0]).any() or len(set(digit_ids.tolist())) < 10:
            raise _joined_digits()
        self._key, self._places, self._question, self._digit_ids = keys_RC[0], places, question_RC[0], digit_ids

    def refill(self, sentences: Iterable[str]) -> "PasskeyWriter":
        """A writer of the same words with other filler."""
        other = copy.copy(self)
        other.text = dataclasses.replace(self.text, filler=tuple(sentences))
        other._filler = _encode_filler(self._tokenizer, other.text)
        return other

    def without_intro(self) -> "PasskeyWriter":
        """A writer of the same words that starts with the filler."""
        other = copy.copy(self)
        other.text = dataclasses.replace(self.text, intro="")
        other._intro = self._intro[:0]
        return other

    def compose(
        self, random: np.random.Generator, length_tokens: int, position: float, *, jitter_tokens: int = 0
    ) -> Passkey:
        """A text with a random key.

        Args:
            random: determines the key, then its place in the window.
            length_tokens: of the whole text, including the answer; at least `min_tokens`.
            position: of the key in the filler, 0 (start) to 1 (end).
            jitter_tokens: places that the key may take around there (see `choose_before`).
        """
        key = random.integers(0, 10, self.digits)
        filler_tokens = length_tokens - self.min_tokens
        return self.place(key, length_tokens, choose_before(filler_tokens, position, jitter_tokens, random.random()))

    def spell(self, ids: Iterable[int]) -> str:
        """The digits of ids that a model generated, one character each; ``?`` for any other id."""
        digits = {int(id): str(digit) for digit, id in enumerate(self._digit_ids)}
        return "".join(digits.get(id, "?") for id in ids)

    def place(self, key: np.ndarray, length_tokens: int, before_tokens: int) -> Passkey:
        """The text with this key after this much filler.

        Args:
            key: the digits, integers 0 to 9.
            length_tokens: of the whole text, including the answer; at least `min_tokens`.
            before_tokens: filler before the key, 0 to ``length_tokens - min_tokens``.
        """
        after_tokens = length_tokens - self.min_tokens - before_tokens
        assert len(key) == self.digits and before_tokens >= 0 and after_tokens >= 0
        answer_ids = self._digit_ids[key]
        key_ids = self._key.copy()
        for place in self._places:
            key_ids[place : place + self.digits] = answer_ids
        begin = len(self._intro) + before_tokens
        asked = begin + len(key_ids) + after_tokens
        first, second = (slice(begin + place, begin + place + self.digits) for place in self._places)
        spans = Spans(
            slice(begin, begin + len(key_ids)),
            first,
            second,
            slice(asked, asked + len(self._question)),
            slice(length_tokens - self.digits, length_tokens),
        )
        filler = RepeatedHaystack(self._filler)
        stretches = (
            stretch_of(self._intro),
            Stretch(filler, 0, before_tokens),
            stretch_of(key_ids),
            Stretch(filler, 0, after_tokens),
            stretch_of(self._question),
            stretch_of(answer_ids),
        )
        return Passkey(tuple(map(int, key)), length_tokens, spans, answer_ids, stretches)


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return encode_after(
        tokenizer, text, joins="the end of a sentence with what follows; passkey texts can't be cut with it"
    )


def _encode_filler(tokenizer: Tokenizer, text: PasskeyText) -> np.ndarray:
    return _encode(tokenizer, " " + " ".join(text.filler))


def _digit_places(keys: list[np.ndarray], digits: int) -> tuple[int, int] | None:
    """Where the two mentions start: what varies between probes, if that is two runs of `digits` tokens each."""
    if len({len(ids) for ids in keys}) > 1:
        return None
    keys_RC = np.stack(keys)
    varying = np.flatnonzero((keys_RC != keys_RC[0]).any(0))
    if len(varying) != 2 * digits:
        return None
    first, second = int(varying[0]), int(varying[digits])
    runs = np.concatenate((np.arange(first, first + digits), np.arange(second, second + digits)))
    return (first, second) if np.array_equal(varying, runs) else None


def _joined_digits() -> ConfigError:
    return ConfigError(
        "tokenizer: doesn't write each digit as a token of its own, as passkey texts need; use one trained by"
        " infini-data tokenizer, or bytes"
    )
