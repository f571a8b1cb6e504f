"""Texts that hide several things, after RULER (Hsieh et al., arXiv 2404.06654), in any amount of hay.

| task | hidden | asked |
|---|---|---|
| single | one pass key, in the words of the passkey test | it |
| multikey | one pass key for each of several things | the key of one thing |
| multivalue | several pass keys for one thing | all of them |
| multiquery | one pass key for each of several things | the keys of all things |
| variables | a value passed from variable to variable, and a second such chain | all variables that have it |

A text is laid out in tokens: intro, hay with the needles in it, question, answer; hay is cut wherever the lengths
require. Ids are generated as they are read. A model's output is scored as words, so any tokenizer will do. Imports no
torch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np

from infini_train.config.data import NeedleTask as Task
from infini_train.data.synthetic.haystack import (
    SENTENCE_END,
    Haystack,
    Stretch,
    encode_after,
    read_stretches,
    stretch_of,
)
from infini_train.data.synthetic.needle_wordings import PASS_KEY, NeedleWording
from infini_train.data.synthetic.wordings import find_wording
from infini_train.data.tokenizer import Tokenizer

TASKS: tuple[Task, ...] = get_args(Task)
ONE_ASKED = ("single", "multikey")  # tasks that ask for one needle, which then has a depth; the others ask for all
OWN_WORDING: tuple[Task, ...] = ("single", "variables")  # tasks that no `NeedleWording` is for

_THINGS = """
anchor basket candle drum engine feather garden hammer island jacket kettle ladder mirror needle oven pillow
quilt ribbon saddle table umbrella violin wagon yacht zebra apple bridge carpet door easel falcon guitar helmet
igloo jar kite lamp marble notebook orange piano quarry rocket statue tower unicorn vase whistle box yoke zipper
acorn bell crown diamond elephant flag globe harp ink jewel knot lemon medal
"""
THINGS = tuple(_THINGS.split())
_VARIABLES = "Which variables have the value {value}? The variables with the value {value} are"
_LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
_NAME_LETTERS = 3


class Needles(NamedTuple):
    """What is hidden and asked, in words."""

    sentences: tuple[str, ...]  # in the order of the text
    asked: tuple[int, ...]  # indices of the sentences that hold the answer
    question: str
    answer: tuple[str, ...]  # words, in the order that training shows
    further: tuple[tuple[str, tuple[str, ...]], ...] = ()  # other questions and answers, which training may add


def draw_needles(
    random: np.random.Generator, task: Task, count: int, digits: int, wording: NeedleWording = PASS_KEY
) -> Needles:
    """Random needles.

    Args:
        random: determines things, values and order.
        task: what to hide.
        count: number of needles, at most the number of `THINGS`; for variables, the length of the asked chain; `single`
            always has one.
        digits: of a value.
        wording: how things and values are told and asked for; single and variables have their own.
    """
    assert count > 0 and digits > 0
    if task == "variables":
        return _draw_chains(random, count, digits)
    values = _draw_values(random, 1 if task == "single" else count, digits)
    if task == "single":
        text = find_wording("paper")
        return Needles((text.key.replace("{key}", values[0]),), (0,), text.question, (values[0],))
    things = [str(thing) for thing in random.choice(THINGS, 1 if task == "multivalue" else count, replace=False)]
    named = things * count if task == "multivalue" else things
    sentences = tuple(
        wording.needle.format(thing=thing, value=value) for thing, value in zip(named, values, strict=True)
    )
    if task == "multikey":
        asked = int(random.integers(count))
        rounds = [(wording.one.format(things=thing), (value,)) for thing, value in zip(things, values, strict=True)]
        return Needles(sentences, (asked,), *rounds[asked], tuple(rounds[:asked] + rounds[asked + 1 :]))
    everyone = tuple(range(count))
    if task == "multivalue":
        return Needles(sentences, everyone, wording.many.format(things=things[0]), tuple(values))
    order = [int(i) for i in random.permutation(count)]
    *first, last = [things[i] for i in order]
    listed = f"{', '.join(first)} and {last}" if first else last
    return Needles(sentences, everyone, wording.many.format(things=listed), tuple(values[i] for i in order))


def _draw_values(random: np.random.Generator, count: int, digits: int) -> list[str]:
    """`count` different numbers of `digits` digits."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(map(str, random.integers(0, 10, digits)))] = None
    return list(found)


