"""`infini-train eval babilong`: questions about facts scattered in other text, after BABILong. Imports torch late."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from infini_train.command_line import describe, format_length, positive
from infini_train.config.data import LEAST_FACTS, BabiTask
from infini_train.config.errors import ConfigError, naming
from infini_train.data.synthetic.babi import ANSWERS, TASKS, Round
from infini_train.data.synthetic.babilong import SentenceHay, count_least_tokens, draw_fitting, is_right, spell_round
from infini_train.data.synthetic.needles import NeedleText, encode_round
from infini_train.data.tokenizer import Tokenizer
from infini_train.eval.hay import add_haystack, hash_prose, name_hay, note_repeats
from infini_train.eval.measurement import add_out, run
from infini_train.eval.retrieval import RetrievalAnswer, RetrievalGrid, RetrievalPrompts
from infini_train.eval.retrieval_test import RetrievalTest, add_lengths, name_suffix, read_lengths

if TYPE_CHECKING:
    from infini_train.inference.loading import Trained

LENGTHS = ("4K", "16K", "64K")
MAX_FACTS = 128  # more than the published samples have
EXAMPLES = """\
examples:
  infini-train eval babilong runs/babilong                                      where people are, in 4K to 64K tokens
  infini-train eval babilong runs/babilong --tasks qa1 qa2 qa3 --lengths 4K 16K 1M 10M
  infini-train eval babilong runs/babilong --haystack books.jsonl --samples 100

Stopped by Ctrl-C? The same command resumes where it stopped. More lengths, tasks or samples add to what is there.
"""


class BabilongPrompt(NamedTuple):
    """One prompt of the grid."""

    length_tokens: int
    task: BabiTask
    sample: int


@dataclass(frozen=True, kw_only=True)
class BabilongGrid(RetrievalGrid):
    """Which prompts: lengths and tasks; the facts lie anywhere."""

    prompt_type = BabilongPrompt

    tasks: tuple[BabiTask, ...] = ("qa1",)
    haystack: str = "varied"
    max_facts: int = MAX_FACTS  # longer stories are drawn again

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise ConfigError(f"--tasks: {unknown[0]}: no such task; choose from {', '.join(TASKS)}")
        if not self.tasks:
            raise ConfigError("--tasks: give at least one")
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError("--tasks: the same one is given twice")
        if self.max_facts < LEAST_FACTS:
            raise ConfigError(f"--max-facts: must be at least {LEAST_FACTS}, for any question")

    @property
    def hay(self) -> str:
        """Name of the haystack; prose, where it is a file."""
        return name_hay(self.haystack)

    def columns(self) -> list[tuple[BabiTask]]:
        return [(task,) for task in self.tasks]


@dataclass(frozen=True, kw_only=True)
class BabilongAnswer(RetrievalAnswer):
    """See `RetrievalAnswer`; one word, scored as published."""

    prompt_type = BabilongPrompt

    task: BabiTask
    facts: int
    question: str
    expected: str

    @property
    def parts(self) -> int:
        """Words that were asked for."""
        return 1

    @property
    def right_parts(self) -> int:
        """1 if the answer is right."""
        return int(is_right(self.task, Round(self.question, self.expected), self.said))


@dataclass(frozen=True, eq=False)
class BabilongText:
    """A `PromptText`; the model may write as many tokens as the longest answer of the task has.

    Attributes:
        text: with the right answer.
        asked: at its end.
        facts: number of facts in it.
        answer_tokens: that the model may write.
    """

    text: NeedleText
    asked: Round
    facts: int
    answer_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return self.text.prompt_tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `NeedleText.read`."""
        return self.text.read(start, stop)


