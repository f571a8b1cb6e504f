"""A retrieval test as a measurement: its options, lines, tables and heat map. Imports torch late.

Legend: L lengths, C columns of the grid.
"""

import argparse
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from infini_train.command_line import format_length, parse_length, positive, seed
from infini_train.config.errors import ConfigError
from infini_train.eval.measurement import Measurement, add_lanes, add_model
from infini_train.eval.retrieval import (
    RetrievalAnswer,
    RetrievalGrid,
    RetrievalPrompts,
    RetrievalScore,
    answer_prompts,
    score_cells,
    summarise_answers,
)
from infini_train.statistics import format_share

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

    from infini_train.inference.loading import Trained

AnswerT = TypeVar("AnswerT", bound=RetrievalAnswer)
DEPTHS = ("0", "0.5", "1")
INTERVALS = {"exact_match": "exact_interval", "accuracy": "interval", "score": "score_interval"}  # of `RetrievalScore`


class RetrievalTest(Measurement[AnswerT]):
    """Answers to the prompts of a grid, scored cell by cell.

    Args:
        trained, test, suffix, settings: see `Measurement`.
        prompts: of the grid.
        lanes: prompts read side by side.

    Attributes:
        part: what an answer consists of: digit, word.
        places: fields of the answer (with _token) whose phases against the segments are counted, besides the question.
        shows_parts: whether right parts are shown besides exact matches; pointless where an answer has one part.
        exact_title: what the table of exact matches is called.
        joint: between length and column, in lines of progress.
        mapped: what the heat map shows: a name of `INTERVALS`.
        map_name: what TensorBoard calls the heat map.
    """

    file, picture = "answers.jsonl", "heatmap.png"
    part: str
    places: tuple[str, ...] = ()
    shows_parts = True
    exact_title, joint = "exact match", ""
    mapped: str
    map_name: str

    def __init__(
        self,
        trained: "Trained",
        test: str,
        suffix: str,
        settings: dict[str, Any],
        prompts: RetrievalPrompts,
        *,
        lanes: int,
    ) -> None:
        super().__init__(trained, test, suffix, settings)
        self.prompts, self.grid, self.lanes = prompts, prompts.grid, lanes
        self.wanted = {prompt for length in self.grid.lengths_tokens for prompt in self.grid.prompts(length)}
        self.about = {"samples": self.grid.samples, "segment_tokens": trained.config.model.segment_tokens}

    @abstractmethod
    def column_name(self, column: tuple[Any, ...]) -> str:
        """A column in tables and on the heat map."""

    @abstractmethod
    def cell_name(self, cell: Any) -> str:
        """A cell in TensorBoard."""

    @abstractmethod
    def map_texts(self) -> tuple[str, str]:
        """What the heat map shows, in a few words, and what its columns are."""

    @abstractmethod
    def heading(self, results: dict[str, Any]) -> str:
        """What distinguishes this test from others, as the head of its tables."""

    def notes(self, results: dict[str, Any]) -> list[str]:
        """Lines below the tables."""
        return []

    def plan(self, records: Sequence[AnswerT]) -> tuple[list[str], int | None]:
        done = self._done(records)
        there = [f"{len(done)} of {len(self.wanted)} answers were there already"] if done else []
        return there, sum(prompt.length_tokens for prompt in self.wanted - done)

    def measure(self, records: Sequence[AnswerT], on_progress: Callable[[int], object]) -> Iterator[Sequence[AnswerT]]:
        done = self._done(records)
        return answer_prompts(self.trained.model, self.prompts, lanes=self.lanes, done=done, on_progress=on_progress)

    def _done(self, records: Sequence[AnswerT]) -> set[Any]:
        """Prompts of the grid that have answers."""
        return {answer.prompt for answer in records} & self.wanted

    def describe(self, batch: Sequence[AnswerT], records: Sequence[AnswerT]) -> Iterator[str]:
        scores = score_cells(self.grid, records)
        width = max(len(self.column_name(column)) for column in self.grid.columns())
        for cell in dict.fromkeys(answer.cell for answer in batch):
            score = scores[cell]
            if score.samples == self.grid.samples:
                name = f"{format_length(cell[0]):>6} {self.joint}{self.column_name(cell[1:]):<{width}}"
                exact = format_share(score.exact_match, score.exact_interval)
                parts = f"   {self.part}s {format_share(score.accuracy, score.interval)}" * self.shows_parts
                yield f"{name} exact {score.exact}/{score.samples} = {exact}{parts}"

    def summarise(self, records: Sequence[AnswerT]) -> dict[str, Any]:
        own = [answer for answer in records if answer.prompt in self.wanted]
        return summarise_answers(self.grid, own, self.trained.config.model.segment_tokens, self.part, self.places)

    def write(self, records: Sequence[AnswerT], results: dict[str, Any], folder: Path, board: "SummaryWriter") -> None:
        from infini_train.eval.records import save_picture

        scores = score_cells(self.grid, records)
        figure = self._draw(scores)
        save_picture(figure, folder / self.picture)
        prefix, step = f"eval/{self.board_name}", self.trained.step
        for cell, score in scores.items():
            board.add_scalar(f"{prefix}/exact match/{self.cell_name(cell)}", score.exact_match, step)
            if self.shows_parts:
                board.add_scalar(f"{prefix}/{self.part}s/{self.cell_name(cell)}", score.accuracy, step)
        board.add_figure(f"{prefix}/{self.map_name}", figure, step)

    def _draw(self, scores: dict[Any, RetrievalScore]) -> "Figure":
        from infini_train.plots import plot_retrieval

        grid, columns = self.grid, self.grid.columns()
        shape = (len(grid.lengths_tokens), len(columns))
        found = [scores[cell] for cell in grid.cells()]
        share_LC = np.array([getattr(score, self.mapped) for score in found]).reshape(shape)
        interval_LC2 = np.array([getattr(score, INTERVALS[self.mapped]) for score in found]).reshape(*shape, 2)
        what, column_axis = self.map_texts()
        title = f"{self.title}\n{what}\nn = {grid.samples} prompts a cell, 95 % interval below"
        lengths = [format_length(length) for length in grid.lengths_tokens]
        return plot_retrieval(share_LC, interval_LC2, lengths, list(map(self.column_name, columns)), title, column_axis)

    def format(self, results: dict[str, Any]) -> str:
        fields = self.grid.prompt_type._fields[:-1]
        cells = {tuple(cell[name] for name in fields): cell for cell in results["cells"]}
        lengths = [row["length_tokens"] for row in results["lengths"]]
        width = max(len(self.exact_title), *(len(self.column_name(column)) for column in self.grid.columns())) + 1
        lines = [
            f"{results['checkpoint']}, step {results['step']}",
            f"{self.heading(results)}, seed {results['seed']}, {results['samples']} samples a cell; in %, with Wilson's"
            " 95 % interval",
        ]
        rows = {
            self.column_name(column): [cells[(length, *column)] for length in lengths] for column in self.grid.columns()
        }
        rows["all"] = results["lengths"]
        tables = [(self.exact_title, "exact_match"), (f"{self.part}s", f"{self.part}_accuracy")]
        for title, share in tables[: 1 + self.shows_parts]:
            lines += ["", f"{title:<{width}}" + "".join(f"{format_length(length):>18}" for length in lengths)]
            for label, row in rows.items():
                shares = (format_share(cell[share], cell[f"{share}_95"]) for cell in row)
                lines.append(f"{label:<{width}}" + "".join(f"{text:>18}" for text in shares))
        memory = "".join(f"{row['peak_memory_mb']:>18,.0f}" for row in results["lengths"])
        lines += ["", f"{'peak MB':<{width}}{memory}", *self.notes(results)]
        return "\n".join([*lines, f"written to {results['folder']}"])


