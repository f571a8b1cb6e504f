"""A needle test of a trained model as a measurement, and its results as tables and picture."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from infini_train.data.synthetic.haystack import HAYSTACKS
from infini_train.data.synthetic.needles import ONE_ASKED
from infini_train.eval.heatmap import plot_recall
from infini_train.eval.intervals import format_share
from infini_train.eval.loading import Trained
from infini_train.eval.measurement import GridMeasurement
from infini_train.eval.needle_scores import NeedleAnswer, NeedleCell, NeedleGrid
from infini_train.eval.needles import NeedlePrompts, answer_needles
from infini_train.eval.passkey_scores import format_length
from infini_train.eval.reading import segment_of
from infini_train.eval.scores import Score, summarise


def name_test(grid: NeedleGrid, precision: str) -> str:
    """Of the test's folder, behind the step: multikey-varied, multikey-prose-seed1."""
    hay = grid.haystack if grid.haystack in HAYSTACKS else "prose"
    usual = NeedleGrid(task=grid.task, lengths_tokens=(1,))
    kinds = [f"-{grid.digits}digits"] * (grid.digits != usual.digits)
    kinds += [f"-seed{grid.seed}"] * (grid.seed != usual.seed)
    kinds += [f"-{precision}"] * (precision != "fp32")
    return f"{grid.task}-{hay}{''.join(kinds)}"


class NeedleTest(GridMeasurement[NeedleAnswer]):
    """Answers to a grid of prompts with several hidden things.

    Args:
        trained: the model.
        grid: which prompts.
        lanes: prompts read side by side.

    Raises:
        ConfigError: the tokenizer, the haystack or a length does not do.
    """

    record, part, figure_name = NeedleAnswer, "word", "words by length and needles"
    grid: NeedleGrid

    def __init__(self, trained: Trained, grid: NeedleGrid, *, lanes: int) -> None:
        self.texts = NeedlePrompts(grid, trained.tokenizer, segment_of(trained.model))
        is_prose = grid.haystack not in HAYSTACKS
        settings = {
            "task": grid.task,
            "haystack": "prose" if is_prose else grid.haystack,
            "haystack_sha256": hashlib.sha256(Path(grid.haystack).read_bytes()).hexdigest() if is_prose else None,
            "digits": grid.digits,
            "seed": grid.seed,
        }
        super().__init__(trained, "needles", f"-{name_test(grid, trained.precision)}", settings, grid)
        self.lanes = lanes

    def plan(self, records: Sequence[NeedleAnswer]) -> tuple[list[str], int | None]:
        """See `Measurement.plan`; and whether prose comes again."""
        there, total = super().plan(records)
        prose_tokens = self.texts.source.prose_tokens
        if prose_tokens is not None and prose_tokens < max(self.grid.lengths_tokens):
            there.insert(0, f"the haystack has {prose_tokens:,} tokens; longer prompts meet parts of it again")
        return there, total

    def measure(
        self, records: Sequence[NeedleAnswer], on_progress: Callable[[int], object]
    ) -> Iterator[Sequence[NeedleAnswer]]:
        """See `Measurement.measure`."""
        done = self.done(records)
        return answer_needles(self.trained.model, self.texts, lanes=self.lanes, done=done, on_progress=on_progress)

    def summarise(self, records: Sequence[NeedleAnswer]) -> dict[str, Any]:
        """See `Measurement.summarise`."""
        return summarise(self.grid, self.own(records), self.trained.config.model.segment_tokens, "word", ())

    def cell_line(self, cell: NeedleCell, score: Score) -> str:
        """See `GridMeasurement.cell_line`."""
        return cell_line(self.grid, cell, score)

    def cell_name(self, cell: NeedleCell) -> str:
        """See `GridMeasurement.cell_name`."""
        return f"{format_length(cell.length_tokens)}, {cell.needles} at {cell.depth:.3g}"

    def draw(self, scores: dict[NeedleCell, Score]) -> Figure:
        """See `GridMeasurement.draw`."""
        grid, columns = self.grid, self.grid.columns()
        found = [scores[cell] for cell in grid.cells()]
        shape = (len(grid.lengths_tokens), len(columns))
        share_LP = np.array([score.accuracy for score in found]).reshape(shape)
        interval_LP2 = np.array([score.interval for score in found]).reshape(*shape, 2)
        hay = grid.haystack if grid.haystack in HAYSTACKS else "prose"
        note = f"{grid.task} in {hay} hay: right words in %\nn = {grid.samples} prompts a cell, 95 % interval below"
        lengths, names = map(format_length, grid.lengths_tokens), (_name_column(grid, *column) for column in columns)
        axis = "needles at the depth of the asked one" if grid.task in ONE_ASKED else "needles"
        return plot_recall(share_LP, interval_LP2, list(lengths), list(names), f"{self.title}\n{note}", axis)


def cell_line(grid: NeedleGrid, cell: NeedleCell, score: Score) -> str:
    """What one cell came to, in a line."""
    return (
        f"{format_length(cell.length_tokens):>6} {_name_column(grid, cell.needles, cell.depth):<16} exact"
        f" {score.exact}/{score.samples} = {format_share(score.exact_match, score.exact_interval)}"
        f"   words {format_share(score.accuracy, score.interval)}"
    )


def _name_column(grid: NeedleGrid, needles: int, depth: float) -> str:
    """Of one length: 4 at 0.5; 4 where all of them matter."""
    return f"{needles} at {depth:.3g}" if grid.task in ONE_ASKED else f"{needles}"


def format_results(grid: NeedleGrid, results: dict[str, Any]) -> str:
    """Two tables in percent, a column a length and a row a number of needles and depth."""
    cells = {(cell["length_tokens"], cell["needles"], cell["depth"]): cell for cell in results["cells"]}
    lengths = [length["length_tokens"] for length in results["lengths"]]
    lines = [
        f"{results['checkpoint']}, step {results['step']}",
        f"{grid.task} in {results['haystack']} hay, {grid.digits} digits, seed {grid.seed}, {grid.samples} samples a"
        " cell; in %, with Wilson's 95 % interval",
    ]
    for title, share in (("all words right", "exact_match"), ("words", "word_accuracy")):
        lines += ["", f"{title:<16}" + "".join(f"{format_length(length):>18}" for length in lengths)]
        rows = [
            (_name_column(grid, *column), [cells[(length, *column)] for length in lengths]) for column in grid.columns()
        ]
        rows.append(("all", results["lengths"]))
        for label, row in rows:
            lines.append(f"{label:<16}" + "".join(f"{format_share(c[share], c[f'{share}_95']):>18}" for c in row))
    memory = "".join(f"{length['peak_memory_mb']:>18,.0f}" for length in results["lengths"])
    return "\n".join([*lines, "", f"{'peak MB':<16}{memory}", f"written to {results['folder']}"])
