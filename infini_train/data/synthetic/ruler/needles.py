"""RULER's needles in a haystack and its chains of variables: lines or sentences hidden in rows of items.

Imports no torch.
"""

import hashlib
import re
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infini_train.data.synthetic.haystack import read_prose
from infini_train.data.synthetic.ruler.items import BLOCK_ITEMS, ItemEncoder, ItemHaystack
from infini_train.data.synthetic.ruler.layout import Frame, Part, RulerText, fits, lay_out
from infini_train.data.synthetic.ruler.tasks import Kind, NeedleTask, VariableTask
from infini_train.data.synthetic.ruler.words import ADJECTIVES, NOUNS, draw_letters
from infini_train.data.synthetic.wordings import SENTENCES, find_wording

NOISE = " ".join(find_wording("paper").filler)  # RULER's noise is the filler of the passkey test
DEPTHS = np.linspace(0, 100, 40).round() / 100  # of needles in essays
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_DIGITS = 7
_MAX_SENTENCE_CHARS = 1000
_SENTENCE = re.compile(r"\S.*?(?:[.!?][\"'\u201d\u2019)\]]*(?=\s|$)|[\u3002\uff01\uff1f]|$)")

_INTRO = {
    False: "A special magic {kind} is hidden in the text below. Memorize it: you will be asked for the {kind} later.\n",
    True: "Some special magic {kind} are hidden in the text below. Memorize them: you will be asked for the {kind}"
    " later.\n",
}
_QUESTION = {
    False: "Which special magic {kind} for {query} does the text above mention? The special magic {kind} for {query}"
    " mentioned in the provided text is",
    True: "Which special magic {kind} for {query} does the text above mention? Name all of them. The special magic"
    " {kind} for {query} mentioned in the provided text are",
}
_VARIABLE_INTRO = (
    "A chain of variable assignments is hidden in the text below. Memorize it, and keep track of the variables.\n\n"
)
_VARIABLE_QUESTION = (
    "Question: Which variables have been assigned the value {value} in the text above? Find all of them. Answer:"
    " According to the chain(s) of variable assignment in the text above, {count} variables are assigned the value"
    " {value}, they are:"
)


# ---------------------------------------------------------------------------------------------------------- haystacks


@dataclass(frozen=True)
class EssayFile:
    """The sentences of a file, in its order."""

    path: Path
    sha256: str
    sentences: tuple[str, ...]


def read_essays(path: Path) -> EssayFile:
    """Reads a text or .jsonl file; see `read_prose`.

    Raises:
        ConfigError: it can't be read, or holds no text.
    """
    sentences = split_sentences(read_prose(path))
    return EssayFile(path, hashlib.sha256(path.read_bytes()).hexdigest(), tuple(sentences))


def noise_hay(encoder: ItemEncoder) -> ItemHaystack:
    """RULER's five sentences, in every line."""
    return ItemHaystack(encoder, lambda number: [NOISE] * BLOCK_ITEMS)


def essay_hay(encoder: ItemEncoder, sentences: Sequence[str]) -> ItemHaystack:
    """The sentences from the first on, and again when there are no more, as published."""
    size = len(sentences)

    def make_block(number: int) -> list[str]:
        first = number * BLOCK_ITEMS
        return [sentences[i % size] for i in range(first, first + BLOCK_ITEMS)]

    return ItemHaystack(encoder, make_block)


def varied_hay(encoder: ItemEncoder, seed: Sequence[int]) -> ItemHaystack:
    """The shipped sentences in random order, where the user has no essays."""

    def make_block(number: int) -> list[str]:
        return [SENTENCES[i] for i in np.random.default_rng([*seed, number]).integers(0, len(SENTENCES), BLOCK_ITEMS)]

    return ItemHaystack(encoder, make_block)


def needle_hay(encoder: ItemEncoder, task: NeedleTask, avoid: set[str], seed: Sequence[int]) -> ItemHaystack:
    """Lines like the one that is asked for; none has a key or a value to avoid."""

    def make_block(number: int) -> list[str]:
        random = np.random.default_rng([*seed, number])
        keys = _draw(random, task.key, BLOCK_ITEMS, avoid)
        values = _draw(random, task.value, BLOCK_ITEMS, avoid)
        return [_NEEDLE.format(kind=task.value, key=k, value=v) for k, v in zip(keys, values, strict=True)]

    return ItemHaystack(encoder, make_block, recur=False)


def split_sentences(texts: Sequence[str]) -> list[str]:
    """The sentences of texts, with single spaces; very long ones in parts."""
    whole = [" ".join(text.split()) for text in texts]
    found = [match[0].strip() for text in whole for match in _SENTENCE.finditer(text)]
    step = _MAX_SENTENCE_CHARS
    parts = [sentence[i : i + step].strip() for sentence in found for i in range(0, len(sentence), step)]
    return [part for part in parts if part]