class BabilongPrompts(RetrievalPrompts):
    """See `RetrievalPrompts`; the question's place in a segment is spread evenly, the facts lie anywhere."""

    grid: BabilongGrid

    def __init__(self, grid: BabilongGrid, tokenizer: Tokenizer, segment_tokens: int) -> None:
        super().__init__(grid, tokenizer, segment_tokens)
        with naming("--haystack"):
            self.hay = SentenceHay(grid.haystack, tokenizer)
        self._answer_tokens = {task: self._count_answer(task) for task in grid.tasks}
        needed, shortest = self._reserved_tokens + count_least_tokens(tokenizer, grid.tasks), min(grid.lengths_tokens)
        if needed > shortest:
            raise ConfigError(
                f"--lengths: {format_length(shortest)} can't hold {LEAST_FACTS} facts and their question, which take up"
                f" to {needed} tokens; raise it"
            )

    def _count_answer(self, task: BabiTask) -> int:
        """Tokens of the task's longest answer."""
        spelled = [spell_round(Round("Where?", word)) for word in ANSWERS[task]]
        return max(len(encode_round(self.tokenizer, *round_)[1]) for round_ in spelled)

    @property
    def _reserved_tokens(self) -> int:
        """For bos, and for an answer longer than the right one."""
        return 1 + max(self._answer_tokens.values())

    def write(self, prompt: BabilongPrompt) -> BabilongText:
        grid = self.grid
        seed = [grid.seed, TASKS.index(prompt.task), prompt.length_tokens, grid.max_facts]
        random = np.random.default_rng([*seed, prompt.sample])
        room = prompt.length_tokens - self._reserved_tokens
        encoded = draw_fitting(random, self.tokenizer, prompt.task, grid.max_facts, room)
        least = encoded.min_tokens + self._reserved_tokens - 1
        _, tokens = self.spread(prompt, seed, least)
        hay = self.hay.draw([*seed, prompt.sample, 1])
        text = encoded.place(random, self.hay, hay, tokens - least)
        story = encoded.story
        return BabilongText(text, story.rounds[0], len(story.facts), self._answer_tokens[prompt.task])

    def record(
        self, prompt: BabilongPrompt, text: BabilongText, predicted: list[int], measured: dict[str, Any]
    ) -> BabilongAnswer:
        return BabilongAnswer(
            **prompt._asdict(),
            **measured,
            question_token=text.text.question_token + 1,
            facts=text.facts,
            question=text.asked.question,
            expected=text.asked.answer,
            said=self.tokenizer.decode(predicted),
        )


class BabilongTest(RetrievalTest[BabilongAnswer]):
    """Answers to a grid of prompts with scattered facts.

    Args:
        trained: the model.
        grid: which prompts.
        lanes: prompts read side by side.

    Raises:
        ConfigError: the tokenizer, the haystack or a length does not do.
    """

    record, part, exact_title = BabilongAnswer, "word", "right answers"
    shows_parts = False
    mapped, map_name = "exact_match", "right answers by length and task"
    grid: BabilongGrid
    prompts: BabilongPrompts

    def __init__(self, trained: "Trained", grid: BabilongGrid, *, lanes: int) -> None:
        prompts = BabilongPrompts(grid, trained.tokenizer, trained.step_tokens)
        settings = {
            "haystack": grid.hay,
            "haystack_sha256": hash_prose(grid.haystack),
            "max_facts": grid.max_facts,
            "seed": grid.seed,
        }
        facts = f"-{grid.max_facts}facts" * (grid.max_facts != MAX_FACTS)
        suffix = f"-{grid.hay}{facts}{name_suffix(grid, trained.precision)}"
        super().__init__(trained, "babilong", suffix, settings, prompts, lanes=lanes)

    def plan(self, records: Sequence[BabilongAnswer]) -> tuple[list[str], int | None]:
        there, total = super().plan(records)
        return [*note_repeats(self.prompts.hay.source.prose_tokens, self.grid.lengths_tokens), *there], total

    def column_name(self, column: tuple[Any, ...]) -> str:
        return str(column[0])

    def cell_name(self, cell: tuple[Any, ...]) -> str:
        return f"{format_length(cell[0])}, {cell[1]}"

    def map_texts(self) -> tuple[str, str]:
        return f"BABILong in {self.grid.hay} hay: right answers in %", "task"

    def heading(self, results: dict[str, Any]) -> str:
        return f"BABILong in {results['haystack']} hay, up to {results['max_facts']} facts"


# ------------------------------------------------------------------------------------------------------------- command


def add_command(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train eval babilong` its options."""
    description = (
        "Scatter the facts of a bAbI story in hay (the text around them: generated sentences, or your own prose), ask"
        " about them at the end, and let the model write the answer. Reports the share of right answers by length and"
        " task, scored as published, with Wilson's 95 % intervals."
        " Tasks: qa1 (where a person is), qa2 (where an object is), qa3 (where an object was before), qa4 (which place"
        " lies beside another), qa5 (who gave what to whom)."
    )
    describe(parser, description, EXAMPLES)
    add_lengths(parser, LENGTHS)
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=("qa1",), metavar="TASK", help="what is asked (default: qa1)"
    )
    add_haystack(parser, "varied")
    parser.add_argument(
        "--max-facts",
        type=positive,
        default=MAX_FACTS,
        metavar="N",
        help="longest stories, as far as they fit; longer ones are drawn again (default: %(default)s)",
    )
    add_out(parser, "eval/babilong-STEP-HAY", "the answers that are there")
    parser.set_defaults(command=_babilong)


def _babilong(options: argparse.Namespace) -> None:
    grid = BabilongGrid(
        **read_lengths(options), tasks=tuple(options.tasks), haystack=options.haystack, max_facts=options.max_facts
    )
    run(options, lambda trained: BabilongTest(trained, grid, lanes=options.lanes))
