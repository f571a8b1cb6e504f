"""`infini-train eval passkey`: a key hidden in filler, asked for at the end. Imports torch late."""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from infini_train.command_line import RenamedOption, describe, format_length
from infini_train.config.errors import ConfigError, naming
from infini_train.data.synthetic.passkey import Passkey, PasskeyWriter, choose_before
from infini_train.data.synthetic.wordings import WORDINGS, find_wording
from infini_train.data.tokenizer import Tokenizer
from infini_train.eval.measurement import add_out, run
from infini_train.eval.retrieval import RetrievalAnswer, RetrievalGrid, RetrievalPrompts
from infini_train.eval.retrieval_test import RetrievalTest, add_grid, name_suffix, read_grid
from infini_train.statistics import format_share

if TYPE_CHECKING:
    from infini_train.inference.loading import Trained

LENGTHS = ("32K", "128K", "256K", "512K", "1M")  # those of arXiv 2404.07143
EXAMPLES = """\
examples:
  infini-train eval passkey runs/demo                    the paper's grid: 32K to 1M tokens; start, middle, end
  infini-train eval passkey runs/demo --lengths 4K 32K --depths 11 --samples 20
  infini-train eval passkey runs/demo --wording harbour --seed 1    filler and keys that training did not see
  infini-train eval passkey runs/demo --lengths 4M 10M --samples 3 --lanes 9

Stopped by Ctrl-C? The same command resumes where it stopped. More lengths, depths or samples add to
what is there.
"""


class PasskeyPrompt(NamedTuple):
    """One prompt of the grid; files call the depth of the key its position."""

    length_tokens: int
    position: float
    sample: int


@dataclass(frozen=True, kw_only=True)
class PasskeyGrid(RetrievalGrid):
    """Which prompts: lengths, and depths of the key in the filler."""

    prompt_type = PasskeyPrompt

    wording: str = "paper"

    def __post_init__(self) -> None:
        with naming("--wording"):
            find_wording(self.wording)
        super().__post_init__()

    def columns(self) -> list[tuple[float]]:
        return [(depth,) for depth in self.depths]


@dataclass(frozen=True, kw_only=True)
class PasskeyAnswer(RetrievalAnswer):
    """See `RetrievalAnswer`; the prediction digit by digit, ? for whatever is no digit."""

    prompt_type = PasskeyPrompt

    position: float
    key: str
    key_token: int  # place of the first digit of the key's first mention

    @property
    def parts(self) -> int:
        """Digits of the key."""
        return len(self.key)

    @property
    def right_parts(self) -> int:
        """Digits that were predicted in their places."""
        return sum(predicted == digit for predicted, digit in zip(self.said, self.key, strict=True))


class PasskeyPrompts(RetrievalPrompts):
    """See `RetrievalPrompts`."""

    def __init__(self, grid: PasskeyGrid, tokenizer: Tokenizer, segment_tokens: int) -> None:
        super().__init__(grid, tokenizer, segment_tokens)
        self.writer = PasskeyWriter(tokenizer, find_wording(grid.wording), grid.digits)
        needed, shortest = self.writer.min_tokens + 1, min(grid.lengths_tokens)  # bos
        if shortest < needed:
            what = f"wording {grid.wording} with {grid.digits} digits takes {needed} tokens without any filler"
            raise ConfigError(f"--lengths: {shortest} tokens can't hold the prompt; {what}")

    def write(self, prompt: PasskeyPrompt) -> Passkey:
        writer, segment = self.writer, self.segment_tokens
        seed = [self.grid.seed, prompt.length_tokens, round(prompt.position * 1e9)]
        phase, tokens = self.spread(prompt, seed, writer.min_tokens)
        filler = tokens - writer.min_tokens
        before = choose_before(filler, prompt.position, segment, 0.0)  # the first of the places to choose from
        before += (int(phase * segment) - before) % segment % min(segment, filler + 1)
        key = np.random.default_rng([*seed, prompt.sample]).integers(0, 10, writer.digits)
        return writer.place(key, tokens, before)

    def record(
        self, prompt: PasskeyPrompt, text: Passkey, predicted: list[int], measured: dict[str, Any]
    ) -> PasskeyAnswer:
        return PasskeyAnswer(
            **prompt._asdict(),
            **measured,
            key_token=text.spans.first_mention.start + 1,
            question_token=text.spans.question.start + 1,
            key="".join(map(str, text.digits)),
            said=self.writer.spell(predicted),
        )


