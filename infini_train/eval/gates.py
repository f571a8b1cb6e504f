"""`infini-train eval gates`: how the gates of a run moved, from its metrics. Loads no model, and imports torch late."""

import argparse
import json
from pathlib import Path
from typing import Any

from infini_train.command_line import Spinner, describe, path
from infini_train.config.attention import KINDS
from infini_train.config.errors import ConfigError
from infini_train.data.shard_file import strict_json
from infini_train.eval.measurement import add_out, check_folder

METRICS, PICTURE = "metrics.jsonl", "gates.png"
NAMES = ("gates/mean", "gates/lowest", "gates/highest", "gates/local", "gates/mixed", "gates/memory")
EXAMPLES = """\
examples:
  infini-train eval gates runs/books
"""


def read_gates(run: Path) -> list[dict[str, Any]]:
    """The steps of a run's metrics that have its gates, each with `step` and `NAMES`.

    Raises:
        ConfigError: the run has no metrics, or they hold no gates.
    """
    path = run / METRICS
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; name the folder of a run")
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError):
            continue  # the last line of a process that was killed
        if all(isinstance(row.get(name), float | int) for name in ("step", *NAMES)):
            found.append({name: row[name] for name in ("step", *NAMES)})
    if not found:
        gated = " or ".join(kind for kind, variant in KINDS.items() if variant.has_gates)
        raise ConfigError(
            f"{path}: holds no gates; they are written every log.memory_every_steps by runs with"
            f" model.attention.kind {gated}"
        )
    return found


def report_gates(run: Path, out: Path | None = None) -> dict[str, Any]:
    """Draws the gates over training, and returns the last of them as plain values.

    Args:
        run: its folder.
        out: folder for picture and TensorBoard; default: eval/ of the run, and its tensorboard/eval/.

    Raises:
        ConfigError: the metrics hold no gates.
    """
    rows = read_gates(run)
    from torch.utils.tensorboard import SummaryWriter

    from infini_train.eval.records import save_picture
    from infini_train.plots import plot_gate_history

    last = rows[-1]
    figure = plot_gate_history(rows, f"{run.resolve().name}, to step {last['step']}")
    path = (out or run / "eval") / PICTURE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(figure, path)
    with SummaryWriter(str((out or run) / "tensorboard" / "eval")) as board:
        board.add_figure("eval/gates over training", figure, last["step"])
    return {**last, "steps_with_gates": len(rows), "picture": str(path)}


def add_command(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train eval gates` its options."""
    description = (
        "Show the gates over training, from the run's metrics: share of heads that became local (gate below 0.1) or"
        " read the memory (above 0.9), mean, lowest and highest; as a picture and in TensorBoard."
    )
    describe(parser, description, EXAMPLES)
    parser.add_argument("model", type=path, metavar="RUN", help="a run's folder")
    add_out(parser, "eval/")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.set_defaults(command=_gates)


def _gates(options: argparse.Namespace) -> None:
    check_folder(options.out)
    with Spinner("drawing the gates"):
        found = report_gates(options.model, options.out)
    if options.json:
        print(json.dumps(strict_json(found)))
        return
    for name, value in found.items():
        print(f"{name:<18}{f'{value:.4f}' if isinstance(value, float) else value}")
