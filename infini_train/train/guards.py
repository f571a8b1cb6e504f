"""Anomaly detection: steps with a non-finite loss or gradient, or a loss spike, are skipped, counted and named.

Loss and gradient norm are those of all ranks, so every rank decides alike without communication.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from infini_train.config.training import GuardConfig
from infini_train.parallel.zero import Engine

MIN_DEVIATION = 0.01  # of the mean: in a loss that has become nearly constant, noise must not be flagged as spikes
SHOWN = 8  # documents or tensors named in a message


class DivergedError(ArithmeticError):
    """Too many steps in a row had to be skipped; the last checkpoint is unchanged."""


def describe_non_finite(loss: float) -> str:
    """The problem with a loss that is NaN or infinite; empty if it is finite."""
    return "" if math.isfinite(loss) else f"the loss is {loss}"


class Guard:
    """Decides by the loss which steps to skip, and counts them.

    Attributes:
        skipped: steps skipped so far.
        in_a_row: steps skipped since the last one that was learned from.
        rollbacks: times the run was rolled back to the newest checkpoint.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skipped = self.in_a_row = self.rollbacks = 0
        self._losses: deque[float] = deque(maxlen=config.spike_window_steps)

    def find_problem(self, loss: float) -> str:
        """Why a step with this loss is skipped; empty if it is not."""
        problem = describe_non_finite(loss)
        return problem if problem or self.config.spikes == "warn" else self.describe_spike(loss)

    def describe_spike(self, loss: float) -> str:
        """How far the loss exceeds the recent ones; empty if it does not, if they are too few, or under `ignore`."""
        steps, deviations = self.config.spike_window_steps, self.config.spike_deviations
        if self.config.spikes == "ignore" or len(self._losses) < steps or not math.isfinite(loss):
            return ""
        mean, deviation = float(np.mean(self._losses)), float(np.std(self._losses))
        limit = mean + deviations * max(deviation, MIN_DEVIATION * abs(mean))
        if loss <= limit:
            return ""
        return f"the loss jumped to {loss:.4f}; the last {steps} had a mean of {mean:.4f}, and {limit:.4f} is the limit"

    def record(self, loss: float, problem: str) -> None:
        """Counts a step that is done, or was skipped because of a problem."""
        if problem:
            self.skipped += 1
            self.in_a_row += 1
        else:
            self.in_a_row = 0
            if math.isfinite(loss):  # otherwise its window had no labels
                self._losses.append(loss)

    def must_roll_back(self, loss: float, problem: str) -> bool:
        """Whether the skipped step calls for a rollback to the last checkpoint."""
        return self.config.spikes == "rollback" and bool(problem) and bool(self.describe_spike(loss))

    @property
    def gives_up(self) -> bool:
        """Whether too many steps were skipped to go on."""
        return max(self.in_a_row, self.rollbacks) > self.config.max_skips

    def diagnose(self, weights_are_bad: bool) -> str:
        """The last part of the error of a run that gives up: what happened and what to do."""
        history = f"{self.in_a_row} steps in a row were left out (guard.max_skips: {self.config.max_skips})"
        if self.rollbacks > self.config.max_skips:
            history = f"{self.rollbacks} rollbacks to the same checkpoint did not help"
        if weights_are_bad:
            return f"{history}; weights contain NaN/Inf: move the newest checkpoints away and run again"
        return f"{history}; all weights are finite: lower optim.lr, or look at the documents named above"

    def to_json(self) -> dict[str, Any]:
        """The state as plain values for json.dumps."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "losses": list(self._losses)}

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Takes over the state of a `to_json`; an empty one is that of a new run."""
        self.skipped, self.in_a_row, self.rollbacks = tree.get("skipped", 0), tree.get("in_a_row", 0), 0
        self._losses.clear()
        self._losses.extend(tree.get("losses", ()))


def list_names(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def find_non_finite_tensors(engine: Engine) -> list[str]:
    """Names of parameters whose weights or AdamW states contain NaN/Inf on this rank."""
    bad = [name for parameter, name in engine.names.items() if not parameter.isfinite().all()]
    bad += [shard.name for shard in engine.shards() if not shard.values.isfinite().all()]
    return sorted(set(bad))
