"""Endless rows of short texts (lines, sentences, words, documents), generated as they are read, with known places.

Imports no torch.
"""

import bisect
from collections.abc import Callable, Sequence

import numpy as np

from infini_train.config.errors import ConfigError
from infini_train.data.tokenizer import Tokenizer

BLOCK_ITEMS = 64
_KEPT_TEXTS = 4096
_CHUNK_NUMBERS = 4096
_SENTENCE_END = "."


class ItemEncoder:
    """Ids of items as they stand in a row, separated by a space, or by what ends each of them.

    Args:
        tokenizer: the model's.
        separator: between items: a space stands before each of them, line breaks after each.

    Raises:
        ConfigError: the tokenizer joins items.
    """

    def __init__(self, tokenizer: Tokenizer, separator: str) -> None:
        self.tokenizer = tokenizer
        self.front, self.back = (separator, "") if separator == " " else ("", separator)
        self._before = self.back or _SENTENCE_END  # as it stands after a line break, or after a sentence
        self._known = tokenizer.encode(self._before)
        self._kept: dict[str, np.ndarray] = {}

    def encode(self, texts: Sequence[str], recur: bool = True) -> list[np.ndarray]:
        """int32 ids of each item, with its separator; those of texts that recur are kept."""
        missing = list(dict.fromkeys(text for text in texts if text not in self._kept))
        found = dict(zip(missing, self.encode_after([f"{self.front}{t}{self.back}" for t in missing]), strict=True))
        if recur and len(self._kept) < _KEPT_TEXTS:
            self._kept |= found
        return [found[text] if text in found else self._kept[text] for text in texts]

    def encode_after(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text as it stands after an item."""
        size, whole = len(self._known), [self._before + text for text in texts]
        is_long = len(texts) > BLOCK_ITEMS  # many at once take threads, which take time to start
        ids = self.tokenizer.encode_many(whole) if is_long else [self.tokenizer.encode(text) for text in whole]
        if any(len(each) <= size or not np.array_equal(self._known, each[:size]) for each in ids):
            raise ConfigError(
                "tokenizer: joins the end of a line or sentence with the next; RULER can't be read with it"
            )
        return [each[size:].astype(np.int32) for each in ids]


class ItemHaystack:
    """A row of items; a `Haystack` of their ids. Holds one number for each block of items that was read.

    Args:
        encoder: of the items.
        make_block: the texts of the block with this number, the same at every call.
        block_items: number of them.
        recur: whether the same texts come again and again.
    """

    def __init__(
        self,
        encoder: ItemEncoder,
        make_block: Callable[[int], Sequence[str]],
        *,
        block_items: int = BLOCK_ITEMS,
        recur: bool = True,
    ) -> None:
        self._encoder, self._make_block, self._block_items, self._recur = encoder, make_block, block_items, recur
        self._ends = [0]
        self._number, self._texts = -1, list[str]()
        self._ids, self._starts = np.zeros(0, np.int32), np.zeros(1, np.int64)

    def _load(self, number: int) -> None:
        if number == self._number:
            return
        self._texts = list(self._make_block(number))
        assert len(self._texts) == self._block_items
        ids = self._encoder.encode(self._texts, self._recur)
        self._ids = np.concatenate(ids)
        self._starts, self._number = np.cumsum([0, *map(len, ids)]), number

    def _extend(self) -> None:
        self._load(len(self._ends) - 1)
        self._ends.append(self._ends[-1] + len(self._ids))

    def text(self, item: int) -> str:
        """An item, without its separator."""
        self._load(item // self._block_items)
        return self._texts[item % self._block_items]

    def offset(self, item: int) -> int:
        """Tokens before an item."""
        block, rest = divmod(item, self._block_items)
        while len(self._ends) <= block:
            self._extend()
        if not rest:
            return self._ends[block]
        self._load(block)
        return self._ends[block] + int(self._starts[rest])

    def items_within(self, tokens: int) -> int:
        """The largest number of items that take no more than these tokens."""
        while self._ends[-1] <= tokens:
            self._extend()
        block = bisect.bisect_right(self._ends, tokens) - 1
        self._load(block)
        return block * self._block_items + int(np.searchsorted(self._starts, tokens - self._ends[block], "right")) - 1

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `Haystack.read`."""
        while self._ends[-1] < stop:
            self._extend()
        chunks = [np.zeros(0, np.int32)]
        block = bisect.bisect_right(self._ends, start) - 1
        while start < stop:
            self._load(block)
            begin, end = self._ends[block], self._ends[block + 1]
            chunks.append(self._ids[start - begin : min(stop, end) - begin])
            start, block = min(stop, end), block + 1
        return np.concatenate(chunks)


def finite_row(
    encoder: ItemEncoder,
    size: int,
    make: Callable[[np.ndarray], list[str]],
    *,
    block_items: int = BLOCK_ITEMS,
    recur: bool = False,
) -> ItemHaystack:
    """A row of `size` items, made from their places; after the end comes the last one again, which is not read."""

    def make_block(number: int) -> list[str]:
        return make(np.minimum(np.arange(number * block_items, (number + 1) * block_items), size - 1))

    return ItemHaystack(encoder, make_block, block_items=block_items, recur=recur)


class NumberTokens:
    """Tokens that the numbers of a row take, counted once for all texts.

    Args:
        encoder: of the items.
        form: of a number, with {} for it.
    """

    def __init__(self, encoder: ItemEncoder, form: str) -> None:
        self._encoder, self._form = encoder, form
        self._sums = np.zeros(1, np.int64)

    def up_to(self, counts: np.ndarray) -> np.ndarray:
        """int64 tokens of the first numbers from 1 on, for each of these counts."""
        while (known := len(self._sums) - 1) < counts.max():
            texts = [self._form.format(i) for i in range(known + 1, known + 1 + _CHUNK_NUMBERS)]
            added = np.cumsum([len(ids) for ids in self._encoder.encode_after(texts)])
            self._sums = np.concatenate((self._sums, self._sums[-1] + added))
        return self._sums[counts]


class Shuffle:
    """A random order of the numbers 0 to size - 1, of which any part is known without the rest.

    A Feistel network over the next power of four; numbers outside are permuted again until they fall inside.

    Args:
        size: positive.
        seed: determines the order.
    """

    def __init__(self, size: int, seed: Sequence[int]) -> None:
        assert size > 0
        self.size = size
        self._half_bits = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
        self._keys = np.random.default_rng(list(seed)).integers(0, 2**63, 6, np.uint64)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """int64 numbers at these places."""
        numbers = self._permute(np.asarray(places, np.uint64))
        while (outside := numbers >= self.size).any():
            numbers[outside] = self._permute(numbers[outside])
        return numbers.astype(np.int64)

    def _permute(self, numbers: np.ndarray) -> np.ndarray:
        mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        left, right = numbers >> self._half_bits, numbers & mask
        for key in self._keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # odd: the steps of splitmix64
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(31)
            left, right = right, left ^ (mixed & mask)
        return (left << self._half_bits) | right
