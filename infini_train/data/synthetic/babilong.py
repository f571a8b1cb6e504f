"""BABILong texts (Kuratov et al., arXiv 2406.10149): the facts of a bAbI story between the sentences of other text.

Hay with the facts in it, in their order, then the question and the answer. A fact stands after the end of a sentence of
the hay; the hay as a whole ends where the length requires. Ids are generated as they are read. Imports no torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from infini_train.config.data import LEAST_FACTS, BabiTask
from infini_train.data.synthetic.babi import ANSWERS, Round, Story, draw_story
from infini_train.data.synthetic.haystack import Haystack, HaystackSource
from infini_train.data.synthetic.needles import EncodedNeedles, Needles, NeedleText
from infini_train.data.tokenizer import Tokenizer

_ENDS = (".", "!", "?")
_CLOSING = "\"'”’)"  # may follow the end of a sentence
_SENTENCE_TOKENS = 512  # where no sentence ends within as many tokens, the hay is cut within one
_CUE = "Answer:"
_SAMPLES = 16  # stories of a task whose lengths are measured


@dataclass(frozen=True, eq=False)
class ShiftedHaystack:
    """Another haystack from a later token on."""

    source: Haystack
    shift: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `Haystack.read`."""
        return self.source.read(self.shift + start, self.shift + stop)


class SentenceHay:
    """Hay that starts with a sentence, and whose sentences' ends can be found.

    Args:
        name: see `HaystackSource`.
        tokenizer: the model's.

    Attributes:
        source: of the hay.

    Raises:
        ConfigError: as `HaystackSource`.
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.source = HaystackSource(name, tokenizer)
        texts = (tokenizer.decode([i]).rstrip(_CLOSING) for i in range(tokenizer.vocab_size))
        self._is_end_V = np.array([text.endswith(_ENDS) for text in texts])  # V: ids of the vocabulary

    def draw(self, seed: list[int]) -> Haystack:
        """Hay as a pure function of the seed."""
        hay = self.source.draw(seed)
        if self.source.prose_tokens is None:
            return hay
        return ShiftedHaystack(hay, self._find_end(hay, 0))

    def find_cut(self, hay: Haystack, token: int, hay_tokens: int) -> int:
        """Where to cut the hay near a token: at its start, or after the first sentence that ends from there on.

        Where that is past `hay_tokens`, it is the end of the last sentence before.
        """
        if token == 0:
            return 0
        end = self._find_end(hay, token)
        if end <= hay_tokens:
            return end
        begin = max(hay_tokens - _SENTENCE_TOKENS, 0)
        ends = np.flatnonzero(self._is_end_V[hay.read(begin, hay_tokens)])
        return begin + int(ends[-1]) + 1 if len(ends) else 0

    def _find_end(self, hay: Haystack, token: int) -> int:
        """Tokens until a sentence ends, counted from the start of the hay, and at least this many."""
        begin = max(token - 1, 0)
        ends = np.flatnonzero(self._is_end_V[hay.read(begin, begin + _SENTENCE_TOKENS)])
        return begin + int(ends[0]) + 1 if len(ends) else token


class EncodedStory:
    """A story in the ids of one tokenizer.

    Args:
        tokenizer: the model's.
        story: in words.

    Attributes:
        min_tokens: length of a text without hay.

    Raises:
        ConfigError: the tokenizer joins what has to stand apart.
    """

    def __init__(self, tokenizer: Tokenizer, story: Story) -> None:
        self.story = story
        asked, *others = map(spell_round, story.rounds)
        self._encoded = EncodedNeedles(tokenizer, Needles(story.facts, (), *asked, tuple(others)))
        self.min_tokens = self._encoded.min_tokens

    def place(self, random: np.random.Generator, sentences: SentenceHay, hay: Haystack, hay_tokens: int) -> NeedleText:
        """The text with this much hay, and the facts at random places in it.

        Args:
            random: determines the places.
            sentences: finds the ends of the hay's sentences.
            hay: drawn from them.
            hay_tokens: in the whole text.
        """
        drawn = random.integers(0, hay_tokens + 1, len(self.story.facts)).tolist()
        places = sorted(sentences.find_cut(hay, token, hay_tokens) for token in drawn)
        return self._encoded.place(hay, places, hay_tokens)


def draw_fitting(
    random: np.random.Generator, tokenizer: Tokenizer, task: BabiTask, max_facts: int, room_tokens: int
) -> EncodedStory:
    """A random story that fits into the room without hay; stories that don't are drawn again with fewer facts.

    Args:
        random: determines the story.
        tokenizer: the model's.
        task: see `draw_story`.
        max_facts: see `draw_story`.
        room_tokens: at least `count_least_tokens`.
    """
    encoded = EncodedStory(tokenizer, draw_story(random, task, max_facts))
    while encoded.min_tokens > room_tokens:
        max_facts = max(min(max_facts, len(encoded.story.facts)) * 3 // 4, LEAST_FACTS)
        encoded = EncodedStory(tokenizer, draw_story(random, task, max_facts))
    return encoded


def count_least_tokens(tokenizer: Tokenizer, tasks: Iterable[BabiTask]) -> int:
    """Tokens of the longest text with the fewest facts and no hay, of a sample of such texts of these tasks."""
    stories = (draw_story(np.random.default_rng(seed), task, LEAST_FACTS) for task in tasks for seed in range(_SAMPLES))
    return max(EncodedStory(tokenizer, story).min_tokens for story in stories)


def spell_round(asked: Round) -> tuple[str, tuple[str, ...]]:
    """A question as it is asked, and the words of its answer, with a full stop."""
    return f"{asked.question} {_CUE}", (f"{asked.answer}.",)


def is_right(task: BabiTask, asked: Round, said: str) -> bool:
    """The published scoring: the first sentence holds the answer and no other answer of the task.

    Words of the question don't count, and letters may be of either case. An answer counts wherever it occurs, even
    within a word.
    """
    sentence, question = said.lower().split(".")[0], asked.question.lower()
    candidates = [word.lower() for word in ANSWERS[task]]
    found = {word for word in candidates if word in sentence and word not in question}
    return found == {asked.answer.lower()}
