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


class Worst(NamedTuple):
    """The largest relative error and where it is."""

    error: float
    name: str


class Errors(NamedTuple):
    """Largest relative errors over a whole run."""

    gradient: Worst  # of the first step, by parameter, in norm
    loss: Worst  # by step
    grad_norm: Worst
    parameter: Worst  # after the last step
    memory: Worst  # carried after the last step

    def exceeding(self, precision: str) -> list[str]:
        """What is farther away than rounding explains; empty if the layout computes the same."""
        limits = TOLERANCES[precision]
        return [name for name, worst, limit in zip(self._fields, self, limits, strict=True) if worst.error > limit]


class Tolerances(NamedTuple):
    """The largest error of each kind that passes."""

    gradient: float
    loss: float
    grad_norm: float
    parameter: float
    memory: float


# In fp32 layouts differ by the order of sums alone: 1.1e-5 was the most that was seen on CPU. In bf16 every rank that
# adds, and every order in which it does, rounds to 8 bits again, so that two layouts are as far from each other as each
# of them is from fp32: gradients by 7e-2, measured between layouts and between one process in bf16 and one in fp32. The
# worst tensors, gates and key biases, are sums that nearly cancel. About three times the largest that was seen passes;
# a sum over ranks that is left out changes gradients by half and more.
TOLERANCES = {
    "fp32": Tolerances(3e-5, 3e-5, 3e-5, 3e-5, 3e-5),
    "bf16": Tolerances(gradient=2e-1, loss=4e-3, grad_norm=6e-2, parameter=5e-1, memory=2e-1),
}


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
