"""Encodes texts piece by piece; each distinct piece is encoded once and cached. Imports no torch.

Most pieces are words, and most words recur, so lookups dominate. They are vectorised over a megabyte of text at a time;
the bytes of a short piece are its key.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from infini_train.data.cuts import SLAB_CHARS, SPACE_SYMBOL, Cuts, batches, code_points

_REMEMBERED_PIECES, _REMEMBERED_IDS = 1 << 18, 1 << 23  # about 60 MB; then the cache is cleared
_LONG_CHARS = 1000  # longer pieces have too many ids for a list
_KEY_BYTES = 15  # longest piece that is its own key; the 16th byte is its length
_MASKS = np.array([(1 << (8 * n)) - 1 for n in range(9)], np.uint64)
_ODD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
_SLOT_BITS = 20


def encode_each(model: Any, texts: Sequence[str], threads: int, **options: Any) -> Sequence[Any]:
    """Ids of each text by a SentencePieceProcessor. Its own call for many texts hands even one thread's to a pool."""
    if threads == 1:
        return [model.encode(text, **options) for text in texts]
    return model.encode(texts, num_threads=threads, **options) if texts else []


class PieceEncoder:
    """Encodes texts piece by piece with a bounded cache.

    Args:
        cuts: where texts may be cut.
        model: a SentencePieceProcessor that prepends nothing to a text.
        symbol_ids: ids of the space symbol.
        dtype: of the ids.
    """

    def __init__(self, cuts: Cuts, model: Any, symbol_ids: np.ndarray, dtype: np.dtype[Any]) -> None:
        self.cuts = cuts
        self._model = model
        self._symbol_ids = symbol_ids
        self._dtype = dtype
        self._counts = self._starts = np.zeros(0, np.int64)  # of each piece's ids, by its number
        self._ids = np.zeros(0, dtype)
        self._long: dict[bytes, int] = {}  # numbers of pieces that are too long for the table
        self._table = PieceTable()
        self._forget()

    def encode(self, texts: Sequence[str], threads: int = 1, slab_chars: int = SLAB_CHARS) -> list[np.ndarray]:
        """Ids of each text."""
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        slabs = ((number, slab) for number, text in enumerate(texts) for slab in self.cuts.slabs(text, slab_chars))
        for batch in batches(slabs, slab_chars):
            ids = self._encode_slabs([slab for _, slab in batch], threads)
            for (number, _), array in zip(batch, ids, strict=True):
                parts[number].append(array)
        return [np.concatenate(part) if part else np.zeros(0, self._dtype) for part in parts]

    def _encode_slabs(self, slabs: list[str], threads: int) -> list[np.ndarray]:
        """Ids of each slab; encodes them together, since calls cost too much for short texts."""
        text, bounds = "".join(slabs), np.cumsum([len(slab) for slab in slabs])
        mask = self.cuts.mask(text)
        mask[bounds - 1] = True
        stops = np.flatnonzero(mask) + 1
        last_pieces = np.searchsorted(stops, bounds)
        if not text.isascii():
            stops = np.cumsum(_utf8_bytes(code_points(text)))[stops - 1]
        data = text.encode("utf-8", "surrogatepass") + bytes(16)
        numbers = self._look_up(data, np.concatenate([[0], stops[:-1]]), stops, threads)
        counts = self._counts[numbers]
        ends = np.cumsum(counts)
        ids = self._ids[np.arange(ends[-1]) + np.repeat(self._starts[numbers] - (ends - counts), counts)]
        return np.split(ids, ends[last_pieces][:-1])

    def _look_up(self, data: bytes, starts: np.ndarray, stops: np.ndarray, threads: int) -> np.ndarray:
        """Numbers of the pieces between these byte offsets, int64."""
        if len(self._counts) > _REMEMBERED_PIECES or self._ids.size > _REMEMBERED_IDS:
            self._forget()
        low, high = _keys(data, starts, stops - starts)
        numbers = self._table.find(low, high)
        first: dict[bytes, int] = {}  # first occurrence of each new piece
        unknown = np.flatnonzero((numbers < 0) | (stops - starts > _KEY_BYTES)).tolist()
        found = [data[starts[i] : stops[i]] for i in unknown]
        for i, piece in zip(unknown, found, strict=True):
            if piece not in self._long:
                first.setdefault(piece, i)
        added = dict(zip(first, self._encode_new(list(first), threads), strict=True))
        places = np.array([i for piece, i in first.items() if len(piece) <= _KEY_BYTES], np.int64)
        short = np.array([added[piece] for piece in first if len(piece) <= _KEY_BYTES], np.int64)
        self._table.add(low[places], high[places], short)
        self._long |= {piece: number for piece, number in added.items() if len(piece) > _KEY_BYTES}
        numbers[unknown] = [self._long[piece] if piece in self._long else added[piece] for piece in found]
        return numbers

    def _encode_new(self, pieces: list[bytes], threads: int) -> range:
        """Encodes new pieces, and returns their numbers."""
        texts = [piece.decode("utf-8", "surrogatepass") for piece in pieces]
        order = [i for i, text in enumerate(texts) if len(text) <= _LONG_CHARS]
        long = [i for i, text in enumerate(texts) if len(text) > _LONG_CHARS]
        found: list[Any] = [None] * len(texts)
        lists = encode_each(self._model, [texts[i] for i in order], threads)  # faster to build than arrays
        arrays = encode_each(self._model, [texts[i] for i in long], threads, return_type="numpy")
        for i, ids in zip(order + long, chain(lists, arrays), strict=True):
            found[i] = ids
        counts = np.array([len(ids) for ids in found], np.int64)
        ids = np.fromiter(chain.from_iterable(found), self._dtype, int(counts.sum()))
        first = len(self._counts)
        self._starts = np.concatenate([self._starts, self._ids.size + np.cumsum(counts) - counts])
        self._counts = np.concatenate([self._counts, counts])
        self._ids = np.concatenate([self._ids, ids])
        return range(first, first + len(pieces))

    def _forget(self) -> None:
        """Clears the cache, except for the space symbol, which is never passed to a model."""
        self._ids, self._starts = self._symbol_ids, np.zeros(1, np.int64)
        self._counts = np.array([self._symbol_ids.size], np.int64)
        self._long, self._table = {}, PieceTable()
        symbol = SPACE_SYMBOL.encode()
        self._table.add(*_keys(symbol + bytes(16), np.array([0]), np.array([len(symbol)])), np.array([0]))


