"""`infini-train eval needles`: several things hidden in hay or prose, after RULER. Imports torch late."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from infini_train.command_line import describe, format_length, positive
from infini_train.config.data import VALUE_EACH
from infini_train.config.errors import ConfigError, naming
from infini_train.data.synthetic.haystack import HaystackSource
from infini_train.data.synthetic.needle_wordings import NEEDLE_WORDINGS, PASS_KEY, find_needle_wording
from infini_train.data.synthetic.needles import (
    ONE_ASKED,
    OWN_WORDING,
    TASKS,
    THINGS,
    EncodedNeedles,
    NeedleText,
    Task,
    draw_needles,
    find_words,
)
from infini_train.data.synthetic.passkey import choose_before
from infini_train.data.synthetic.wordings import find_wording
from infini_train.data.tokenizer import Tokenizer
from infini_train.eval.hay import add_haystack, hash_prose, name_hay, note_repeats
from infini_train.eval.measurement import add_out, run
from infini_train.eval.retrieval import RetrievalAnswer, RetrievalGrid, RetrievalPrompts
from infini_train.eval.retrieval_test import RetrievalTest, add_grid, name_suffix, read_grid

if TYPE_CHECKING:
    from infini_train.inference.loading import Trained

LENGTHS = ("4K", "16K", "64K")
SPREAD = 0.5  # stands for the depth where all needles matter
EXAMPLES = """\
examples:
  infini-train eval needles runs/demo --task multikey --needles 2 4 8
  infini-train eval needles runs/demo --task single --haystack essays.txt      a pass key in prose
  infini-train eval needles runs/demo --task variables --haystack varied --lengths 4K --samples 50

