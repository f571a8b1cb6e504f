"""How the gates of a run moved: the picture of its metrics. Loads no model."""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from infini_train.config.errors import ConfigError
from infini_train.eval.curves import plot_gates
from infini_train.eval.records import save_picture

METRICS, PICTURE = "metrics.jsonl", "gates.png"
NAMES = ("gates/mean", "gates/lowest", "gates/highest", "gates/local", "gates/mixed", "gates/memory")


def read_gates(run: Path) -> list[dict[str, Any]]:
    """The steps of a run's metrics that tell its gates, each with `step` and `NAMES`.

    Raises:
        ConfigError: the run has no metrics, or they tell nothing of the shares.
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
        raise ConfigError(
            f"{path}: tells nothing of gates; they are written every log.memory_every_steps by runs with"
            " model.attention.kind infini or memorizing"
        )
    return found


def report_gates(run: Path, out: Path | None = None) -> dict[str, Any]:
    """Draws the gates over training, and returns the last of them as plain values.

    Args:
        run: its folder.
        out: folder for picture and TensorBoard; default: eval/ of the run, and its tensorboard/eval/.

    Raises:
        ConfigError: the metrics tell nothing of gates.
    """
    rows = read_gates(run)
    last = rows[-1]
    figure = plot_gates(rows, f"{run.resolve().name}, to step {last['step']}")
    path = (out or run / "eval") / PICTURE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(figure, path)
    with SummaryWriter(str((out or run) / "tensorboard" / "eval")) as board:
        board.add_figure("eval/gates over training", figure, last["step"])
    return {**last, "steps_with_gates": len(rows), "picture": str(path)}
