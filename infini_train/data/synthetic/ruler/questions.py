"""RULER's questions about documents, from a file that the user names. Imports no torch."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from infini_train.config.errors import ConfigError
from infini_train.data.synthetic.ruler.items import ItemEncoder, NumberTokens, finite_row
from infini_train.data.synthetic.ruler.layout import Frame, RulerText, fits, lay_out
from infini_train.data.synthetic.ruler.tasks import QuestionTask

FIELDS = ("question", "answers", "context", "group")  # of a line; the last one may be left out
_CHUNK = 256
_ORDER = "Answer the question from the documents. Write the answer alone, without any other words."
_HEAD = f"{_ORDER}\n\nThese are the documents.\n\n"
HEADER = "Document {}:\n"


class Question(NamedTuple):
    """A question; documents are numbers."""

    question: str
    answers: tuple[str, ...]  # each is right
    context: tuple[int, ...]  # documents that are always there
    related: tuple[int, ...]  # documents of its group, which are taken before any other


@dataclass(frozen=True)
class QuestionFile:
    """The questions of a file, and all its documents, each once."""

    path: Path
    sha256: str
    questions: tuple[Question, ...]
    documents: tuple[str, ...]


def read_questions(path: Path) -> QuestionFile:
    """Reads JSON lines with the fields `FIELDS`.

    Raises:
        ConfigError: the file can't be read, or a line is no such object.
    """
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror}); give a .jsonl file of questions") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text; give a .jsonl file of questions") from error
    parsed = [_parse(line, f"{path}:{place}") for place, line in enumerate(lines, start=1) if line.strip()]
    if not parsed:
        raise ConfigError(f"{path} holds no question")
    documents: dict[str, int] = {}
    groups: dict[str, dict[int, None]] = {}
    contexts = []
    for line in parsed:
        contexts.append(tuple(documents.setdefault(text, len(documents)) for text in line.context))
        if line.group:
            groups.setdefault(line.group, {}).update(dict.fromkeys(contexts[-1]))
    of_group = {name: tuple(numbers) for name, numbers in groups.items()}
    questions = tuple(
        Question(line.question, line.answers, context, of_group.get(line.group, ()))
        for line, context in zip(parsed, contexts, strict=True)
    )
    return QuestionFile(path, hashlib.sha256(content).hexdigest(), questions, tuple(documents))


class _Line(NamedTuple):
    """A line of the file."""

    question: str
    answers: tuple[str, ...]
    context: tuple[str, ...]
    group: str  # empty: none


def _parse(line: str, place: str) -> _Line:
    try:
        tree = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: is no JSON; every line must be an object with {', '.join(FIELDS[:3])}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("question"), str) or not tree["question"].strip():
        raise ConfigError(f'{place}: needs a "question", a text')
    if not isinstance(tree.get("group", ""), str):
        raise ConfigError(f'{place}: "group" must be a text')
    found = []
    for field in ("answers", "context"):
        texts = tree.get(field)
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ConfigError(f'{place}: "{field}" must be a list of texts, none of them empty')
        if not texts:
            raise ConfigError(f'{place}: "{field}" must not be empty')
        found.append(tuple(dict.fromkeys(text.strip() for text in texts)))
    answers, context = found
    return _Line(tree["question"].strip(), answers, context, tree.get("group", ""))


class QuestionDraft:
    """One question and its documents; `place` lays it out among as many others as a length allows.

    Args:
        task: of RULER.
        file: with the question.
        number: of the question in the file.
        encoder: of the documents.
        numbers: tokens of the documents' headers.
        seed: determines the other documents, and the order of all.

    Attributes:
        min_tokens: bos, prompt and answer with the question's own documents; with one of them, also one other.
    """

    def __init__(
        self,
        task: QuestionTask,
        file: QuestionFile,
        number: int,
        encoder: ItemEncoder,
        numbers: NumberTokens,
        seed: Sequence[int],
    ) -> None:
        self._file, self._encoder, self._numbers, self._seed = file, encoder, numbers, list(seed)
        self.question = question = file.questions[number]
        random = np.random.default_rng(self._seed)
        known = {*question.context, *question.related}
        group = np.array([i for i in question.related if i not in question.context], np.int64)
        others = np.array([i for i in range(len(file.documents)) if i not in known], np.int64)
        taken = (question.context, random.permutation(group), random.permutation(others))
        self._first = np.concatenate(taken).astype(np.int64)
        self.frame = Frame(
            head=_HEAD,
            question=f"{_ORDER}\n\nQuestion: {question.question} Answer:",
            references=question.answers,
            answer=f" {max(question.answers, key=len)}",
            answer_tokens=task.answer_tokens,
            gap="\n\n",
        )
        self.least = max(len(question.context), 2)
        text, documents_tokens = self._lay(self.least)
        self.min_tokens = 1 + text.prompt_tokens + text.answer_tokens
        self._around_tokens = self.min_tokens - documents_tokens

    def _choose(self, places: np.ndarray) -> np.ndarray:
        """Documents in the order in which they are taken: its own, its group's, others; then all of the file again."""
        size, again = len(self._first), len(self._file.documents)
        return np.where(places < size, self._first[np.minimum(places, size - 1)], (places - size) % again)

    def _lay(self, count: int) -> tuple[RulerText, int]:
        """A text of this many documents, and their tokens."""
        order = np.random.default_rng([*self._seed, 1, count]).permutation(count)

        def make(places: np.ndarray) -> list[str]:
            chosen = zip(places, self._choose(order[places]), strict=True)
            return [f"{HEADER.format(place + 1)}{self._file.documents[i]}" for place, i in chosen]

        row = finite_row(self._encoder, count, make)
        evidence = np.flatnonzero(order < len(self.question.context)).tolist()
        return lay_out(self._encoder, row, self.frame, [range(count)], evidence), row.offset(count)

    def _fitting(self, tokens: int) -> int:
        """The largest number of documents that take no more than these tokens."""
        spent_tokens = first = 0
        while True:
            chosen = self._choose(np.arange(first, first + _CHUNK))
            texts = [f"{self._file.documents[i]}{self._encoder.back}" for i in chosen]
            spent = spent_tokens + np.cumsum([len(ids) for ids in self._encoder.encode_after(texts)])
            fitting = spent + self._numbers.up_to(np.arange(first + 1, first + _CHUNK + 1)) <= tokens
            if not fitting.all():
                return first + int(fitting.sum())
            spent_tokens, first = int(spent[-1]), first + _CHUNK

    def place(self, length_tokens: int) -> RulerText:
        """The text with as many documents as the length allows, which is at least `min_tokens`."""
        count = max(self._fitting(length_tokens - self._around_tokens), self.least)
        while True:
            text, _ = self._lay(count)
            if count == self.least or fits(text, length_tokens):
                return text
            count -= 1
