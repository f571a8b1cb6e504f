"""Where a text may be cut so that the ids of its pieces, joined, are the ids of the whole text. Imports no torch.

SentencePiece's BPE starts from single characters and joins neighbours as long as the result is in the vocabulary. So
nothing is ever joined across two characters that no entry of the vocabulary holds side by side: what happens on one
side of them does not touch the other. This needs a model that leaves the text as it is (no normalisation, no space
removed). Unigram models are left whole: they add up float32 scores over the text, and how these are rounded depends on
where the sum began: a text of a few megabytes already gets other ids when it is cut.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2

SPACE_SYMBOL = "\u2581"  # SentencePiece writes a space like this, so it would read the real character as a space
_PB2: Any = sentencepiece_model_pb2  # its classes are made at import
_TEXT_TYPES = (1, 4, 5)  # NORMAL, USER_DEFINED, UNUSED: the kinds of entries that stand for text
_CODE_POINTS = 0x110000
SLAB_CHARS = 1_000_000  # cut at once


class Cuts:
    """Cuts texts for a BPE model. The space symbol always stands alone.

    Args:
        joined: all pairs of characters that stand side by side in an entry of the vocabulary, spaces as spaces.
        known: the single characters of the vocabulary; None if bytes spell the others, whatever their neighbours.
    """

    def __init__(self, joined: frozenset[str], known: frozenset[str] | None) -> None:
        behind: dict[str, list[str]] = {char: [] for char in (*(known or ()), SPACE_SYMBOL)}
        before: dict[str, list[str]] = {char: [] for char in behind}
        for pair in sorted(joined):
            behind.setdefault(pair[0], []).append(pair[1])
            before.setdefault(pair[1], []).append(pair[0])
        # Characters with the same neighbours are one class; class 0 is that of all others.
        self._lefts, n_lefts = _classify(behind)
        self._rights, n_rights = _classify(before)
        self._lefts *= n_rights  # so that the sum of two classes is a place in a flat table
        self._is_cut = np.ones(n_lefts * n_rights, bool)
        for pair in joined:
            self._is_cut[self._lefts[ord(pair[0])] + self._rights[ord(pair[1])]] = False
        self._is_cut[0] = known is None  # unknown neighbours become one id

    def mask(self, text: str) -> np.ndarray:
        """bool, for each character of a text that is not empty: whether it may be cut behind it; True at the end."""
        points = code_points(text)
        found = np.ones(len(points), bool)
        found[:-1] = self._is_cut[self._lefts[points[:-1]] + self._rights[points[1:]]]
        return found

    def slabs(self, text: str, size: int = SLAB_CHARS) -> Iterator[str]:
        """A text in parts of at most `size` characters, or more where it can't be cut."""
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
    """Of each character; uint8 where that is enough, for speed."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _classify(neighbours: dict[str, list[str]]) -> tuple[np.ndarray, int]:
    """uint32, the class of each code point, from 1, by its neighbours; the number of classes."""
    table = np.zeros(_CODE_POINTS, np.uint32)
    classes: dict[tuple[str, ...], int] = {}
    for char, others in neighbours.items():
        table[ord(char)] = classes.setdefault(tuple(others), len(classes) + 1)
    return table, len(classes) + 1


def batches(texts: Iterator[tuple[int, str]], size: int = SLAB_CHARS) -> Iterator[list[tuple[int, str]]]:
    """Numbered texts, as many together as have `size` characters, or more by the last of them."""
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
    """The ModelProto of a SentencePiece model's bytes."""
    return _PB2.ModelProto.FromString(model)


def keeps_text(proto: Any) -> bool:
    """Whether the model encodes a text as it is, but for a space that it may put in front."""
    spec = proto.normalizer_spec
    return spec.escape_whitespaces and not (spec.precompiled_charsmap or spec.remove_extra_whitespaces)


def cuts_of(proto: Any) -> Cuts | None:
    """Where texts may be cut for this model; None where nothing is proven."""
    trainer = proto.trainer_spec
    suffix = proto.normalizer_spec.add_dummy_prefix and trainer.treat_whitespace_as_suffix
    if not keeps_text(proto) or suffix or trainer.model_type != _PB2.TrainerSpec.BPE:
        return None
    texts = [entry.piece.replace(SPACE_SYMBOL, " ") for entry in proto.pieces if entry.type in _TEXT_TYPES]
    joined = frozenset(text[i : i + 2] for text in texts for i in range(len(text) - 1))
    known = None if trainer.byte_fallback else frozenset(text for text in texts if len(text) == 1)
    return Cuts(joined, known)