Stopped by Ctrl-C? The same command resumes where it stopped. More lengths, needles, depths or samples add to
what is there.
"""


class NeedlePrompt(NamedTuple):
    """One prompt of the grid."""

    length_tokens: int
    needles: int
    depth: float
    sample: int


@dataclass(frozen=True, kw_only=True)
class NeedleGrid(RetrievalGrid):
    """Which prompts: lengths, numbers of needles, and depths of the asked needle in the hay, where one is asked."""

    prompt_type = NeedlePrompt

    task: Task
    needles: tuple[int, ...] = (4,)  # hidden in a text; with variables, links of the asked chain
    haystack: str = "repeated"
    wording: str = PASS_KEY.name

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.needles or min(self.needles) < 1:
            raise ConfigError("--needles: must be positive")
        if len(set(self.needles)) < len(self.needles):
            raise ConfigError("--needles: the same one is given twice")
        if self.task not in TASKS:
            raise ConfigError(f"--task: {self.task}: no such task; choose one of {', '.join(TASKS)}")
        with naming("--wording"):
            find_needle_wording(self.wording)
        if self.wording != PASS_KEY.name and self.task in OWN_WORDING:
            raise ConfigError(f"--wording: {self.task} has its own; leave it out, or choose another --task")
        if max(self.needles) > len(THINGS):
            raise ConfigError(f"--needles: {max(self.needles)} are too many; at most {len(THINGS)}")
        if self.task in VALUE_EACH and max(self.needles) > 10**self.digits:
            raise ConfigError(f"--digits: {self.digits} give fewer than {max(self.needles)} values; raise it")
        if self.task == "single" and self.needles != (1,):
            object.__setattr__(self, "needles", (1,))
        if self.task not in ONE_ASKED:
            object.__setattr__(self, "depths", (SPREAD,))

    @property
    def hay(self) -> str:
        """Name of the haystack; prose, where it is a file."""
        return name_hay(self.haystack)

    def columns(self) -> list[tuple[int, float]]:
        return [(needles, depth) for needles in self.needles for depth in self.depths]


@dataclass(frozen=True, kw_only=True)
class NeedleAnswer(RetrievalAnswer):
    """See `RetrievalAnswer`."""

    prompt_type = NeedlePrompt

    needles: int
    depth: float
    needle_tokens: list[int]  # places of the needles that hold the answer
    expected: list[str]

    @property
    def parts(self) -> int:
        """Words that were asked for."""
        return len(self.expected)

    @property
    def right_parts(self) -> int:
        """Expected words that the prediction holds."""
        return sum(find_words(self.expected, self.said))


class NeedlePrompts(RetrievalPrompts):
    """See `RetrievalPrompts`; the asked needle of a cell has its phase, all others lie anywhere."""

    def __init__(self, grid: NeedleGrid, tokenizer: Tokenizer, segment_tokens: int) -> None:
        super().__init__(grid, tokenizer, segment_tokens)
        with naming("--haystack"):
            self.source = HaystackSource(grid.haystack, tokenizer)
        self._intro = find_wording("paper").intro
        for prompt in grid.prompts(min(grid.lengths_tokens)):
            needed = self._encode(prompt)[0].min_tokens + 1  # bos
            if needed > prompt.length_tokens:
                length = format_length(prompt.length_tokens)
                raise ConfigError(
                    f"--lengths: {length} can't hold {prompt.needles} needles and their question without any hay, which"
                    f" take up to {needed} tokens; raise it, or lower --needles"
                )

    def _seed(self, prompt: NeedlePrompt) -> list[int]:
        """The seed of the prompt's cell."""
        grid = self.grid
        task = TASKS.index(grid.task)
        return [grid.seed, task, prompt.length_tokens, prompt.needles, round(prompt.depth * 1e9), grid.digits]

    def _encode(self, prompt: NeedlePrompt) -> tuple[EncodedNeedles, np.random.Generator]:
        random = np.random.default_rng([*self._seed(prompt), prompt.sample])
        wording = find_needle_wording(self.grid.wording)
        needles = draw_needles(random, self.grid.task, prompt.needles, self.grid.digits, wording)
        return EncodedNeedles(self.tokenizer, needles, self._intro), random

    def write(self, prompt: NeedlePrompt) -> NeedleText:
        encoded, random = self._encode(prompt)
        phase, tokens = self.spread(prompt, self._seed(prompt), encoded.min_tokens)
        hay = tokens - encoded.min_tokens
        before = random.integers(0, hay + 1, prompt.needles * (2 if self.grid.task == "variables" else 1))
        if self.grid.task in ONE_ASKED:
            (asked,) = encoded.needles.asked
            before[asked] = choose_before(hay, prompt.depth, self.segment_tokens, phase)
            encoded, before = self._reorder(encoded, before)
        source = self.source.draw([*self._seed(prompt), prompt.sample, 1])
        return encoded.place(source, [int(place) for place in np.sort(before)], hay)

    def _reorder(self, encoded: EncodedNeedles, before: np.ndarray) -> tuple[EncodedNeedles, np.ndarray]:
        """Sentences in the order of their places, so that the asked one keeps its own."""
        needles, order = encoded.needles, np.argsort(before, kind="stable")
        asked = tuple(int(np.flatnonzero(order == number)[0]) for number in needles.asked)
        needles = needles._replace(sentences=tuple(needles.sentences[i] for i in order), asked=asked)
        return EncodedNeedles(self.tokenizer, needles, self._intro), before[order]

    def record(
        self, prompt: NeedlePrompt, text: NeedleText, predicted: list[int], measured: dict[str, Any]
    ) -> NeedleAnswer:
        return NeedleAnswer(
            **prompt._asdict(),
            **measured,
            needle_tokens=[text.needle_spans[i].start + 1 for i in text.needles.asked],
            question_token=text.question_token + 1,
            expected=list(text.needles.answer),
            said=self.tokenizer.decode(predicted),
        )


