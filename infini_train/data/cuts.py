"""Where a text may be cut so that the ids of its pieces, joined, are the ids of the whole text. Imports no torch.

SentencePiece's BPE starts from single characters and joins neighbours as long as the result is in the vocabulary. So
nothing is ever joined across two characters that no entry of the vocabulary holds side by side: what happens on one
side of them does not touch the other. This needs a model that leaves the text as it is (no normalisation, no space
removed). Unigram models are left whole: they add up float32 scores over the text, and how these are rounded depends on
where the sum began: a text of a few megabytes already gets other ids when it is cut.
"""

from collections.abc import Iterator
from typing import Any

from sentencepiece import sentencepiece_model_pb2

SPACE_SYMBOL = "\u2581"  # SentencePiece writes a space like this, so it would read the real character as a space
_PB2: Any = sentencepiece_model_pb2  # its classes are made at import
_PIECE_CHARS = 512  # long strings are slow to encode, short ones to hand over
_TEXT_TYPES = (1, 4, 5)  # NORMAL, USER_DEFINED, UNUSED: the kinds of entries that stand for text


class Cuts:
    """Cuts texts for a BPE model.

    Attributes:
        joined: all pairs of characters that stand side by side in an entry of the vocabulary, spaces as spaces.
        known: the single characters of the vocabulary; None if bytes spell the others, whatever their neighbours.
    """

    def __init__(self, joined: frozenset[str], known: frozenset[str] | None) -> None:
        self.joined = joined
        self.known = known

    def __call__(self, text: str, size: int = _PIECE_CHARS) -> Iterator[str]:
        """The pieces of a text without space symbols, of about `size` characters each where it can be cut."""
        start, length = 0, len(text)
        while length - start > size:
            stop = start + size
            while stop > start and not self._is_cut(text[stop - 1 : stop + 1]):
                stop -= 1
            if stop == start:
                stop = start + size + 1
                while stop < length and not self._is_cut(text[stop - 1 : stop + 1]):
                    stop += 1
            yield text[start:stop]
            start = stop
        if start < length:
            yield text[start:]

    def _is_cut(self, pair: str) -> bool:
        if pair in self.joined:
            return False
        return self.known is None or pair[0] in self.known or pair[1] in self.known  # unknown neighbours become one id


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
