"""`infini-train eval ruler`: the 13 tasks of RULER (arXiv 2404.06654), at any length. Imports torch late."""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from infini_train.command_line import describe, format_length, path
from infini_train.config.errors import ConfigError, naming
from infini_train.data.synthetic.ruler.layout import RulerText
from infini_train.data.synthetic.ruler.needles import EssayFile, read_essays
from infini_train.data.synthetic.ruler.questions import QuestionFile, read_questions
from infini_train.data.synthetic.ruler.tasks import ESSAY_TASKS, QUESTION_TASKS, TASKS, find_references
from infini_train.data.synthetic.ruler.writer import Draft, RulerWriter
from infini_train.data.tokenizer import Tokenizer
from infini_train.eval.measurement import add_out, run
from infini_train.eval.retrieval import RetrievalAnswer, RetrievalGrid, RetrievalPrompts, score_cells
from infini_train.eval.retrieval_test import RetrievalTest, add_lengths, name_suffix, read_lengths
from infini_train.statistics import format_share

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from infini_train.inference.loading import Trained

LENGTHS = ("4K", "16K", "64K")
VARIED = "varied"  # source of essay tasks without a file: the shipped sentences
GROUPS = ("niah", "qa")  # names of --tasks that stand for several
_HASH_DIGITS = 12
EXAMPLES = """\
examples:
  infini-train eval ruler runs/demo                      all tasks but those that need a file of questions
  infini-train eval ruler runs/demo --haystack essays.txt --qa squad.jsonl hotpotqa.jsonl      all 13 tasks
  infini-train eval ruler runs/demo --tasks niah vt --lengths 128K 1M --samples 20
  infini-train eval ruler runs/demo --tasks niah_multikey_2 cwe --lengths 4K --samples 500     as many as published

Stopped by Ctrl-C? The same command resumes where it stopped. More tasks, lengths, samples or files add to what is
there.
"""


class RulerPrompt(NamedTuple):
    """One prompt of the grid. `source`: hash of the file it is drawn from; "varied" in place of essays; else empty."""

    length_tokens: int
    task: str
    source: str
    sample: int


