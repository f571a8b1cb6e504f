"""Metrics of a run: the console line, metrics.jsonl and TensorBoard, continued across restarts without overlap.

Legend: L layers with gates, H query heads.
"""

import contextlib
import json
import math
import os
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from infini_train.atomic_files import replacing
from infini_train.config.files import dump
from infini_train.config.model import ModelConfig
from infini_train.logs import is_quiet
from infini_train.model.variants import mixer_class
from infini_train.regular_files import open_own, open_regular
from infini_train.train.board import Board
from infini_train.train.session import Session
from infini_train.train.side_files import Lines

MEMORY = "Memory of the model"  # a page of charts
MAX_LINE_BYTES = 2**20
LOCAL_BELOW, MEMORY_ABOVE = 0.1, 0.9  # gates of specialised heads
CHARTS: dict[str, dict[str, list[Any]]] = {
    "Learning": {
        "loss, training and validation": [
            "Multiline",
            ["loss/train", "loss/validation", "loss/validation_without_memory", "loss/unigram_entropy"],
        ],
        "bits per byte": ["Multiline", ["bits_per_byte/train", "bits_per_byte/validation"]],
        "learning rates": ["Multiline", ["lr/matrices", "lr/gates"]],
        "gradient norm": ["Multiline", ["grad_norm"]],
    },
    "Speed": {
        "tokens per second": ["Multiline", ["speed/tokens_per_s"]],
        "model FLOP utilisation": ["Multiline", ["speed/mfu"]],
        "parts of a step (s)": [
            "Multiline",
            ["seconds/data", "seconds/wait", "seconds/forward", "seconds/backward", "seconds/optimizer"],
        ],
    },
    MEMORY: {
        "gates: mean, lowest, highest": ["Margin", ["gates/mean", "gates/lowest", "gates/highest"]],
        "share of heads: local, mixed, memory": ["Multiline", ["gates/local", "gates/mixed", "gates/memory"]],
    },
}


def tensorboard_layout(model: ModelConfig) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's custom scalars: `CHARTS`, and one for each figure of the model's states that has a title."""
    figures = {figure for variant in model.layers for figure in mixer_class(variant).figures if figure.title}
    charts = {figure.title: ["Multiline", [f"memory/{figure.name}/.*"]] for figure in sorted(figures)}
    return {**CHARTS, MEMORY: {**CHARTS[MEMORY], **charts}}


class Metrics:
    """Writes one run's metrics, on rank 0 only; a context manager. Drops what an earlier process wrote for later steps.

    A disk that refuses them does not end training: there is a warning, and lines of metrics.jsonl are tried again.

    Args:
        session: the run and its place in it.
        total_steps: the run's length.
    """

    def __init__(self, session: Session, total_steps: int) -> None:
        self._writes = session.place.is_first
        if not self._writes:
            return
        config, step = session.config, session.step
        self._gate_layers = config.model.gate_layers
        self._side_files = session.side_files
        self._path, self._board_path = config.directory / "metrics.jsonl", config.directory / "tensorboard"
        with self._side_files.tolerate(self._path):
            trim_metrics(self._path, step)
        self._lines = Lines(self._path)
        self._board: Board | None = None
        with self._side_files.tolerate(self._board_path):
            self._board = Board(str(self._board_path), purge_step=step + 1)
        self._show(lambda board: board.add_text("config", "```yaml\n" + dump(config) + "```", step))
        self._show(lambda board: board.add_custom_scalars(tensorboard_layout(config.model)))
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            desc=config.name,
            unit="step",
            disable=is_quiet() or not sys.stderr.isatty(),
            leave=False,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            self._bar.close()
            self._show(Board.close)
            with self._side_files.tolerate(self._path):
                self._lines.flush()
            self._lines.close()

    def tick(self) -> None:
        """Advances the progress bar by a step."""
        if self._writes:
            self._bar.update(1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers by name to metrics.jsonl and TensorBoard."""
        if not self._writes:
            return
        row = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        with self._side_files.tolerate(self._path):
            self._lines.append(json.dumps(row))
        for name, value in values.items():
            self._show(lambda board, name=name, value=value: board.add_scalar(name, value, step))

    def write_gates(self, step: int, gates_LH: np.ndarray) -> None:
        """Writes sigmoid(gate) of each layer and head: heat map, histogram, and their extremes."""
        if not self._writes:
            return
        from infini_train.plots import plot_gate_map  # loads matplotlib, which a start does not wait for

        figure = plot_gate_map(gates_LH, step, self._gate_layers)
        self._show(lambda board: board.add_figure("gates/by layer and head", figure, step))
        self._show(lambda board: board.add_histogram("gates/distribution", gates_LH.ravel(), step))
        self.write(step, summarise_gates(gates_LH))

    def _show(self, add: Callable[[Board], object]) -> None:
        """Adds to TensorBoard; after an error no more, since readers stop at a torn record."""
        board, self._board = self._board, None
        if board is not None:
            with self._side_files.tolerate(self._board_path):
                add(board)
                self._board = board


def summarise_gates(gates_LH: np.ndarray) -> dict[str, float]:
    """Mean and extremes of the gates, and the shares of heads specialised in the segment or in the memory."""
    local, memory = float((gates_LH < LOCAL_BELOW).mean()), float((gates_LH > MEMORY_ABOVE).mean())
    return {
        "gates/mean": float(gates_LH.mean()),
        "gates/lowest": float(gates_LH.min()),
        "gates/highest": float(gates_LH.max()),
        "gates/local": local,
        "gates/memory": memory,
        "gates/mixed": 1 - local - memory,
    }


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None  # JSON knows no NaN


def trim_metrics(path: Path, step: int) -> None:
    """Drops lines after a step (and a torn last line), which a killed process wrote after its last checkpoint.

    What stands there as a link or as no regular file is moved aside: it is not ours.

    Raises:
        OSError: it can't be read or written.
    """
    if not os.path.lexists(path):
        return
    if step == 0 or not stat.S_ISREG(path.lstat().st_mode):  # of another run, whose checkpoints were moved away
        os.replace(path, path.with_suffix(".jsonl.old"))
        return
    with (
        open_regular(path, follow_links=False) as lines,
        replacing(path, durable=False) as partial,
        open_own(partial, truncate=True) as kept,
    ):
        for line in iter(lambda: lines.readline(MAX_LINE_BYTES), b""):
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                if json.loads(line)["step"] <= step:
                    kept.write(line.rstrip() + b"\n")


def step_line(step: int, total_steps: int, values: Mapping[str, Any], eta_s: float) -> str:
    """The console line of a step."""
    gates = f"  gates {values['gates/lowest']:.2f}-{values['gates/highest']:.2f}" if "gates/lowest" in values else ""
    learned = "read only: no labels here"
    if "loss/train" in values:
        learned = (
            f"loss {values['loss/train']:.4f}  ppl {values['perplexity/train']:.2f}"
            f"  bpb {values['bits_per_byte/train']:.3f}"
        )
    rate = values.get("lr/matrices", max((x for name, x in values.items() if name.startswith("lr/")), default=0.0))
    norm = f"  |g| {values['grad_norm']:.2f}" if "grad_norm" in values else ""
    return (
        f"step {step:>{len(str(total_steps))}}/{total_steps}  {learned}"
        f"  lr {rate:.2e}{norm}  {values['speed/tokens_per_s']:,.0f} tok/s"
        f"  mfu {values['speed/mfu']:.0%}{gates}  eta {format_duration(eta_s)}"
    )


def format_duration(seconds: float) -> str:
    """2h05m, 3m20s, 45s."""
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