def _draw_chains(random: np.random.Generator, count: int, digits: int) -> Needles:
    """Two interleaved chains of assignments, each in order; the question asks for the value of the first."""
    names: dict[str, None] = {}
    while len(names) < 2 * count:
        names["".join(random.choice(_LETTERS, _NAME_LETTERS))] = None
    own, other = list(names)[:count], list(names)[count:]
    value, other_value = _draw_values(random, 2, digits)
    chains = [_assign(own, value), _assign(other, other_value)]
    whose = random.permutation(np.repeat([0, 1], count))
    sentences = tuple(chains[chain].pop(0) for chain in whose)
    asked = tuple(int(i) for i in np.flatnonzero(whose == 0))
    return Needles(sentences, asked, _VARIABLES.format(value=value), tuple(own))


def _assign(names: Sequence[str], value: str) -> list[str]:
    return [f"VAR {name} = {before}." for name, before in zip(names, [value, *names[:-1]], strict=True)]


def find_words(answer: Sequence[str], predicted: str) -> list[bool]:
    """Which words of the answer occur in the predicted text, in any order."""
    words = set(re.findall(r"\w+", predicted))
    return [word in words for word in answer]


@dataclass(frozen=True, eq=False)
class NeedleText:
    """One text, from its intro to the end of the answer, without bos and eos.

    Attributes:
        needles: in words.
        tokens: length of the text.
        needle_spans: tokens of each needle.
        question_token: where the question starts.
        prompt_tokens: tokens before the answer.
    """

    needles: Needles
    tokens: int
    needle_spans: tuple[slice, ...]
    question_token: int
    prompt_tokens: int
    _stretches: tuple[Stretch, ...]

    @property
    def answer_tokens(self) -> int:
        return self.tokens - self.prompt_tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """int32 ids [start, stop), for texts too long to hold."""
        assert 0 <= start <= stop <= self.tokens
        return read_stretches(self._stretches, start, stop)


class EncodedNeedles:
    """Needles in the ids of one tokenizer.

    Args:
        tokenizer: the model's.
        needles: in words.
        intro: start of the text; may be empty.

    Attributes:
        min_tokens: length of a text without hay.

    Raises:
        ConfigError: the tokenizer merges the end of the question with the answer, or that of a sentence with the next.
    """

    def __init__(self, tokenizer: Tokenizer, needles: Needles, intro: str = "") -> None:
        self.needles = needles
        self._intro = tokenizer.encode(intro)
        self._sentences = [encode_after(tokenizer, f" {sentence}") for sentence in needles.sentences]
        self._question, self._answer = encode_round(tokenizer, needles.question, needles.answer)
        asked = len(self._question) + len(self._answer)
        self.min_tokens = len(self._intro) + sum(map(len, self._sentences)) + asked

    def place(self, hay: Haystack, hay_before_tokens: Sequence[int], hay_tokens: int) -> NeedleText:
        """The text with this much hay.

        Args:
            hay: what to hide the needles in.
            hay_before_tokens: hay before each needle, in ascending order.
            hay_tokens: hay in the whole text.
        """
        before = list(hay_before_tokens)
        assert len(before) == len(self._sentences) and before == sorted(before)
        assert not before or (before[0] >= 0 and before[-1] <= hay_tokens)
        stretches, at, read, places = [stretch_of(self._intro)], len(self._intro), 0, []
        for ids, until in zip(self._sentences, before, strict=True):
            stretches += [Stretch(hay, read, until - read), stretch_of(ids)]
            at += until - read
            places.append(slice(at, at + len(ids)))
            at, read = at + len(ids), until
        stretches += [Stretch(hay, read, hay_tokens - read), stretch_of(self._question), stretch_of(self._answer)]
        asked = at + hay_tokens - read
        prompt = asked + len(self._question)
        return NeedleText(self.needles, prompt + len(self._answer), tuple(places), asked, prompt, tuple(stretches))


def encode_round(tokenizer: Tokenizer, question: str, answer: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """int32 ids of a question after the end of a sentence, and of its answer.

    Raises:
        ConfigError: the tokenizer merges the two.
    """
    joins = "the question with its answer; needles can't be asked for with it"
    asked = f" {question}"
    return (
        encode_after(tokenizer, asked),
        encode_after(tokenizer, f" {', '.join(answer)}", before=SENTENCE_END + asked, joins=joins),
    )
