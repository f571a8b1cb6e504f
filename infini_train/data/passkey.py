"""Passkey texts: a key of some digits inside any amount of filler, and the question for it at the end.

A text is laid out in tokens, so that its length and every place in it are exact: intro, filler, the key (mentioned
twice), filler, question, answer. Only the last sentence of either filler is cut, wherever the length wants it. Nothing
is spelled out before it is read, so a text of millions of tokens costs no memory. Imports no torch.

Legend: R probes, P digits of a key, C tokens of the key's sentences.
"""

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from infini_train.config.errors import ConfigError
from infini_train.data.passkey_wordings import PasskeyText
from infini_train.data.tokenizer import Tokenizer

_ANCHOR = "."  # whatever is encoded stands behind it, as in the text; alone it might begin with a space of its own


class Spans(NamedTuple):
    """Where the parts of a text lie, as slices of its ids. The mentions and the answer are the digits alone."""

    key: slice  # the sentences about it
    first_mention: slice
    second_mention: slice
    question: slice
    answer: slice


class _Part(NamedTuple):
    ids: np.ndarray  # repeated from their beginning
    tokens: int  # up to this length


@dataclass(frozen=True, eq=False)
class Passkey:
    """One text, from its intro to the last digit of the answer, without bos and eos.

    Attributes:
        digits: of the key.
        tokens: of the whole text.
        spans: where its parts lie.
        answer_ids: int32, one a digit.
    """

    digits: tuple[int, ...]
    tokens: int
    spans: Spans
    answer_ids: np.ndarray
    _parts: tuple[_Part, ...]

    @property
    def ids(self) -> np.ndarray:
        """int32 ids of the whole text; ``ids[:spans.answer.start]`` is the prompt."""
        return self.read(0, self.tokens)

    @property
    def prompt_tokens(self) -> int:
        """Before the answer."""
        return self.spans.answer.start

    @property
    def answer_tokens(self) -> int:
        return len(self.answer_ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The int32 ids [start, stop), for texts too long to hold."""
        assert 0 <= start <= stop <= self.tokens
        pieces, begin = [np.zeros(0, np.int32)], 0
        for part in self._parts:
            first, last = max(start - begin, 0), min(stop - begin, part.tokens)
            if first < last:
                pieces.append(_repeat(part.ids, first, last))
            begin += part.tokens
        return np.concatenate(pieces)


def _repeat(ids: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Elements [start, stop) of the endless repetition of `ids`."""
    if stop <= len(ids):
        return ids[start:stop]
    skipped = start % len(ids)
    return np.tile(ids, -(-(skipped + stop - start) // len(ids)))[skipped : skipped + stop - start]


def choose_before(filler_tokens: int, position: float, jitter_tokens: int, share: float) -> int:
    """Tokens of the filler that go before the key.

    A window of `jitter_tokens` places slides from the filler's start (position 0) to its end (position 1); the key's
    place lies in it. Prompts that all put the key at one phase of the segment grid would hide errors at segment edges,
    so let the window be a segment.

    Args:
        filler_tokens: of the whole text.
        position: 0 to 1.
        jitter_tokens: places in the window, as many as the filler has at most; 0 is like 1.
        share: which place of the window, from 0 to less than 1.
    """
    assert filler_tokens >= 0 and 0 <= position <= 1 and 0 <= share < 1
    window = min(max(jitter_tokens, 1), filler_tokens + 1)
    return round(position * (filler_tokens + 1 - window)) + int(share * window)


class PasskeyWriter:
    """Writes the texts of one wording in the ids of one tokenizer; every digit is one token.

    Args:
        tokenizer: of the model.
        text: the words.
        digits: of a key.

    Attributes:
        min_tokens: of a text without filler.
        key_tokens: of the sentences about the key.
        tail_tokens: of question and answer.

    Raises:
        ConfigError: the tokenizer joins digits with each other or with what is around them, or doesn't tell them apart.
    """

    def __init__(self, tokenizer: Tokenizer, text: PasskeyText, digits: int = 5) -> None:
        assert digits > 0
        self.text, self.digits, self._tokenizer = text, digits, tokenizer
        self._intro = _encode(tokenizer, text.intro, anchor="")
        self._filler = _encode_filler(tokenizer, text)
        self._encode_key(tokenizer)
        self.key_tokens, self.tail_tokens = len(self._key), len(self._question) + digits

    @property
    def min_tokens(self) -> int:
        return len(self._intro) + self.key_tokens + self.tail_tokens

    def _encode_key(self, tokenizer: Tokenizer) -> None:
        """Key and question with the places of the digits, found by probes that put every digit in every place."""
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
        """A writer of the same words around other filler."""
        other = copy.copy(self)
        other.text = dataclasses.replace(self.text, filler=tuple(sentences))
        other._filler = _encode_filler(self._tokenizer, other.text)
        return other

    def without_intro(self) -> "PasskeyWriter":
        """A writer of the same words that begins with the filler."""
        other = copy.copy(self)
        other.text = dataclasses.replace(self.text, intro="")
        other._intro = self._intro[:0]
        return other

    def compose(
        self, random: np.random.Generator, length_tokens: int, position: float, *, jitter_tokens: int = 0
    ) -> Passkey:
        """A text with a random key.

        Args:
            random: gives the key, then its place in the window.
            length_tokens: of the whole text, the answer included; at least `min_tokens`.
            position: of the key in the filler, 0 (start) to 1 (end).
            jitter_tokens: places that the key may take around there (see `choose_before`).
        """
        key = random.integers(0, 10, self.digits)
        filler_tokens = length_tokens - self.min_tokens
        return self.place(key, length_tokens, choose_before(filler_tokens, position, jitter_tokens, random.random()))

    def spell(self, ids: Iterable[int]) -> str:
        """The digits of ids that a model wrote, one character each; ``?`` for whatever is no digit."""
        digits = {int(id): str(digit) for digit, id in enumerate(self._digit_ids)}
        return "".join(digits.get(id, "?") for id in ids)

    def place(self, key: np.ndarray, length_tokens: int, before_tokens: int) -> Passkey:
        """The text with this key (digits) behind this much filler.

        Args:
            key: integers 0 to 9, as many as the writer's digits.
            length_tokens: of the whole text, the answer included; at least `min_tokens`.
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
        whole = [_Part(ids, len(ids)) for ids in (self._intro, key_ids, self._question, answer_ids)]
        parts = (
            whole[0],
            _Part(self._filler, before_tokens),
            whole[1],
            _Part(self._filler, after_tokens),
            *whole[2:],
        )
        return Passkey(tuple(map(int, key)), length_tokens, spans, answer_ids, parts)


def _encode(tokenizer: Tokenizer, text: str, anchor: str = _ANCHOR) -> np.ndarray:
    """Ids of the text as it stands behind the end of a sentence."""
    before, ids = tokenizer.encode(anchor), tokenizer.encode(anchor + text)
    if not np.array_equal(before, ids[: len(before)]):
        raise ConfigError(
            "tokenizer: joins the end of a sentence with what follows; passkey texts can't be cut with it"
        )
    return ids[len(before) :]


def _encode_filler(tokenizer: Tokenizer, text: PasskeyText) -> np.ndarray:
    return _encode(tokenizer, " " + " ".join(text.filler))


def _digit_places(keys: list[np.ndarray], digits: int) -> tuple[int, int] | None:
    """Where the two mentions begin: what varies from probe to probe, if that is two runs of so many tokens."""
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
