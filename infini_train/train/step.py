"""One optimizer step: micro-batches forward and backward through all segments of the window, then AdamW.

Legend: B lanes of this data-parallel rank, T window tokens.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from infini_train.data.lanes import IGNORED, Batch
from infini_train.model.ablation import Part, leaving_out
from infini_train.model.write_cost import charge_writing
from infini_train.parallel import device, mesh
from infini_train.parallel.pipeline import Carried, Stages, cut_micro_batches, run_window
from infini_train.parallel.zero import Engine
from infini_train.train.guards import describe_non_finite
from infini_train.train.variation import AS_EVALUATED, Variation


class StepResult(NamedTuple):
    """The outcome of a step, over all ranks. `states`, this rank's own, become the carried memory if it is accepted.

    With a `problem` the step was skipped: weights and optimizer are unchanged, and the states must not be used. Without
    labels (inside a book whose summary comes later) the window was only read: weights stay, the memory is carried on.
    """

    loss: float  # nats per label, weighted; NaN without labels
    labels: int
    n_bytes: float  # of text
    grad_norm: float  # before clipping
    states: Carried
    seconds: dict[str, float]  # wait, forward, backward, optimizer
    problem: str = ""  # why the step was skipped
    variation: Variation = AS_EVALUATED
    divergence: float = math.nan  # from the teacher, nats per label; 0 without one, NaN without labels

    @property
    def comparable_loss(self) -> float:
        """The loss, if it can be compared with those of other steps; else NaN: without local attention it is higher."""
        return math.nan if self.variation.without_local else self.loss


class Stopwatch:
    """Adds up the time of phases, each of which ends when the next one begins.

    Synchronises with the device between phases, except with several pipeline stages, whose transfers that would delay:
    there a phase includes waiting for other stages.

    Args:
        on_phase: called with each phase that begins.
        synchronise: wait for the device between phases.
    """

    def __init__(self, on_phase: Callable[[str], None], synchronise: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._on_phase, self._synchronise = on_phase, synchronise
        self._phase: str | None = None
        self._begin = 0.0

    def begin(self, phase: str, detail: str = "") -> None:
        """Begins a phase, and ends the one before it."""
        self.end()
        self._on_phase(f"{phase} {detail}".strip())
        self._phase, self._begin = phase, time.perf_counter()

    def end(self) -> None:
        """Ends the last phase."""
        if self._phase is None:
            return
        if self._synchronise:
            device.synchronise()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + time.perf_counter() - self._begin
        self._phase = None


def train_step(
    stages: Stages,
    engine: Engine,
    batch: Batch,
    carried: Carried,
    lr_of_group: dict[str, float],
    on_phase: Callable[[str], None] = lambda phase: None,
    find_problem: Callable[[float], str] = describe_non_finite,
    variation: Variation = AS_EVALUATED,
) -> StepResult:
    """Trains on one window of every lane: one global batch. All ranks call it together.

    Args:
        stages: the modules inside the engine.
        engine: the optimizer under ZeRO.
        batch: whole windows of this data-parallel rank's lanes.
        carried: memory of each stage and micro-batch before this window.
        lr_of_group: learning rates by group name.
        on_phase: called with each phase of the step that begins.
        find_problem: why a step with this loss is skipped, the same on all ranks; empty if it is not. A step is also
            skipped if there is no text, or if the gradients are not finite.
        variation: what the step does otherwise than the model that is evaluated, the same on all ranks.
    """
    place, parallel = stages.place, stages.parallel
    stopwatch = Stopwatch(on_phase, synchronise=parallel.pipeline_size == 1)
    stopwatch.begin("wait", "for all ranks to count their labels")
    valid_BT = batch.labels_BT != IGNORED
    weight = valid_BT.sum() if batch.loss_weights_BT is None else batch.loss_weights_BT[valid_BT].sum(dtype=np.float64)
    text = float((batch.weights_BT > 0).sum())
    totals = mesh.sum_over_world([float(weight), float(valid_BT.sum()), batch.n_bytes, text])
    weight, labels, n_bytes, text = (total / parallel.model_size for total in totals)
    if text == 0:
        return StepResult(math.nan, 0, 0.0, math.nan, carried, {}, "none of its text can be read")
    micro_batches = cut_micro_batches(batch, len(carried[0]))
    options: dict[str, Any] = {"segment_tokens": variation.segment_tokens, "on_phase": stopwatch.begin}
    with leaving_out(stages.transformers(), [Part("local")] if variation.without_local else []):
        if weight == 0:
            with torch.no_grad():
                _, states = run_window(stages, stages, micro_batches, carried, **options)
            stopwatch.end()
            return StepResult(math.nan, 0, 0.0, math.nan, states, stopwatch.seconds, variation=variation)
        replicas, tokens = place.data[1] * place.context[1], batch.tokens_BT.size * place.data[1]
        loss_scale = replicas / weight  # the engine averages gradients over them
        charge_writing(stages.transformers(), variation.write_cost * replicas / tokens)
        engine.begin(lr_of_group)
        options |= {"loss_scale": loss_scale, "teacher_share": variation.teacher_share}
        losses, states = run_window(stages, engine, micro_batches, carried, **options)
    stopwatch.begin("backward", "(adding up the loss)")
    loss, divergence = (total / parallel.tensor_size / weight for total in mesh.sum_over_world(list(losses)))
    stopwatch.begin("optimizer")
    problem = (describe_non_finite if variation.without_local else find_problem)(loss)
    grad_norm = math.nan
    if problem:
        engine.skip()
    else:
        grad_norm = engine.step(lr_of_group)  # changes nothing if the norm is not finite
        problem = "" if math.isfinite(grad_norm) else "the gradients are not finite"
    stopwatch.end()
    seconds = stopwatch.seconds
    return StepResult(loss, round(labels), n_bytes, grad_norm, states, seconds, problem, variation, divergence)
