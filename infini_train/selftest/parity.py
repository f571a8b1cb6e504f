"""How far a run in some layout is from the same run in one process, by their checkpoints."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from infini_train.checkpoint import store
from infini_train.checkpoint.reader import Checkpoint
from infini_train.selftest.cases import STEPS
from infini_train.train.carry import KIND as CARRY

TOLERANCES = {"fp32": 1e-5, "bf16": 5e-2}


class Worst(NamedTuple):
    """The largest relative error and where it is."""

    error: float
    name: str


class Errors(NamedTuple):
    """Of a whole run, each relative."""

    gradient: Worst  # of the first step, by parameter, in norm
    loss: Worst  # by step
    grad_norm: Worst
    parameter: Worst  # after the last step
    memory: Worst  # carried after the last step

    @property
    def largest(self) -> float:
        return max(worst.error for worst in self)

    def is_within(self, precision: str) -> bool:
        """Whether the layout computes the same."""
        return self.largest <= TOLERANCES[precision]


def compare_runs(folder: Path, reference: Path) -> Errors:
    """The errors of a run against its reference; both are runs of `program.run_program`.

    Raises:
        CheckpointError: a run is not there, or its tensors are not the same or not whole.
    """
    first, last = (_open(folder, step) for step in (1, STEPS))
    expected_first, expected = (_open(reference, step) for step in (1, STEPS))
    return Errors(
        gradient=_compare_tensors(first, expected_first, "exp_avg"),
        loss=_compare_steps(last.state["losses"], expected.state["losses"]),
        grad_norm=_compare_steps(last.state["grad_norms"], expected.state["grad_norms"]),
        parameter=_compare_tensors(last, expected, "master"),
        memory=_compare_tensors(last, expected, CARRY),
    )


def _open(folder: Path, step: int) -> Checkpoint:
    return store.open_checkpoint(store.find_step(folder, step))


def _compare_steps(values: Sequence[float], expected: Sequence[float]) -> Worst:
    errors = [abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True)]
    return _worst(Worst(error, f"step {step}") for step, error in enumerate(errors, start=1))


def _compare_tensors(found: Checkpoint, expected: Checkpoint, kind: str) -> Worst:
    names = expected.names(kind)
    missing = set(names) ^ set(found.names(kind))
    if missing:
        return Worst(math.inf, min(missing))
    pairs = zip(
        found.read(found.whole(name, kind) for name in names),
        expected.read(expected.whole(name, kind) for name in names),
        strict=True,
    )
    return _worst(Worst(relative_error(mine, theirs), piece.name) for (piece, mine), (_, theirs) in pairs)


def relative_error(values: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the expected norm, in fp64; infinite where only one of the two is zero."""
    difference = (values.double() - expected.double()).norm().item()
    norm = expected.double().norm().item()
    if difference == 0:
        return 0.0
    return difference / norm if norm else math.inf


def _worst(errors: Iterable[Worst]) -> Worst:
    """The largest; a NaN counts as infinite."""
    known = [Worst(math.inf if math.isnan(error) else error, name) for error, name in errors]
    return max(known, default=Worst(0.0, "-"))