@dataclass(frozen=True, kw_only=True)
class RulerGrid(RetrievalGrid):
    """Which prompts: lengths and tasks, and the files that they are drawn from.

    Attributes:
        tasks: names.
        essays: hay of some tasks; None: the shipped sentences.
        questions: file of each task that asks about documents.
    """

    prompt_type = RulerPrompt

    tasks: tuple[str, ...] = tuple(name for name in TASKS if name not in QUESTION_TASKS)
    essays: EssayFile | None = None
    questions: Mapping[str, QuestionFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.tasks:
            if name in QUESTION_TASKS and name not in self.questions:
                raise ConfigError(f"--tasks: {name} needs a file of questions; give --qa {_describe_qa(name)}")
        for name in set(self.tasks) & set(self.questions):
            file = self.questions[name]
            if self.samples > len(file.questions):
                raise ConfigError(
                    f"--samples: {file.path} has no more than {len(file.questions)} questions for {name}; lower it"
                )

    def source(self, task: str) -> str:
        """See `RulerPrompt`."""
        if task in QUESTION_TASKS:
            return self.questions[task].sha256[:_HASH_DIGITS]
        if task in ESSAY_TASKS:
            return VARIED if self.essays is None else self.essays.sha256[:_HASH_DIGITS]
        return ""

    def columns(self) -> list[tuple[str, str]]:
        return [(task, self.source(task)) for task in self.tasks]


def _describe_qa(name: str) -> str:
    return " ".join(["FILE"] * (1 + QUESTION_TASKS.index(name)))


@dataclass(frozen=True, kw_only=True)
class RulerAnswer(RetrievalAnswer):
    """See `RetrievalAnswer`."""

    prompt_type = RulerPrompt

    task: str
    source: str
    evidence_tokens: list[int]  # places of the lines, sentences or documents that hold the answer; none: all count
    expected: list[str]

    @property
    def parts(self) -> int:
        """References that were asked for; one where any of them will do."""
        return 1 if self.task in QUESTION_TASKS else len(self.expected)

    @property
    def right_parts(self) -> int:
        """References that were said: RULER's string_match_all; for questions, its string_match_part."""
        return min(sum(find_references(self.expected, self.said)), self.parts)


class RulerPrompts(RetrievalPrompts):
    """See `RetrievalPrompts`. Texts are as long as whole lines, sentences, words or documents allow, as published."""

    def __init__(self, grid: RulerGrid, tokenizer: Tokenizer, segment_tokens: int) -> None:
        super().__init__(grid, tokenizer, segment_tokens)
        self.writer = RulerWriter(tokenizer, grid.essays, grid.questions)
        for prompt in grid.prompts(min(grid.lengths_tokens)):
            needed = self._draft(prompt).min_tokens
            if needed > prompt.length_tokens:
                length = format_length(prompt.length_tokens)
                raise ConfigError(
                    f"--lengths: {length} can't hold {prompt.task}, which takes at least {needed} tokens with its"
                    " answer; raise it, or leave the task out with --tasks"
                )

    def _draft(self, prompt: RulerPrompt) -> Draft:
        task = list(TASKS).index(prompt.task)
        seed = [self.grid.seed, task, prompt.length_tokens, prompt.sample]
        return self.writer.draft(prompt.task, prompt.length_tokens, prompt.sample, seed)

    def write(self, prompt: RulerPrompt) -> RulerText:
        return self._draft(prompt).place(prompt.length_tokens)

    def record(
        self, prompt: RulerPrompt, text: RulerText, predicted: list[int], measured: dict[str, Any]
    ) -> RulerAnswer:
        return RulerAnswer(
            **prompt._asdict(),
            **measured,
            evidence_tokens=[place + 1 for place in text.evidence_tokens],  # bos
            question_token=text.question_token + 1,
            expected=list(text.references),
            said=self.tokenizer.decode(predicted),
        )


class RulerTest(RetrievalTest[RulerAnswer]):
    """Answers to RULER's prompts.

    Args:
        trained: the model.
        grid: which prompts.
        lanes: prompts read side by side.

    Raises:
        ConfigError: the tokenizer, a file or a length does not do.
    """

    record, part, exact_title = RulerAnswer, "reference", "all references"
    mapped, map_name = "score", "score by task and length"
    grid: RulerGrid

    def __init__(self, trained: "Trained", grid: RulerGrid, *, lanes: int) -> None:
        prompts = RulerPrompts(grid, trained.tokenizer, trained.step_tokens)
        suffix = name_suffix(grid, trained.precision)
        super().__init__(trained, "ruler", suffix, {"seed": grid.seed}, prompts, lanes=lanes)
        self.about |= {
            "tasks": list(grid.tasks),
            "haystack": VARIED if grid.essays is None else grid.essays.path.name,
            "questions": {name: file.path.name for name, file in grid.questions.items()},
        }

    def column_name(self, column: tuple[Any, ...]) -> str:
        return str(column[0])

    def cell_name(self, cell: tuple[Any, ...]) -> str:
        return f"{cell[1]}, {format_length(cell[0])}"

    def map_texts(self) -> tuple[str, str]:
        return "RULER: references found, in %", "task"

    def heading(self, results: dict[str, Any]) -> str:
        return f"RULER, seed {results['seed']}, {results['samples']} samples a task and length"

    def plan(self, records: Sequence[RulerAnswer]) -> tuple[list[str], int | None]:
        there, total = super().plan(records)
        return [*there, *self._remarks()], total

    def _remarks(self) -> list[str]:
        """What differs from all of RULER."""
        left_out = [name for name in QUESTION_TASKS if name not in self.grid.tasks and name not in self.grid.questions]
        lines = [f"{', '.join(left_out)} left out: needs a file of questions (--qa)"] if left_out else []
        if self.grid.essays is None and set(self.grid.tasks) & set(ESSAY_TASKS):
            lines.append(
                "essays: the shipped sentences in random order take their place (--haystack FILE reads essays)"
            )
        return lines

    def summarise(self, records: Sequence[RulerAnswer]) -> dict[str, Any]:
        """Besides what all retrieval tests have: scores in percent, of a length as the mean over its tasks."""
        found, scores = super().summarise(records), score_cells(self.grid, records)
        of_length: dict[int, list[float]] = {}
        for cell in found["cells"]:
            score = scores[cell["length_tokens"], cell["task"], cell["source"]]
            cell["score_percent"] = 100 * score.score
            cell["score_percent_95"] = [100 * end for end in score.score_interval]
            of_length.setdefault(cell["length_tokens"], []).append(cell["score_percent"])
        for row in found["lengths"]:
            row["score_percent"] = statistics.fmean(of_length[row["length_tokens"]])
        found["all"]["score_percent"] = statistics.fmean(row["score_percent"] for row in found["lengths"])
        return found

    def write(
        self, records: Sequence[RulerAnswer], results: dict[str, Any], folder: Path, board: "SummaryWriter"
    ) -> None:
        super().write(records, results, folder, board)
        for row in results["lengths"]:
            name = f"eval/{self.board_name}/mean of {len(self.grid.tasks)} tasks/{format_length(row['length_tokens'])}"
            board.add_scalar(name, row["score_percent"], self.trained.step)

    def format(self, results: dict[str, Any]) -> str:
        lengths = [row["length_tokens"] for row in results["lengths"]]
        cells = {(cell["task"], cell["length_tokens"]): cell for cell in results["cells"]}
        mean = f"mean of {len(self.grid.tasks)}"
        width = max(len(mean), *map(len, self.grid.tasks)) + 1
        lines = [
            f"{results['checkpoint']}, step {results['step']}",
            f"{self.heading(results)}; score in %, with 95 % interval",
            "",
            f"{'task':<{width}}" + "".join(f"{format_length(length):>18}" for length in lengths),
        ]
        for task in self.grid.tasks:
            row = [cells[task, length] for length in lengths]
            shown = (_format_score(cell["score_percent"], cell["score_percent_95"]) for cell in row)
            lines.append(f"{task:<{width}}" + "".join(f"{text:>18}" for text in shown))
        means = "".join(f"{row['score_percent']:>18.1f}" for row in results["lengths"])
        memory = "".join(f"{row['peak_memory_mb']:>18,.0f}" for row in results["lengths"])
        lines += [f"{mean:<{width}}{means}", "", f"{'peak MB':<{width}}{memory}", *self._remarks()]
        return "\n".join([*lines, f"written to {results['folder']}"])


def _format_score(percent: float, interval: Sequence[float]) -> str:
    return format_share(percent / 100, [end / 100 for end in interval])


# ------------------------------------------------------------------------------------------------------------- command


def add_command(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train eval ruler` its options."""
    description = (
        "Run the 13 tasks of RULER: needles in a haystack (niah_...), chains of variables (vt), common and frequent"
        " words (cwe, fwe), questions about documents (qa_1, qa_2). Reports the share of the references that the model"
        " wrote, by task and length, with 95 % intervals. Prompts stream through the model."
    )
    describe(parser, description, EXAMPLES)
    add_lengths(parser, LENGTHS)
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=(*GROUPS, *TASKS),
        metavar="TASK",
        help=f"tasks to run, of {', '.join(TASKS)}; niah and qa stand for all of theirs (default: all, without those"
        " whose file is missing)",
    )
    parser.add_argument(
        "--haystack",
        type=path,
        metavar="FILE",
        help="a text or .jsonl file of essays for the tasks that hide needles in them (default: the shipped sentences"
        " in random order)",
    )
    parser.add_argument(
        "--qa",
        nargs="+",
        type=path,
        default=(),
        metavar="FILE",
        help="files of questions and documents in JSON lines, for qa_1 and then for qa_2; see docs/ruler.md",
    )
    add_out(parser, "eval/ruler-STEP", "the answers that are there")
    parser.set_defaults(command=_ruler)


def choose_tasks(named: Sequence[str] | None, with_file: Sequence[str]) -> tuple[str, ...]:
    """The tasks of a command, in RULER's order.

    Args:
        named: tasks and groups of tasks; None: all that can be run.
        with_file: the tasks that ask about documents and have a file.
    """
    if named is None:
        return tuple(name for name in TASKS if name not in QUESTION_TASKS or name in with_file)
    return tuple(name for name in TASKS if name in named or name.split("_")[0] in set(named) & set(GROUPS))


def _ruler(options: argparse.Namespace) -> None:
    if len(options.qa) > len(QUESTION_TASKS):
        raise ConfigError(f"--qa: give at most {len(QUESTION_TASKS)} files, for {' and '.join(QUESTION_TASKS)}")
    with naming("--haystack"):
        essays = None if options.haystack is None else read_essays(options.haystack)
    with naming("--qa"):
        questions = {name: read_questions(file) for name, file in zip(QUESTION_TASKS, options.qa, strict=False)}
    grid = RulerGrid(
        **read_lengths(options),
        tasks=choose_tasks(options.tasks, tuple(questions)),
        essays=essays,
        questions=questions,
    )
    run(options, lambda trained: RulerTest(trained, grid, lanes=options.lanes))
