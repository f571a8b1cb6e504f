"""The life of every long measurement: its options, resume from records, batch by batch, then results and pictures.

Imports torch late, so that a command's help and its mistakes come at once.
"""

import argparse
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from infini_train.command_line import Spinner, add_device, path, positive
from infini_train.config.errors import ConfigError, naming
from infini_train.data.shard_file import strict_json
from infini_train.logs import progress_bar

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from infini_train.inference.loading import Trained

RESULTS = "results.json"
LOG = logging.getLogger(__name__)
RecordT = TypeVar("RecordT")  # a dataclass whose fields are plain values


class Measurement(ABC, Generic[RecordT]):
    """What distinguishes one measurement from another.

    Args:
        trained: the model.
        test: what is measured, such as passkey; its results lie in eval/TEST-STEP of the run.
        suffix: what distinguishes it from the usual one, with a dash before; follows the step.
        settings: what the records depend on, besides the checkpoint, the precision, and what they say themselves.

    Attributes:
        file: name of the records' file.
        record: dataclass of a record.
        about: what `results.json` says besides, before the measured values.
    """

    file: str
    record: type[RecordT]
    about: dict[str, Any]

    def __init__(self, trained: "Trained", test: str, suffix: str, settings: dict[str, Any]) -> None:
        from infini_train.eval.records import hash_checkpoint

        self.trained = trained
        if trained.without:
            suffix += f"-without-{'-'.join(trained.without)}".replace(":", "")
        self.folder_name, self.board_name = f"{test}-{trained.step}{suffix}", f"{test}{suffix}"
        self.settings = {
            "checkpoint_sha256": hash_checkpoint(trained.checkpoint),
            **settings,
            "precision": trained.precision,
            **({"without": list(trained.without)} if trained.without else {}),
        }

    @property
    def title(self) -> str:
        """First line of pictures: the run and the step."""
        from infini_train.eval.records import find_home

        without = f", without {', '.join(self.trained.without)}" if self.trained.without else ""
        return f"{find_home(self.trained.checkpoint).name}, step {self.trained.step}{without}"

    @abstractmethod
    def plan(self, records: Sequence[RecordT]) -> tuple[list[str], int | None]:
        """Lines about what is there already, and how many tokens are still to be read, if that is known."""

    @abstractmethod
    def measure(self, records: Sequence[RecordT], on_progress: Callable[[int], object]) -> Iterator[Sequence[RecordT]]:
        """The records that are missing, a batch at a time; `on_progress` is called with tokens read."""

    @abstractmethod
    def describe(self, batch: Sequence[RecordT], records: Sequence[RecordT]) -> Iterator[str]:
        """Lines about a batch, which `records` holds already."""

    @abstractmethod
    def summarise(self, records: Sequence[RecordT]) -> dict[str, Any]:
        """The measured values as plain values; records of a larger measurement may be among them."""

    @abstractmethod
    def write(self, records: Sequence[RecordT], results: dict[str, Any], folder: Path, board: "SummaryWriter") -> None:
        """Pictures and texts into the folder, scalars onto the board."""

    @abstractmethod
    def format(self, results: dict[str, Any]) -> str:
        """The results as tables for a person."""