class NeedleTest(RetrievalTest[NeedleAnswer]):
    """Answers to a grid of prompts with several hidden things.

    Args:
        trained: the model.
        grid: which prompts.
        lanes: prompts read side by side.

    Raises:
        ConfigError: the tokenizer, the haystack or a length does not do.
    """

    record, part, exact_title = NeedleAnswer, "word", "all words right"
    mapped, map_name = "accuracy", "words by length and needles"
    grid: NeedleGrid
    prompts: NeedlePrompts

    def __init__(self, trained: "Trained", grid: NeedleGrid, *, lanes: int) -> None:
        prompts = NeedlePrompts(grid, trained.tokenizer, trained.step_tokens)
        settings = {
            "task": grid.task,
            "haystack": grid.hay,
            "haystack_sha256": hash_prose(grid.haystack),
            "digits": grid.digits,
            "seed": grid.seed,
        }
        worded = "" if grid.wording == PASS_KEY.name else f"-{grid.wording}"
        if worded:  # tests from before there was a choice go on
            settings["wording"] = grid.wording
        suffix = f"-{grid.task}-{grid.hay}{worded}{name_suffix(grid, trained.precision)}"
        super().__init__(trained, "needles", suffix, settings, prompts, lanes=lanes)

    def plan(self, records: Sequence[NeedleAnswer]) -> tuple[list[str], int | None]:
        there, total = super().plan(records)
        return [*note_repeats(self.prompts.source.prose_tokens, self.grid.lengths_tokens), *there], total

    def column_name(self, column: tuple[Any, ...]) -> str:
        needles, depth = column
        return f"{needles} at {depth:.3g}" if self.grid.task in ONE_ASKED else f"{needles}"

    def cell_name(self, cell: tuple[Any, ...]) -> str:
        length, needles, depth = cell
        return f"{format_length(length)}, {needles} at {depth:.3g}"

    def map_texts(self) -> tuple[str, str]:
        what = f"{self.grid.task} in {self.grid.hay} hay: right words in %"
        return what, "needles at the depth of the asked one" if self.grid.task in ONE_ASKED else "needles"

    def heading(self, results: dict[str, Any]) -> str:
        worded = f", wording {results['wording']}" if "wording" in results else ""
        return f"{results['task']} in {results['haystack']} hay{worded}, {results['digits']} digits"


# ------------------------------------------------------------------------------------------------------------- command


def add_command(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train eval needles` its options."""
    description = (
        "Hide several things in hay (the filler around them: generated sentences, or your own prose), ask for one or"
        " all of them at the end, and let the model write the answer. Reports the share of the asked words that were"
        " predicted, and of prompts with all of them, with Wilson's 95 % intervals."
        " Tasks after RULER: single (one pass key), multikey (one of several keys asked), multivalue (all values of"
        " one key), multiquery (all keys asked), variables (chains of assignments)."
    )
    describe(parser, description, EXAMPLES)
    add_grid(parser, LENGTHS, depths_of="the asked needle in the hay, where one is asked", digits_of="a value")
    parser.add_argument(
        "--task", choices=TASKS, default="multikey", help="what is hidden and asked (default: %(default)s)"
    )
    add_haystack(parser, "repeated")
    parser.add_argument(
        "--wording",
        choices=NEEDLE_WORDINGS,
        default=PASS_KEY.name,
        help="words that tell and ask for several things (default: %(default)s)",
    )
    parser.add_argument(
        "--needles",
        nargs="+",
        type=positive,
        default=(4,),
        metavar="N",
        help="number of things hidden in a text; with variables, links of the asked chain (default: 4)",
    )
    add_out(parser, "eval/needles-STEP-TASK-HAY", "the answers that are there")
    parser.set_defaults(command=_needles)


def _needles(options: argparse.Namespace) -> None:
    grid = NeedleGrid(
        **read_grid(options),
        task=options.task,
        needles=tuple(options.needles),
        haystack=options.haystack,
        wording=options.wording,
    )
    run(options, lambda trained: NeedleTest(trained, grid, lanes=options.lanes))
