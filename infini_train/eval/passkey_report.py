"""A passkey test of a trained model as a measurement, and its results as tables and picture."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from infini_train.config.errors import ConfigError
from infini_train.data.synthetic.passkey import PasskeyWriter
from infini_train.data.synthetic.wordings import find_wording
from infini_train.eval.heatmap import plot_recall
from infini_train.eval.intervals import format_share
from infini_train.eval.loading import Trained
from infini_train.eval.measurement import GridMeasurement
from infini_train.eval.passkey import answer_grid
from infini_train.eval.passkey_scores import Answer, PasskeyCell, PasskeyGrid, format_length
from infini_train.eval.scores import Score, summarise


def name_kind(grid: PasskeyGrid, precision: str) -> str:
    """The part of a test's name that tells it from the usual one: -harbour-seed1; usually empty."""
    usual = PasskeyGrid(lengths_tokens=(1,), positions=(0.0,))
    kinds = [f"-{grid.wording}"] * (grid.wording != usual.wording)
    kinds += [f"-{grid.digits}digits"] * (grid.digits != usual.digits)
    kinds += [f"-seed{grid.seed}"] * (grid.seed != usual.seed)
    kinds += [f"-{precision}"] * (precision != "fp32")
    return "".join(kinds)


def check_grid(grid: PasskeyGrid, writer: PasskeyWriter) -> None:
    """Whether the prompts fit into the lengths.

    Raises:
        ConfigError: one does not.
    """
    needed, shortest = writer.min_tokens + 1, min(grid.lengths_tokens)
    if shortest < needed:
        what = f"wording {grid.wording} with {grid.digits} digits takes {needed} tokens without any filler"
        raise ConfigError(f"--lengths: {shortest} tokens can't hold the prompt; {what}")


class PasskeyTest(GridMeasurement[Answer]):
    """Answers to a grid of prompts with a hidden key.

    Args:
        trained: the model.
        grid: which prompts.
        lanes: prompts read side by side.

    Raises:
        ConfigError: the tokenizer or a length does not do.
    """

    record, part, figure_name = Answer, "digit", "exact match by length and position"
    grid: PasskeyGrid

    def __init__(self, trained: Trained, grid: PasskeyGrid, *, lanes: int) -> None:
        self.writer = PasskeyWriter(trained.tokenizer, find_wording(grid.wording), grid.digits)
        check_grid(grid, self.writer)
        settings = {"wording": grid.wording, "digits": grid.digits, "seed": grid.seed}
        super().__init__(trained, "passkey", name_kind(grid, trained.precision), settings, grid)
        self.lanes = lanes

    def measure(self, records: Sequence[Answer], on_progress: Callable[[int], object]) -> Iterator[Sequence[Answer]]:
        """See `Measurement.measure`."""
        model, bos_id = self.trained.model, self.trained.tokenizer.bos_id
        return answer_grid(
            model,
            self.writer,
            self.grid,
            bos_id,
            lanes=self.lanes,
            done=self.done(records),
            on_progress=on_progress,
        )

    def summarise(self, records: Sequence[Answer]) -> dict[str, Any]:
        """See `Measurement.summarise`."""
        return summarise(self.grid, self.own(records), self.trained.config.model.segment_tokens)

    def cell_line(self, cell: PasskeyCell, score: Score) -> str:
        """See `GridMeasurement.cell_line`."""
        return cell_line(*cell, score)

    def cell_name(self, cell: PasskeyCell) -> str:
        """See `GridMeasurement.cell_name`."""
        return f"{format_length(cell.length_tokens)} at {cell.position:.3g}"

    def draw(self, scores: dict[PasskeyCell, Score]) -> Figure:
        """See `GridMeasurement.draw`."""
        grid = self.grid
        shape = (len(grid.lengths_tokens), len(grid.positions))
        found = [scores[cell] for cell in grid.cells()]
        share_LP = np.array([score.exact_match for score in found]).reshape(shape)
        interval_LP2 = np.array([score.exact_interval for score in found]).reshape(*shape, 2)
        what = f"exact match of {grid.digits} digits in %, wording {grid.wording}"
        note = f"{what}\nn = {grid.samples} a cell, 95 % interval below"
        lengths, positions = map(format_length, grid.lengths_tokens), (f"{place:.3g}" for place in grid.positions)
        return plot_recall(share_LP, interval_LP2, list(lengths), list(positions), f"{self.title}\n{note}")


def cell_line(length_tokens: int, position: float, score: Score) -> str:
    """What one cell came to, in a line."""
    digits = format_share(score.accuracy, score.interval)
    return (
        f"{format_length(length_tokens):>6} at {position:<5.3g} exact {score.exact}/{score.samples} ="
        f" {format_share(score.exact_match, score.exact_interval)}   digits {digits}"
    )


def format_results(results: dict[str, Any]) -> str:
    """Two tables in percent, a column a length and a row a position, and what was measured beside."""
    cells = {(cell["length_tokens"], cell["position"]): cell for cell in results["cells"]}
    lengths = [length["length_tokens"] for length in results["lengths"]]
    lines = [
        f"{results['checkpoint']}, step {results['step']}",
        f"wording {results['wording']}, {results['digits']} digits, seed {results['seed']},"
        f" {results['samples']} samples a cell; in %, with Wilson's 95 % interval",
    ]
    for title, share in (("exact match", "exact_match"), ("digits", "digit_accuracy")):
        lines += ["", f"{title:<12}" + "".join(f"{format_length(length):>18}" for length in lengths)]
        rows = [(f"{position:.3g}", position) for position in dict.fromkeys(place for _, place in cells)]
        for label, position in rows:
            row = [cells[length, position] for length in lengths]
            lines.append(f"{label:<12}" + "".join(f"{format_share(c[share], c[f'{share}_95']):>18}" for c in row))
        whole = "".join(f"{format_share(c[share], c[f'{share}_95']):>18}" for c in results["lengths"])
        lines.append(f"{'all':<12}{whole}")
    memory = "".join(f"{length['peak_memory_mb']:>18,.0f}" for length in results["lengths"])
    found = results["all"]
    lines += [
        "",
        f"{'peak MB':<12}{memory}",
        f"all: exact {found['exact']}/{found['samples']},"
        f" {format_share(found['exact_match'], found['exact_match_95'])}",
    ]
    if results["segment_tokens"]:
        lines.append(
            f"of {results['segment_tokens']} places in a segment the key began at {results['key_phases']}, the question"
            f" at {results['question_phases']}"
        )
    if results["end_tokens_per_s"]:
        lines.append(
            f"{format_length(lengths[-1])}: {results['start_tokens_per_s']:,.0f} tokens/s at the start,"
            f" {results['end_tokens_per_s']:,.0f} at the end"
        )
    return "\n".join([*lines, f"written to {results['folder']}"])
