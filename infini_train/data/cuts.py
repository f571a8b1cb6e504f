"""Where a text may be cut so that the concatenated ids of its pieces are the ids of the whole text. Imports no torch.

SentencePiece's BPE starts from single characters and merges neighbours while the result is in the vocabulary. So
nothing is ever merged across two characters that no vocabulary entry holds side by side, and the two sides don't affect
each other. This requires a model that leaves the text unchanged (no normalisation, no space removed). With Unigram
models texts are never cut: they sum float32 scores over the text, whose rounding depends on where the sum starts, and a
text of a few megabytes already gets different ids when it is cut.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

SPACE_SYMBOL = "\u2581"  # SentencePiece's space, so it would read the real character as a space
_PB2: Any = sentencepiece_model_pb2  # its classes are generated at import
_TEXT_TYPES = (1, 4, 5)  # NORMAL, USER_DEFINED, UNUSED: the entries that stand for text
_CODE_POINTS = 0x110000
SLAB_CHARS = 1_000_000  # characters processed at once


class Cuts:
    """Cuts texts for a BPE model. The space symbol is always a piece of its own.

    Args:
        joined: all pairs of adjacent characters in vocabulary entries, with spaces as spaces.
        known: the single characters of the vocabulary; None if others are encoded as bytes, whatever their neighbours.
    """

    def __init__(self, joined: frozenset[str], known: frozenset[str] | None) -> None:
        after: dict[str, list[str]] = {char: [] for char in (*(known or ()), SPACE_SYMBOL)}
        before: dict[str, list[str]] = {char: [] for char in after}
        for pair in sorted(joined):
            after.setdefault(pair[0], []).append(pair[1])
            before.setdefault(pair[1], []).append(pair[0])
        # Characters with the same neighbours form a class; class 0 holds all others.
        self._lefts, n_lefts = _classify(after)
        self._rights, n_rights = _classify(before)
        self._lefts *= n_rights  # so that the sum of two classes indexes a flat table
        self._is_cut = np.ones(n_lefts * n_rights, bool)
        for pair in joined:
            self._is_cut[self._lefts[ord(pair[0])] + self._rights[ord(pair[1])]] = False
        self._is_cut[0] = known is None  # adjacent unknown characters become one id

    def mask(self, text: str) -> np.ndarray:
        """Whether a non-empty text may be cut after each character: bool (characters,), True at the end."""
        points = code_points(text)
        found = np.ones(len(points), bool)
        found[:-1] = self._is_cut[self._lefts[points[:-1]] + self._rights[points[1:]]]
        return found

    def slabs(self, text: str, size: int = SLAB_CHARS) -> Iterator[str]:
        """Splits a text into slabs of at most `size` characters, or more where it can't be cut."""
        start = 0
        while len(text) - start > size:
            length = size
            while not (places := np.flatnonzero(self.mask(text[start : start + length + 1])[:-1])).size:
                if start + length >= len(text):
                    break
                length *= 2
            stop = start + int(places[-1]) + 1 if places.size else len(text)
            yield text[start:stop]
            start = stop
        if start < len(text):
            yield text[start:]


def code_points(text: str) -> np.ndarray:
    """Code point of each character, uint32; uint8 for ASCII, for speed."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _classify(neighbours: dict[str, list[str]]) -> tuple[np.ndarray, int]:
    """Class of each code point by its neighbours (uint32, 0 for those without), and the number of classes."""
    table = np.zeros(_CODE_POINTS, np.uint32)
    classes: dict[tuple[str, ...], int] = {}
    for char, others in neighbours.items():
        table[ord(char)] = classes.setdefault(tuple(others), len(classes) + 1)
    return table, len(classes) + 1


def batches(texts: Iterator[tuple[int, str]], size: int = SLAB_CHARS) -> Iterator[list[tuple[int, str]]]:
    """Groups numbered texts into batches that end with the text that reaches `size` characters."""
    batch: list[tuple[int, str]] = []
    chars = 0
    for numbered in texts:
        batch.append(numbered)
        chars += len(numbered[1])
        if chars >= size:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def parse_model(model: bytes) -> Any:
    """Parses a SentencePiece model file's bytes into a ModelProto.

    Raises:
        ValueError: it is none, or its entries are not UTF-8.
    """
    try:
        proto = _PB2.ModelProto.FromString(model)
    except DecodeError as error:
        raise ValueError(str(error)) from error
    texts = (*(entry.piece for entry in proto.pieces), proto.trainer_spec.unk_surface)
    if any(isinstance(text, bytes) for text in texts):  # as protobuf gives what it can't decode
        raise ValueError("its entries are not UTF-8")
    return proto


def keeps_text(proto: Any) -> bool:
    """Whether the model encodes texts unchanged, apart from a space that it may prepend."""
    spec = proto.normalizer_spec
    return spec.escape_whitespaces and not (spec.precompiled_charsmap or spec.remove_extra_whitespaces)


def cuts_of(proto: Any) -> Cuts | None:
    """Where texts may be cut for this model; None if no cut is known to be safe."""
    trainer = proto.trainer_spec
    suffix = proto.normalizer_spec.add_dummy_prefix and trainer.treat_whitespace_as_suffix
    if not keeps_text(proto) or suffix or trainer.model_type != _PB2.TrainerSpec.BPE:
        return None
    texts = [entry.piece.replace(SPACE_SYMBOL, " ") for entry in proto.pieces if entry.type in _TEXT_TYPES]
    joined = frozenset(text[i : i + 2] for text in texts for i in range(len(text) - 1))
    known = None if trainer.byte_fallback else frozenset(text for text in texts if len(text) == 1)
    return Cuts(joined, known)