class PasskeyTest(RetrievalTest[PasskeyAnswer]):
    """Answers to a grid of prompts with a hidden key.

    Args:
        trained: the model.
        grid: which prompts.
        lanes: prompts read side by side.

    Raises:
        ConfigError: the tokenizer or a length does not do.
    """

    record, part, places = PasskeyAnswer, "digit", ("key",)
    joint = "at "
    mapped, map_name = "exact_match", "exact match by length and position"
    grid: PasskeyGrid

    def __init__(self, trained: "Trained", grid: PasskeyGrid, *, lanes: int) -> None:
        prompts = PasskeyPrompts(grid, trained.tokenizer, trained.step_tokens)
        settings = {"wording": grid.wording, "digits": grid.digits, "seed": grid.seed}
        wording = f"-{grid.wording}" if grid.wording != "paper" else ""
        suffix = wording + name_suffix(grid, trained.precision)
        super().__init__(trained, "passkey", suffix, settings, prompts, lanes=lanes)

    def column_name(self, column: tuple[Any, ...]) -> str:
        return f"{column[0]:.3g}"

    def cell_name(self, cell: tuple[Any, ...]) -> str:
        return f"{format_length(cell[0])} at {cell[1]:.3g}"

    def map_texts(self) -> tuple[str, str]:
        what = f"exact match of {self.grid.digits} digits in %, wording {self.grid.wording}"
        return what, "depth of the key (0 start, 1 end)"

    def heading(self, results: dict[str, Any]) -> str:
        return f"wording {results['wording']}, {results['digits']} digits"

    def notes(self, results: dict[str, Any]) -> list[str]:
        found = results["all"]
        share = format_share(found["exact_match"], found["exact_match_95"])
        lines = [f"all: exact {found['exact']}/{found['samples']}, {share}"]
        if results["segment_tokens"]:
            lines.append(
                f"of {results['segment_tokens']} places in a segment the key began at {results['key_phases']}, the"
                f" question at {results['question_phases']}"
            )
        if results["end_tokens_per_s"]:
            lines.append(
                f"{format_length(max(self.grid.lengths_tokens))}: {results['start_tokens_per_s']:,.0f} tokens/s at the"
                f" start, {results['end_tokens_per_s']:,.0f} at the end"
            )
        return lines


# ------------------------------------------------------------------------------------------------------------- command


def add_command(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train eval passkey` its options."""
    description = (
        "Hide a key in filler, ask for it at the end, and let the model write the answer, always the most likely token."
        " Reports exact match of all digits and accuracy of single digits, by length and by the key's depth, with"
        " Wilson's 95 % intervals. Prompts stream through the model in constant memory."
    )
    describe(parser, description, EXAMPLES)
    add_grid(parser, LENGTHS, depths_of="the key in the filler", digits_of="a key")
    parser.add_argument("--positions", action=RenamedOption, dest="depths", new="--depths", nargs="+", metavar="P")
    parser.add_argument(
        "--wording",
        default="paper",
        metavar="NAME",
        help=f"words of filler, key and question: {', '.join(WORDINGS)} (default: %(default)s)",
    )
    add_out(parser, "eval/passkey-STEP", "the answers that are there")
    parser.set_defaults(command=_passkey)


def _passkey(options: argparse.Namespace) -> None:
    grid = PasskeyGrid(**read_grid(options), wording=options.wording)
    run(options, lambda trained: PasskeyTest(trained, grid, lanes=options.lanes))