def run_measurement(
    measurement: Measurement[RecordT],
    *,
    out: Path | None = None,
    overwrite: bool = False,
    report: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Measures what is still missing, writes everything, and returns the results as plain values.

    Args:
        measurement: of a trained model.
        out: folder for everything; default: eval/ of the run's folder, and its tensorboard/eval/.
        overwrite: drop the records that are there.
        report: called with a line for every part that is done.

    Raises:
        ConfigError: `out` holds another measurement, or as the measurement's constructor.
    """
    from torch.utils.tensorboard import SummaryWriter

    from infini_train.atomic_files import write_atomic
    from infini_train.eval.records import RecordFile, find_home

    trained = measurement.trained
    home = find_home(trained.checkpoint)
    folder = out or home / "eval" / measurement.folder_name
    file = RecordFile(folder / measurement.file, measurement.record, measurement.settings, overwrite=overwrite)
    there, total = measurement.plan(file.records)
    for line in there:
        report(line)
    with progress_bar(total=total, unit="tok", unit_scale=True) as bar:
        for batch in measurement.measure(tuple(file.records), bar.update):
            file.append(batch)
            for line in measurement.describe(batch, file.records):
                with bar.external_write_mode():
                    report(line)
    with Spinner("writing results"):
        results = {
            "checkpoint": str(trained.checkpoint),
            "step": trained.step,
            **measurement.settings,
            **measurement.about,
            "folder": str(folder),
            **measurement.summarise(file.records),
        }
        write_atomic(folder / RESULTS, json.dumps(strict_json(results), indent=1) + "\n")
        # A folder of its own: TensorBoard follows only the newest file of a folder, and training may still be writing.
        with SummaryWriter(str((out or home) / "tensorboard" / "eval")) as board:
            measurement.write(file.records, results, folder, board)
    return results


# ------------------------------------------------------------------------------------------------------------ commands


def add_model(parser: argparse.ArgumentParser) -> None:
    """Gives a parser RUN, --precision, --device, --without and --json."""
    parser.add_argument(
        "model", type=path, metavar="RUN", help="a run's folder (its newest checkpoint) or one checkpoint"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="precision of weights and activations (default: %(default)s)",
    )
    add_device(parser)
    parser.add_argument(
        "--without",
        nargs="+",
        metavar="PART",
        help="leave out a part of the attention, to see what it is worth: memory, local or convolution, in all layers"
        " or in one (memory:3; default: nothing)",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")


def add_lanes(parser: argparse.ArgumentParser, what: str) -> None:
    """Gives a parser --lanes of prompts, books or whatever is read."""
    parser.add_argument(
        "--lanes",
        type=positive,
        default=8,
        metavar="N",
        help=f"number of {what} read side by side (default: %(default)s)",
    )


def add_out(parser: argparse.ArgumentParser, folder: str, dropped: str | None = None) -> None:
    """Gives a parser --out with its default `folder`, and --overwrite if there is anything that can be `dropped`."""
    parser.add_argument(
        "--out",
        type=path,
        metavar="DIR",
        help=f"folder for all results (default: {folder} and tensorboard/eval of the run)",
    )
    if dropped is not None:
        parser.add_argument("--overwrite", action="store_true", help=f"drop {dropped}")


def check_folder(out: Path | None) -> None:
    """Checks that results can go there.

    Raises:
        ConfigError: it is a file.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--out: {out} is a file; name a folder")


def load(options: argparse.Namespace) -> "Trained":
    """The model of a command; readies this process for torch, which may be imported from here on.

    Raises:
        ConfigError: there is none, or --out is a file.
    """
    check_folder(getattr(options, "out", None))
    with Spinner(f"loading {options.model}"):
        from infini_train.parallel import device

        device.prepare(options.device)
        from infini_train.inference.loading import open_trained
        from infini_train.model.ablation import leave_out, parse_parts

        without = options.without or []
        with naming("--without"):
            parts = parse_parts(without)
        trained = open_trained(options.model, options.precision)
        with naming("--without"):
            leave_out(trained.model, parts)
        return trained._replace(without=tuple(sorted(set(without))))


def run(options: argparse.Namespace, choose: Callable[["Trained"], Measurement[Any]]) -> None:
    """Runs the measurement of a command, and prints its results.

    Args:
        options: of the command: model, precision, out, overwrite, json.
        choose: makes the measurement of a model.
    """
    from infini_train.inference.growth import warn_of_growth

    trained = load(options)
    warn_of_growth(trained.config.model, trained.precision)
    with Spinner("preparing"):
        measurement = choose(trained)
    results = run_measurement(
        measurement,
        out=options.out,
        overwrite=options.overwrite,
        report=LOG.info,
    )
    print(json.dumps(strict_json(results)) if options.json else f"\n{measurement.format(results)}")
