"""What the commands of `infini-train eval` share: options of measurements, and how one is run. Imports torch late."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infini_train.command_line import positive
from infini_train.config.errors import ConfigError

if TYPE_CHECKING:
    from infini_train.eval.loading import Trained
    from infini_train.eval.measurement import Measurement


def add_lanes(parser: argparse.ArgumentParser, what: str) -> None:
    """Gives a parser --lanes of prompts, books or whatever is read."""
    parser.add_argument(
        "--lanes", type=positive, default=8, metavar="N", help=f"{what} read side by side (default: %(default)s)"
    )


def add_out(parser: argparse.ArgumentParser, folder: str, dropped: str | None = None) -> None:
    """Gives a parser --out with its default `folder`, and --overwrite if there is anything that can be `dropped`."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"folder for everything (default: {folder} and tensorboard/eval of the run)",
    )
    if dropped is not None:
        parser.add_argument("--overwrite", action="store_true", help=f"drop {dropped}")


def check_folder(out: Path | None) -> None:
    """Whether results can go there.

    Raises:
        ConfigError: it is a file.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--out: {out} is a file; name a folder")


def prepare(options: argparse.Namespace) -> None:
    """Checks --out, and readies this process for torch, which may be imported from here on."""
    check_folder(getattr(options, "out", None))
    from infini_train.parallel import device

    device.prepare()


def run(
    options: argparse.Namespace,
    choose: Callable[["Trained"], "Measurement[Any]"],
    show: Callable[[dict[str, Any]], str],
) -> None:
    """Runs the measurement that a model is given, and prints what was found.

    Args:
        options: of the command: model, precision, out, overwrite, json.
        choose: makes the measurement.
        show: its results as text.
    """
    from infini_train.eval.loading import open_trained
    from infini_train.eval.measurement import run_measurement

    results = run_measurement(
        choose(open_trained(options.model, options.precision)),
        out=options.out,
        overwrite=options.overwrite,
    )
    print(json.dumps(results) if options.json else f"\n{show(results)}")
