"""One optimizer step: micro-batches forward and backward through all segments of the window, then AdamW.

Legend: B lanes of this data-parallel rank, T window tokens.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from infini_train.data.lanes import IGNORED, Batch
from infini_train.parallel import device, mesh
from infini_train.parallel.pipeline import Carried, Stages, cut_micro_batches, run_window
from infini_train.parallel.zero import Engine
from infini_train.train.guards import describe_non_finite


class StepResult(NamedTuple):
    """What a step did, over all ranks. `states`, this rank's, are the carried memory once the step is accepted.

    With a `problem` nothing was learned: weights and optimizer are as they were, and the states are of no use. Without
    labels, in the midst of a book whose summary comes later, the window was read only: weights stay, memories go on.
    """

    loss: float  # nats a label, weighted; NaN without labels
    labels: int
    n_bytes: float  # of text
    grad_norm: float  # before clipping
    states: Carried
    seconds: dict[str, float]  # wait, forward, backward, optimizer
    problem: str = ""  # why the step was left out


class Stopwatch:
    """Adds up the time of phases, each of which ends when the next one begins.

    Waits for the device between phases, but not with several pipeline stages, whose transfers that would hold up: there
    a phase includes waiting for other stages.
    """

    def __init__(self, tell: Callable[[str], None], wait: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._tell, self._wait = tell, wait
        self._phase: str | None = None
        self._begin = 0.0

    def begin(self, phase: str, detail: str = "") -> None:
        """A phase begins, and the one before it ends."""
        self.end()
        self._tell(f"{phase} {detail}".strip())
        self._phase, self._begin = phase, time.perf_counter()

    def end(self) -> None:
        """The last phase ends."""
        if self._phase is None:
            return
        if self._wait:
            device.synchronise()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + time.perf_counter() - self._begin
        self._phase = None


def train_step(
    stages: Stages,
    engine: Engine,
    batch: Batch,
    carried: Carried,
    lr_of_group: dict[str, float],
    tell: Callable[[str], None] = lambda operation: None,
    find_problem: Callable[[float], str] = describe_non_finite,
) -> StepResult:
    """Trains on one window of every lane; all ranks call it together.

    Args:
        stages: the modules inside the engine.
        engine: ZeRO.
        batch: whole windows of this data-parallel rank's lanes.
        carried: memory of each stage and micro-batch before the window.
        lr_of_group: learning rates by group name.
        tell: told what is going on.
        find_problem: why a step with this loss is left out, the same on all ranks; empty if it is not. A step is also
            left out if there is no text or the gradients are not finite.
    """
    place, parallel = stages.place, stages.parallel
    watch = Stopwatch(tell, wait=parallel.pipeline_size == 1)
    watch.begin("wait", "for all ranks to count their labels")
    valid_BT = batch.labels_BT != IGNORED
    weight = valid_BT.sum() if batch.loss_weights_BT is None else batch.loss_weights_BT[valid_BT].sum(dtype=np.float64)
    text = float((batch.weights_BT > 0).sum())
    totals = mesh.sum_over_world([float(weight), float(valid_BT.sum()), batch.n_bytes, text])
    weight, labels, n_bytes, text = (total / parallel.model_size for total in totals)
    if text == 0:
        return StepResult(math.nan, 0, 0.0, math.nan, carried, {}, "none of its text can be read")
    micro_batches = cut_micro_batches(batch, len(carried[0]))
    if weight == 0:
        with torch.no_grad():
            _, states = run_window(stages, stages, micro_batches, carried, begin=watch.begin)
        watch.end()
        return StepResult(math.nan, 0, 0.0, math.nan, states, watch.seconds)
    replicas = place.data[1] * place.context[1]  # whose gradients the engine averages
    loss_sum, states = run_window(
        stages,
        engine,
        micro_batches,
        carried,
        loss_scale=replicas / weight,
        begin=watch.begin,
    )
    watch.begin("backward", "(adding up the loss)")
    loss = mesh.sum_over_world([loss_sum])[0] / parallel.tensor_size / weight
    watch.begin("optimizer")
    problem, grad_norm = find_problem(loss), math.nan
    if problem:
        engine.skip()
    else:
        grad_norm = engine.step(lr_of_group)  # which changes nothing if the norm is not finite
        problem = "" if math.isfinite(grad_norm) else "the gradients are not finite"
    watch.end()
    return StepResult(loss, round(labels), n_bytes, grad_norm, states, watch.seconds, problem)
