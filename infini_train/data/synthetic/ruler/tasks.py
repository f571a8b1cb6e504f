"""The tasks of RULER: what each hides, asks and may write, as in the public code of arXiv 2404.06654.

Parameters, lines that hide something, and the beginnings of answers are RULER's; instructions and questions say the
same in other words. Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["words", "numbers", "uuids"]
Hay = Literal["noise", "essay", "needles"]


@dataclass(frozen=True, kw_only=True)
class NeedleTask:
    """Lines that give values to keys, hidden in hay.

    Attributes:
        name: of the task.
        hay: lines of noise, sentences of essays, or lines like those that are asked for.
        key, value: kind of each.
        keys: number of keys.
        values: number of values of each key.
        queries: number of keys that are asked for; all their values are the answer.
        answer_tokens: tokens that the model may write.
    """

    name: str
    hay: Hay
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    answer_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class VariableTask:
    """One chain of assignments in lines of noise: a value, then `hops` times the variable before."""

    name: str
    hops: int = 4
    answer_tokens: int = 30


class WordRepeats(NamedTuple):
    """How often a common and an uncommon word occur, in a list and in the example before it; words of the example."""

    common: int
    uncommon: int
    example_common: int
    example_uncommon: int
    example_words: int


@dataclass(frozen=True, kw_only=True)
class CommonWordsTask:
    """A numbered list in which some words are common, after a solved example with a shorter one.

    Attributes:
        name: of the task.
        common: number of common words, which are the answer.
        long, short: how often words occur, in texts of at least `long_from_tokens` and in shorter ones.
        answer_tokens: tokens that the model may write.
    """

    name: str
    common: int = 10
    long: WordRepeats = WordRepeats(30, 3, 10, 3, 40)
    short: WordRepeats = WordRepeats(6, 1, 3, 1, 20)
    long_from_tokens: int = 4096
    answer_tokens: int = 120


@dataclass(frozen=True, kw_only=True)
class FrequentWordsTask:
    """Random words whose frequency falls as a Zeta distribution; the commonest are dots, the next three the answer.

    Attributes:
        name: of the task.
        alpha: exponent of the distribution. Only 2 is laid out: its normaliser is pi squared / 6.
        letters: of a word.
        asked: number of words asked for.
        tokens_a_word: of the text, for each word of the vocabulary.
        answer_tokens: tokens that the model may write.
    """

    name: str
    alpha: float = 2.0
    letters: int = 6
    asked: int = 3
    tokens_a_word: int = 50
    answer_tokens: int = 50

    def __post_init__(self) -> None:
        assert self.alpha == 2.0


@dataclass(frozen=True, kw_only=True)
class QuestionTask:
    """A question about one or several of many documents, from a file that the user names."""

    name: str
    answer_tokens: int = 32


Task = NeedleTask | VariableTask | CommonWordsTask | FrequentWordsTask | QuestionTask

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        NeedleTask(name="niah_single_1", hay="noise"),
        NeedleTask(name="niah_single_2", hay="essay"),
        NeedleTask(name="niah_single_3", hay="essay", value="uuids"),
        NeedleTask(name="niah_multikey_1", hay="essay", keys=4),
        NeedleTask(name="niah_multikey_2", hay="needles"),
        NeedleTask(name="niah_multikey_3", hay="needles", key="uuids", value="uuids"),
        NeedleTask(name="niah_multivalue", hay="essay", values=4),
        NeedleTask(name="niah_multiquery", hay="essay", keys=4, queries=4),
        VariableTask(name="vt"),
        CommonWordsTask(name="cwe"),
        FrequentWordsTask(name="fwe"),
        QuestionTask(name="qa_1"),
        QuestionTask(name="qa_2"),
    )
}
QUESTION_TASKS = tuple(name for name, task in TASKS.items() if isinstance(task, QuestionTask))
ESSAY_TASKS = tuple(name for name, task in TASKS.items() if isinstance(task, NeedleTask) and task.hay == "essay")


def find_references(references: Sequence[str], said: str) -> list[bool]:
    """Which references occur in what was said, in any case, also inside of longer words; as RULER matches them."""
    lowered = said.lower()
    return [reference.lower() in lowered for reference in references]
