"""Which steps nothing is learned from: the loss or a gradient is no number, or the loss jumps.

Loss and gradient norm are those of all ranks, so every rank judges alike without asking the others.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from infini_train.config.training import GuardConfig
from infini_train.parallel.zero import Engine

MIN_DEVIATION = 0.01  # of the mean: a loss that hardly moves any more must not make a spike of every breath
SHOWN = 8  # documents or tensors that a line names


class DivergedError(ArithmeticError):
    """Too many steps in a row that nothing could be learned from; the last checkpoint is as it was."""


def describe_non_finite(loss: float) -> str:
    """Empty if the loss is a number."""
    return "" if math.isfinite(loss) else f"the loss is {loss}"


class Guard:
    """Judges steps by their loss, and counts those that were left out.

    Attributes:
        skipped: steps left out so far.
        in_a_row: of them, those since the last step that was learned from.
        rollbacks: to the newest checkpoint.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skipped = self.in_a_row = self.rollbacks = 0
        self._losses: deque[float] = deque(maxlen=config.spike_window_steps)

    def find_problem(self, loss: float) -> str:
        """Why a step with this loss is left out; empty if it is not."""
        problem = describe_non_finite(loss)
        return problem if problem or self.config.spikes == "warn" else self.describe_spike(loss)

    def describe_spike(self, loss: float) -> str:
        """How far this loss lies above the last ones; empty if it does not, if there are too few, or under `ignore`."""
        steps, deviations = self.config.spike_window_steps, self.config.spike_deviations
        if self.config.spikes == "ignore" or len(self._losses) < steps or not math.isfinite(loss):
            return ""
        mean, deviation = float(np.mean(self._losses)), float(np.std(self._losses))
        limit = mean + deviations * max(deviation, MIN_DEVIATION * abs(mean))
        if loss <= limit:
            return ""
        return f"the loss jumped to {loss:.4f}; the last {steps} had a mean of {mean:.4f}, and {limit:.4f} is the limit"

    def record(self, loss: float, problem: str) -> None:
        """A step is done, or was left out because of a problem."""
        if problem:
            self.skipped += 1
            self.in_a_row += 1
        else:
            self.in_a_row = 0
            if math.isfinite(loss):  # else its window had no labels
                self._losses.append(loss)

    def must_roll_back(self, loss: float, problem: str) -> bool:
        """Whether the step that was left out calls for the last checkpoint."""
        return self.config.spikes == "rollback" and bool(problem) and bool(self.describe_spike(loss))

    @property
    def gives_up(self) -> bool:
        """Whether no more steps may be left out."""
        return max(self.in_a_row, self.rollbacks) > self.config.max_skips

    def diagnose(self, weights_are_bad: bool) -> str:
        """What to say at the end of a run that gives up."""
        left_out = f"{self.in_a_row} steps in a row were left out (guard.max_skips: {self.config.max_skips})"
        if self.rollbacks > self.config.max_skips:
            left_out = f"{self.rollbacks} rollbacks to the same checkpoint did not help"
        if weights_are_bad:
            return f"{left_out}; there are weights that are no numbers: move the newest checkpoints away and run again"
        return f"{left_out}; all weights are numbers: lower optim.lr, or look at the documents named above"

    def to_json(self) -> dict[str, Any]:
        """As plain values for json.dumps."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "losses": list(self._losses)}

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Takes over a `to_json`; an empty one is that of a new run."""
        self.skipped, self.in_a_row, self.rollbacks = tree.get("skipped", 0), tree.get("in_a_row", 0), 0
        self._losses.clear()
        self._losses.extend(tree.get("losses", ()))


def list_names(names: Iterable[str]) -> str:
    """The first ones of them, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def find_bad_tensors(engine: Engine) -> list[str]:
    """Parameters whose weights, or AdamW's state of them, are not all finite on this rank."""
    bad = [name for parameter, name in engine.names.items() if not parameter.isfinite().all()]
    bad += [shard.name for shard in engine.shards() if not shard.values.isfinite().all()]
    return sorted(set(bad))
