"""RULER's lists of words: common words extraction and frequent words extraction. Imports no torch."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from infini_train.data.synthetic.ruler.items import ItemEncoder, NumberTokens, Shuffle, finite_row
from infini_train.data.synthetic.ruler.layout import Frame, RulerText, fits, lay_out
from infini_train.data.synthetic.ruler.tasks import CommonWordsTask, FrequentWordsTask, WordRepeats
from infini_train.data.synthetic.ruler.words import MadeUpWords, RealWords, Words, draw_letters

DOTS = "..."
NUMBER = " {}."  # before a word of a numbered list
_ZETA_2 = math.pi**2 / 6
_CHUNK = 4096
_BLOCK_WORDS = 512
_LEAST_DRAWN = 53  # from here on the fourth word always occurs more often than the fifth
_COMMON_INTRO = (
    "Here is a numbered list of words, in which some appear more often than the others. Memorize those that appear most"
    " often.\n"
)
_COMMON_QUESTION = (
    "Question: Which {count} words are the most common ones in the list above? Answer: The top {count} words that"
    " appear most often in the list are:"
)
_FREQUENT_INTRO = (
    "The following is a coded text. Read it, keep count of each coded word, and find the three that appear most often. "
)
_FREQUENT_QUESTION = (
    "Question: Give no explanation, and ignore the dots '....'. Which three words appear most often in the coded text"
    " above? Answer: According to the coded text above, the three most frequently appeared words are:"
)


# -------------------------------------------------------------------------------------------------------- common words


class CommonWordsDraft:
    """One numbered list of words, after an example; `place` lays it out in a length.

    Args:
        task: of RULER.
        repeats: of its words.
        encoder: of the items.
        numbers: tokens of the numbers in items.
        seed: determines everything.

    Attributes:
        min_tokens: bos, prompt and answer with one uncommon word.
    """

    def __init__(
        self,
        task: CommonWordsTask,
        repeats: WordRepeats,
        encoder: ItemEncoder,
        numbers: NumberTokens,
        seed: Sequence[int],
    ) -> None:
        self.task, self._encoder, self._numbers, self._seed = task, encoder, numbers, list(seed)
        self.repeats = (repeats.common, repeats.uncommon)
        self._example = self._solve_example(repeats.example_words, (repeats.example_common, repeats.example_uncommon))
        text, list_tokens = self._lay(RealWords([*self._seed, 3]), task.common + 1)
        self.min_tokens = 1 + text.prompt_tokens + text.answer_tokens
        self._around_tokens = self.min_tokens - list_tokens

    def _solve_example(self, words: int, repeats: tuple[int, int]) -> str:
        chosen, size = RealWords([*self._seed, 1]), self._count_items(words, repeats)
        listed = self._list_items(chosen, size, repeats, [*self._seed, 2])(np.arange(size))
        question = _COMMON_QUESTION.format(count=self.task.common)
        answer = _enumerate(chosen[np.arange(self.task.common)])
        return f"{_COMMON_INTRO}{' '.join(listed)}\n{question}{answer}\n\n"

    def _count_items(self, words: int, repeats: tuple[int, int]) -> int:
        return self.task.common * repeats[0] + (words - self.task.common) * repeats[1]

    def _list_items(
        self, words: Words, size: int, repeats: tuple[int, int], seed: Sequence[int]
    ) -> Callable[[np.ndarray], list[str]]:
        """Makes the items of a list from their places; before it is shuffled, the common words come first."""
        order, often = Shuffle(size, seed), self.task.common * repeats[0]

        def make(places: np.ndarray) -> list[str]:
            drawn = order[places]
            which = np.where(drawn < often, drawn // repeats[0], self.task.common + (drawn - often) // repeats[1])
            return [f"{place + 1}. {word}" for place, word in zip(places, words[which], strict=True)]

        return make

    def _lay(self, words: Words, count: int) -> tuple[RulerText, int]:
        """A text with this many different words, and the tokens of its list."""
        size = self._count_items(count, self.repeats)
        make = self._list_items(words, size, self.repeats, [*self._seed, 4, count])
        row = finite_row(self._encoder, size, make, block_items=_BLOCK_WORDS)
        references = tuple(words[np.arange(self.task.common)])
        frame = Frame(
            head=f"{self._example}{_COMMON_INTRO}",
            question=_COMMON_QUESTION.format(count=self.task.common),
            references=references,
            answer=_enumerate(references),
            answer_tokens=self.task.answer_tokens,
        )
        return lay_out(self._encoder, row, frame, [range(size)]), row.offset(size)

    def _fitting(self, words: Words, tokens: int) -> int:
        """The largest number of different words whose list takes no more than these tokens."""
        spent_tokens = items = fitting = 0
        for first in range(0, words.size, _CHUNK):
            places = np.arange(first, min(first + _CHUNK, words.size))
            repeats = np.where(places < self.task.common, *self.repeats)
            sizes = [len(ids) for ids in self._encoder.encode_after([f" {word}" for word in words[places]])]
            spent_T, items_T = spent_tokens + np.cumsum(repeats * sizes), items + np.cumsum(repeats)
            fits_T = spent_T + self._numbers.up_to(items_T) <= tokens
            fitting += int(fits_T.sum())
            if not fits_T.all():
                break
            spent_tokens, items = int(spent_T[-1]), int(items_T[-1])
        return fitting

    def place(self, length_tokens: int) -> RulerText:
        """The text with as many words as the length allows, which is at least `min_tokens`."""
        tokens, least = length_tokens - self._around_tokens, self.task.common + 1
        words: Words = RealWords([*self._seed, 3])
        if (count := self._fitting(words, tokens)) == words.size:
            words = MadeUpWords(tokens // (2 * self.repeats[1]), [*self._seed, 5])  # an item takes two tokens or more
            count = self._fitting(words, tokens)
        count = max(count, least)
        while True:
            text, _ = self._lay(words, count)
            if count == least or fits(text, length_tokens):
                return text
            count -= 1


def _enumerate(words: Sequence[str]) -> str:
    return "".join(f" {place}. {word}" for place, word in enumerate(words, start=1))


# ------------------------------------------------------------------------------------------------------ frequent words


class FrequentWordsDraft:
    """One coded text; `place` lays it out in a length.

    Args:
        task: of RULER.
        encoder: of the items.
        length_tokens: of the text; decides the size of its vocabulary.
        seed: determines everything.

    Attributes:
        min_tokens: bos, prompt and answer with the fewest words of which the last one asked for is ahead of the next.
    """

    def __init__(self, task: FrequentWordsTask, encoder: ItemEncoder, length_tokens: int, seed: Sequence[int]) -> None:
        self.task, self._encoder, self._seed = task, encoder, list(seed)
        size = (length_tokens - task.answer_tokens) // task.tokens_a_word
        occurring = math.isqrt(2 * length_tokens) + 1  # of more, none occurs: see `_counts`
        kept = max(min(size, occurring), task.asked + 1)
        words = draw_letters(np.random.default_rng(self._seed), kept - 1, task.letters)
        self.vocabulary = [DOTS, *words]  # the commonest is noise
        self._sizes = np.array([len(ids) for ids in encoder.encode(self.vocabulary)])
        text, list_tokens = self._lay(_LEAST_DRAWN)
        least = 1 + text.prompt_tokens + text.answer_tokens
        self._around_tokens = least - list_tokens
        self.min_tokens = max(least, task.answer_tokens + (task.asked + 1) * task.tokens_a_word)

    def _counts(self, drawn: int) -> np.ndarray:
        """How often each word of the vocabulary occurs among so many draws from the distribution, rounded down."""
        ranks = np.arange(1, len(self.vocabulary) + 1)
        return (drawn * ranks**-self.task.alpha / _ZETA_2).astype(np.int64)

    def _lay(self, drawn: int) -> tuple[RulerText, int]:
        """A text of this many draws, and the tokens of its words."""
        ends = np.cumsum(self._counts(drawn))
        size = int(ends[-1])
        order = Shuffle(size, [*self._seed, 1, drawn])

        def make(places: np.ndarray) -> list[str]:
            return [self.vocabulary[i] for i in np.searchsorted(ends, order[places], "right")]

        row = finite_row(self._encoder, size, make, block_items=_BLOCK_WORDS, recur=True)
        references = tuple(self.vocabulary[1 : self.task.asked + 1])
        frame = Frame(
            head=_FREQUENT_INTRO,
            question=_FREQUENT_QUESTION,
            references=references,
            answer=f" {', '.join(references)}",
            answer_tokens=self.task.answer_tokens,
        )
        return lay_out(self._encoder, row, frame, [range(size)]), row.offset(size)

    def place(self, length_tokens: int) -> RulerText:
        """The text with as many words as the length allows, which is at least `min_tokens`."""
        tokens = length_tokens - self._around_tokens
        low, high = _LEAST_DRAWN, max(2 * tokens, _LEAST_DRAWN)  # six of ten words are dots, of a token or more
        while low < high:
            middle = (low + high + 1) // 2
            fitting = int((self._counts(middle) * self._sizes).sum()) <= tokens
            low, high = (middle, high) if fitting else (low, middle - 1)
        while True:
            text, _ = self._lay(low)
            if low == _LEAST_DRAWN or fits(text, length_tokens):
                return text
            low -= 1