class PieceTable:
    """A hash table from 16-byte keys to numbers, vectorised, with open addressing and linear probing."""

    def __init__(self) -> None:
        size = 1 << _SLOT_BITS
        self._low, self._high = np.zeros(size, np.uint64), np.zeros(size, np.uint64)
        self._numbers = np.full(size, -1, np.int64)

    def find(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Numbers of the keys, int64; -1 for unknown keys."""
        slots = _slots(low, high)
        numbers = self._numbers[slots]
        wrong = np.flatnonzero((numbers >= 0) & ((self._low[slots] != low) | (self._high[slots] != high)))
        while wrong.size:
            slots[wrong] = at = (slots[wrong] + 1) & (self._numbers.size - 1)
            numbers[wrong] = now = self._numbers[at]
            wrong = wrong[(now >= 0) & ((self._low[at] != low[wrong]) | (self._high[at] != high[wrong]))]
        return numbers

    def add(self, low: np.ndarray, high: np.ndarray, numbers: np.ndarray) -> None:
        """Adds distinct new keys; the table must not become full."""
        slots, waiting = _slots(low, high), np.arange(len(low))
        while waiting.size:
            free = waiting[self._numbers[slots[waiting]] < 0]
            taken = free[np.unique(slots[free], return_index=True)[1]]
            at = slots[taken]
            self._low[at], self._high[at], self._numbers[at] = low[taken], high[taken], numbers[taken]
            waiting = np.setdiff1d(waiting, taken, assume_unique=True)
            slots[waiting] = (slots[waiting] + 1) & (self._numbers.size - 1)


def _slots(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    mixed = (low ^ (high * _ODD[1])) * _ODD[0]
    return ((mixed ^ (mixed >> np.uint64(32))) * _ODD[1] >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)


def _keys(data: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys of pieces, two uint64 each: the first 8 bytes; the next 7 and the length. Unique for short pieces.

    `data` is padded with 16 bytes.
    """
    words = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))  # 8 bytes from each offset on
    low = words[starts] & _MASKS[np.minimum(lengths, 8)]
    high = words[starts + 8] & _MASKS[np.clip(lengths - 8, 0, 7)]
    return low, high | (np.minimum(lengths, 255).astype(np.uint64) << np.uint64(56))


def _utf8_bytes(points: np.ndarray) -> np.ndarray:
    """UTF-8 bytes of each character."""
    return 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