def _draw(random: np.random.Generator, kind: Kind, count: int, avoid: Collection[str] = ()) -> list[str]:
    """Different keys or values, none of those to avoid."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        if (each := _draw_one(random, kind)) not in avoid:
            drawn[each] = None
    return list(drawn)


def _draw_one(random: np.random.Generator, kind: Kind) -> str:
    if kind == "words":
        return f"{ADJECTIVES[random.integers(len(ADJECTIVES))]}-{NOUNS[random.integers(len(NOUNS))]}"
    if kind == "numbers":
        return str(random.integers(10 ** (_DIGITS - 1), 10**_DIGITS))
    return str(uuid.UUID(bytes=random.bytes(16), version=4))


# --------------------------------------------------------------------------------------------------------------- tasks


class NeedleDraft:
    """What one text hides and asks; `place` lays it out in a length.

    Args:
        task: of RULER.
        hay: the items around the needles; None: lines like the needles.
        encoder: of the items.
        seed: determines everything.

    Attributes:
        frame: around the items.
        min_tokens: bos, prompt and answer with a single item of hay.
    """

    def __init__(
        self, task: NeedleTask | VariableTask, hay: ItemHaystack | None, encoder: ItemEncoder, seed: Sequence[int]
    ) -> None:
        self.task, self._encoder, self._seed = task, encoder, list(seed)
        self._random = np.random.default_rng(self._seed)
        if isinstance(task, VariableTask):
            self.lines, self.frame = self._draw_chain(task)
            self._asked = set(self.lines)
        else:
            self.lines, self.frame = self._draw_needles(task)
        self.hay = hay or needle_hay(encoder, self._needle_task, self._avoid, [*self._seed, 1])
        text = self._lay(1)
        self.min_tokens = 1 + text.prompt_tokens + text.answer_tokens

    @property
    def _needle_task(self) -> NeedleTask:
        assert isinstance(self.task, NeedleTask)
        return self.task

    def _draw_needles(self, task: NeedleTask) -> tuple[list[str], Frame]:
        keys = _draw(self._random, task.key, task.keys)
        values = _draw(self._random, task.value, task.keys * task.values, set(keys))
        owners = np.repeat(np.arange(task.keys), task.values)
        lines = [_NEEDLE.format(kind=task.value, key=keys[k], value=v) for k, v in zip(owners, values, strict=True)]
        queries = [int(i) for i in self._random.choice(task.keys, task.queries, replace=False)]
        wanted = [i for query in queries for i in np.flatnonzero(owners == query)]
        self._asked, self._avoid = {lines[i] for i in wanted}, {*keys, *values}
        references = tuple(values[i] for i in wanted)
        names = [keys[query] for query in queries]
        query = f"{', '.join(names[:-1])}, and {names[-1]}" if len(names) > 1 else names[0]
        many = len(references) > 1
        kind = task.value if many else task.value.removesuffix("s")
        frame = Frame(
            head=_INTRO[many].format(kind=kind),
            question=_QUESTION[many].format(kind=kind, query=query),
            references=references,
            answer=f" {', '.join(references)}",
            answer_tokens=task.answer_tokens,
        )
        return [lines[i] for i in self._random.permutation(len(lines))], frame

    def _draw_chain(self, task: VariableTask) -> tuple[list[str], Frame]:
        names = [name.upper() for name in draw_letters(self._random, task.hops + 1, 5)]
        value = str(self._random.integers(10_000, 99_999))
        lines = [f"VAR {name} = {f'VAR {names[i - 1]}' if i else value}" for i, name in enumerate(names)]
        frame = Frame(
            head=_VARIABLE_INTRO,
            question=_VARIABLE_QUESTION.format(value=value, count=len(names)),
            references=tuple(names),
            answer=f" {', '.join(names)}",
            answer_tokens=task.answer_tokens,
        )
        return lines, frame

    def _places(self, items: int) -> list[int]:
        """Items of hay before each needle, in ascending order; drawn anew for each number of items."""
        random, count = np.random.default_rng([*self._seed, 2, items]), len(self.lines)
        if isinstance(self.task, NeedleTask) and self.task.hay == "essay":
            return sorted(int(items * depth) for depth in random.choice(DEPTHS, count, replace=False))
        return sorted(int(place) for place in random.choice(items, count, replace=items < count))

    def _lay(self, items: int) -> RulerText:
        parts: list[Part] = []
        evidence, before, number = [], 0, 0
        for line, place in zip(self.lines, self._places(items), strict=True):
            parts += [range(before, place), line]
            number += place - before
            evidence += [number] if line in self._asked else []
            before, number = place, number + 1
        return lay_out(self._encoder, self.hay, self.frame, [*parts, range(before, items)], evidence)

    def place(self, length_tokens: int) -> RulerText:
        """The text with as much hay as the length allows, which is at least `min_tokens`."""
        spare = length_tokens - self.min_tokens
        assert spare >= 0
        items = self.hay.items_within(spare + self.hay.offset(1)) + 1  # what stands first and last may take less
        while True:
            text = self._lay(items)
            if items == 1 or fits(text, length_tokens):
                return text
            items -= 1
