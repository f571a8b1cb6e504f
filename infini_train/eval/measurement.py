"""The life of every long measurement: resume from records, go on batch by batch, then results, pictures, scalars."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from infini_train.atomic_files import write_atomic
from infini_train.eval.loading import Trained
from infini_train.eval.records import RecordFile, find_home, hash_checkpoint, save_picture
from infini_train.eval.scores import Grid, score_cells

LOG = logging.getLogger(__name__)
RESULTS = "results.json"
RecordT = TypeVar("RecordT")  # a dataclass whose fields are plain values


class Measurement(ABC, Generic[RecordT]):
    """What tells one measurement from another.

    Args:
        trained: the model.
        test: what is measured, such as passkey; its results lie in eval/TEST-STEP of the run.
        variant: what tells it from the usual one, with a dash before; behind the step.
        settings: what the records depend on, besides the checkpoint, the precision, and what they say themselves.

    Attributes:
        file: name of the records' file.
        record: dataclass of a record.
        about: what `results.json` says besides, before the measured values.
    """

    file: str
    record: type[RecordT]
    about: dict[str, Any]

    def __init__(self, trained: Trained, test: str, variant: str, settings: dict[str, Any]) -> None:
        self.trained = trained
        self.folder_name, self.board_name = f"{test}-{trained.step}{variant}", f"{test}{variant}"
        self.settings = {
            "checkpoint_sha256": hash_checkpoint(trained.checkpoint),
            **settings,
            "precision": trained.precision,
        }

    @property
    def title(self) -> str:
        """Of pictures."""
        return f"{find_home(self.trained.checkpoint).name}, step {self.trained.step}"

    @abstractmethod
    def plan(self, records: Sequence[RecordT]) -> tuple[list[str], int | None]:
        """Lines about what is there already, and how many tokens are still to be read, if that is known."""

    @abstractmethod
    def measure(self, records: Sequence[RecordT], on_progress: Callable[[int], object]) -> Iterator[Sequence[RecordT]]:
        """The records that are missing, a batch at a time; `on_progress` is called with tokens read."""

    @abstractmethod
    def tell(self, batch: Sequence[RecordT], records: Sequence[RecordT]) -> Iterator[str]:
        """Lines about a batch, which `records` holds already."""

    @abstractmethod
    def summarise(self, records: Sequence[RecordT]) -> dict[str, Any]:
        """What all amounts to, as plain values; records of a larger measurement may be among them."""

    @abstractmethod
    def write(self, records: Sequence[RecordT], results: dict[str, Any], folder: Path, board: SummaryWriter) -> None:
        """Pictures and texts into the folder, scalars onto the board."""


def run_measurement(
    measurement: Measurement[RecordT],
    *,
    out: Path | None = None,
    overwrite: bool = False,
    say: Callable[[str], object] = LOG.info,
) -> dict[str, Any]:
    """Measures what is still missing, writes everything, and returns the results as plain values.

    Args:
        measurement: of a trained model.
        out: folder for everything; default: eval/ of the run's folder, and its tensorboard/eval/.
        overwrite: drop the records that are there.
        say: called with a line for every part that is done.

    Raises:
        ConfigError: `out` holds another measurement, or as the measurement's constructor.
    """
    trained = measurement.trained
    home = find_home(trained.checkpoint)
    folder = out or home / "eval" / measurement.folder_name
    file = RecordFile(folder / measurement.file, measurement.record, measurement.settings, overwrite=overwrite)
    there, total = measurement.plan(file.records)
    for line in there:
        say(line)
    with tqdm(total=total, unit="tok", unit_scale=True, leave=False, disable=None, dynamic_ncols=True) as bar:
        for batch in measurement.measure(tuple(file.records), bar.update):
            file.append(batch)
            for line in measurement.tell(batch, file.records):
                with bar.external_write_mode():
                    say(line)
    results = {
        "checkpoint": str(trained.checkpoint),
        "step": trained.step,
        **measurement.settings,
        **measurement.about,
        "folder": str(folder),
        **measurement.summarise(file.records),
    }
    write_atomic(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    # A folder of its own: TensorBoard follows only the newest file of a folder, and training may still be writing.
    with SummaryWriter(str((out or home) / "tensorboard" / "eval")) as board:
        measurement.write(file.records, results, folder, board)
    return results


class GridMeasurement(Measurement[RecordT]):
    """Answers to the prompts of a grid, scored cell by cell. Records are answers with `prompt` and `cell`."""

    file = "answers.jsonl"
    picture = "heatmap.png"
    part: str  # what an answer consists of: digit, word
    figure_name: str  # on the board

    def __init__(self, trained: Trained, test: str, variant: str, settings: dict[str, Any], grid: Grid) -> None:
        super().__init__(trained, test, variant, settings)
        self.grid = grid
        self.prompts = {prompt for length in grid.lengths_tokens for prompt in grid.prompts(length)}
        self.about = {"samples": grid.samples, "segment_tokens": trained.config.model.segment_tokens}

    def done(self, records: Sequence[Any]) -> set[Any]:
        """Prompts of the grid that have answers."""
        return {answer.prompt for answer in records} & self.prompts

    def own(self, records: Sequence[Any]) -> list[Any]:
        """Answers to prompts of the grid."""
        return [answer for answer in records if answer.prompt in self.prompts]

    def plan(self, records: Sequence[RecordT]) -> tuple[list[str], int | None]:
        """See `Measurement.plan`."""
        done = self.done(records)
        there = [f"{len(done)} of {len(self.prompts)} answers were there already"] if done else []
        return there, sum(prompt.length_tokens for prompt in self.prompts - done)

    def tell(self, batch: Sequence[Any], records: Sequence[Any]) -> Iterator[str]:
        """See `Measurement.tell`: each cell when its last answer is there."""
        scores = score_cells(self.grid, records)
        for cell in dict.fromkeys(answer.cell for answer in batch):
            if scores[cell].samples == self.grid.samples:
                yield self.cell_line(cell, scores[cell])

    def write(self, records: Sequence[Any], results: dict[str, Any], folder: Path, board: SummaryWriter) -> None:
        """See `Measurement.write`."""
        scores = score_cells(self.grid, records)
        figure = self.draw(scores)
        save_picture(figure, folder / self.picture)
        prefix, step = f"eval/{self.board_name}", self.trained.step
        for cell, score in scores.items():
            board.add_scalar(f"{prefix}/exact match/{self.cell_name(cell)}", score.exact_match, step)
            board.add_scalar(f"{prefix}/{self.part}s/{self.cell_name(cell)}", score.accuracy, step)
        board.add_figure(f"{prefix}/{self.figure_name}", figure, step)

    @abstractmethod
    def cell_line(self, cell: Any, score: Any) -> str:
        """What one cell came to, in a line."""

    @abstractmethod
    def cell_name(self, cell: Any) -> str:
        """On the board."""

    @abstractmethod
    def draw(self, scores: dict[Any, Any]) -> Figure:
        """The grid's heat map."""