def name_suffix(grid: RetrievalGrid, precision: str) -> str:
    """The settings that are not the usual ones, as a part of a test's name: -seed1; usually empty."""
    usual = type(grid).__dataclass_fields__
    names = [f"-{grid.digits}digits"] * (grid.digits != usual["digits"].default)
    names += [f"-seed{grid.seed}"] * (grid.seed != usual["seed"].default)
    names += [f"-{precision}"] * (precision != "fp32")
    return "".join(names)


# ------------------------------------------------------------------------------------------------------------- options


def add_lengths(parser: argparse.ArgumentParser, lengths: Sequence[str]) -> None:
    """Gives a parser RUN, the lengths and the other options of every grid; see `read_lengths`."""
    add_model(parser)
    parser.add_argument(
        "--lengths",
        nargs="+",
        default=lengths,
        metavar="N",
        help=f"numbers of tokens of prompt and answer; K is 1024, M is 1024 K (default: {' '.join(lengths)})",
    )
    parser.add_argument(
        "--samples", type=positive, default=10, metavar="N", help="prompts per cell of the grid (default: %(default)s)"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="random seed (default: %(default)s)")
    add_lanes(parser, "prompts")


def read_lengths(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a `RetrievalGrid` that `add_lengths` asks for.

    Raises:
        ConfigError: a length is none.
    """
    lengths_tokens = tuple(map(parse_length, options.lengths))
    return {"lengths_tokens": lengths_tokens, "samples": options.samples, "seed": options.seed}


def add_grid(parser: argparse.ArgumentParser, lengths: Sequence[str], *, depths_of: str, digits_of: str) -> None:
    """Gives a parser the options of grids that have depths and digits; see `read_grid`.

    Args:
        parser: of a retrieval test.
        lengths: the default.
        depths_of: whose depth.
        digits_of: whose digits.
    """
    add_lengths(parser, lengths)
    parser.add_argument(
        "--depths",
        nargs="+",
        default=DEPTHS,
        metavar="P",
        help=f"depths of {depths_of}: 0 start, 1 end; one whole number N above 1: N depths, evenly spaced from start to"
        f" end (default: {' '.join(DEPTHS)})",
    )
    parser.add_argument(
        "--digits",
        type=positive,
        default=5,
        metavar="N",
        help=f"digits of {digits_of} (default: %(default)s)",
    )


def read_grid(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a `RetrievalGrid` that `add_grid` asks for.

    Raises:
        ConfigError: a length or a depth is none.
    """
    return {**read_lengths(options), "depths": parse_depths(options.depths), "digits": options.digits}


def parse_depths(texts: Sequence[str]) -> tuple[float, ...]:
    """Depths from 0 to 1; one whole number N above 1 stands for N evenly spaced depths."""
    try:
        values = tuple(map(float, texts))
    except ValueError as error:
        raise ConfigError(f"--depths: {' '.join(texts)}: write numbers from 0 (start) to 1 (end)") from error
    if len(texts) == 1 and texts[0].isdecimal() and int(texts[0]) > 1:
        count = int(texts[0])
        return tuple(place / (count - 1) for place in range(count))
    return values
