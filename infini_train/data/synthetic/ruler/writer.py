"""From a task's name to its texts in the ids of one tokenizer. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from infini_train.data.synthetic.ruler.counting import NUMBER, CommonWordsDraft, FrequentWordsDraft
from infini_train.data.synthetic.ruler.items import ItemEncoder, ItemHaystack, NumberTokens
from infini_train.data.synthetic.ruler.layout import RulerText
from infini_train.data.synthetic.ruler.needles import EssayFile, NeedleDraft, essay_hay, noise_hay, varied_hay
from infini_train.data.synthetic.ruler.questions import HEADER, QuestionDraft, QuestionFile
from infini_train.data.synthetic.ruler.tasks import (
    TASKS,
    CommonWordsTask,
    FrequentWordsTask,
    NeedleTask,
    QuestionTask,
    VariableTask,
)
from infini_train.data.tokenizer import Tokenizer


class Draft(Protocol):
    """What a text hides and asks, before it has a length."""

    min_tokens: int  # bos, prompt and answer with the least that must be between them

    def place(self, length_tokens: int) -> RulerText:
        """The text with as much as fits into bos, prompt and answer of this length, at least `min_tokens`."""
        ...


class RulerWriter:
    """Writes the texts of all tasks.

    Args:
        tokenizer: the model's.
        essays: for the tasks that hide needles in them; None: the shipped sentences, in random order.
        questions: a file for each of the tasks that ask about documents.

    Raises:
        ConfigError: the tokenizer joins what must be kept apart.
    """

    def __init__(self, tokenizer: Tokenizer, essays: EssayFile | None, questions: Mapping[str, QuestionFile]) -> None:
        self._lines, self._words, self._documents = (ItemEncoder(tokenizer, end) for end in ("\n", " ", "\n\n"))
        self._noise = noise_hay(self._lines)
        self._essays = None if essays is None else essay_hay(self._words, essays.sentences)
        self._questions = questions
        self._numbers = NumberTokens(self._words, NUMBER)
        self._headers = NumberTokens(self._documents, HEADER)

    def draft(self, name: str, length_tokens: int, sample: int, seed: Sequence[int]) -> Draft:
        """What a text hides and asks.

        Args:
            name: of the task.
            length_tokens: of the text; some tasks choose their parameters by it.
            sample: number of the text; tasks that ask about documents take the question with this number.
            seed: determines the rest.
        """
        match TASKS[name]:
            case NeedleTask(hay="essay") as task:
                return NeedleDraft(task, self._essay_hay(seed), self._words, seed)
            case NeedleTask(hay="needles") as task:
                return NeedleDraft(task, None, self._lines, seed)
            case NeedleTask() | VariableTask() as task:
                return NeedleDraft(task, self._noise, self._lines, seed)
            case CommonWordsTask() as task:
                return self._draft_common(task, length_tokens, seed)
            case FrequentWordsTask() as task:
                return FrequentWordsDraft(task, self._words, length_tokens, seed)
            case QuestionTask() as task:
                return QuestionDraft(task, self._questions[name], sample, self._documents, self._headers, seed)

    def _draft_common(self, task: CommonWordsTask, length_tokens: int, seed: Sequence[int]) -> CommonWordsDraft:
        """A long list, except where RULER has a short one, or where a tokenizer with short tokens leaves no room."""
        if length_tokens >= task.long_from_tokens:
            draft = CommonWordsDraft(task, task.long, self._words, self._numbers, seed)
            if draft.min_tokens <= length_tokens:
                return draft
        return CommonWordsDraft(task, task.short, self._words, self._numbers, seed)

    def _essay_hay(self, seed: Sequence[int]) -> ItemHaystack:
        return self._essays or varied_hay(self._words, [*seed, 3])
