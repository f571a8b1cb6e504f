"""One optimizer step: micro-batches forward and backward through all segments of the window, then AdamW.

Legend: B lanes of the step (b of a micro-batch), T window tokens.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infini_train.data.lanes import IGNORED, Batch
from infini_train.model.transformer import ModelState, Transformer
from infini_train.parallel import device
from infini_train.parallel.zero import Engine

Carried = tuple[ModelState | None, ...]  # one state a micro-batch: it always holds the same lanes


class NonFiniteError(RuntimeError):
    """A step without a finite loss and gradients; weights and memory are as they were before it."""


class StepResult(NamedTuple):
    """What a step did. `states` are detached; they become the carried memory once the step is accepted."""

    loss: float  # nats a label
    labels: int
    grad_norm: float  # before clipping
    states: Carried
    seconds: dict[str, float]  # forward, backward, optimizer


class Stopwatch:
    """Adds up the time of named parts; waits for the device at each mark."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        device.synchronise()
        self._last = time.perf_counter()

    def mark(self, part: str) -> None:
        """Everything since the last mark belongs to this part."""
        device.synchronise()
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


def micro_batches(batch: Batch, lanes: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """tokens_bT, labels_bT, starts_bT, weights_bT of consecutive lanes; marks stay on the host, to make grids from."""

    def rows(array: np.ndarray, first: int) -> Tensor:
        return torch.from_numpy(array[first : first + lanes])

    where = device.current()
    for first in range(0, batch.tokens_BT.shape[0], lanes):
        tokens, labels = rows(batch.tokens_BT, first).to(where), rows(batch.labels_BT, first).to(where)
        yield tokens, labels, rows(batch.starts_BT, first), rows(batch.weights_BT, first)


def train_step(
    model: Transformer, engine: Engine, batch: Batch, carried: Carried, lr_of_group: dict[str, float]
) -> StepResult:
    """Trains on one window of every lane.

    Args:
        model: the raw module inside the engine.
        engine: ZeRO.
        batch: all lanes of this rank.
        carried: memory of each micro-batch before the window.
        lr_of_group: learning rates by group name.

    Raises:
        NonFiniteError: no labels, or loss or gradients are not finite; names the documents of the batch.
    """
    labels = int((batch.labels_BT != IGNORED).sum())
    if labels == 0:
        raise NonFiniteError(f"the batch has no text that can be read (documents {describe_documents(batch)})")
    lanes = batch.tokens_BT.shape[0] // len(carried)
    watch, states, loss_sum = Stopwatch(), [], 0.0
    for (tokens, targets, starts, weights), state in zip(micro_batches(batch, lanes), carried, strict=True):
        grid = model.make_grid(starts, weights, state).to(tokens.device)
        loss_bT, state = engine(tokens, grid, state, targets)
        watch.mark("forward")
        total = loss_bT.sum()
        engine.backward(total / max(1, labels))
        loss_sum += total.item()
        states.append(model.between_windows(state))
        watch.mark("backward")
    loss = loss_sum / max(1, labels)
    if not np.isfinite(loss):
        raise NonFiniteError(f"the loss is {loss} (documents of the batch: {describe_documents(batch)})")
    grad_norm = engine.step(lr_of_group)
    if not np.isfinite(grad_norm):
        raise NonFiniteError(
            f"the gradient's norm is {grad_norm} (documents of the batch: {describe_documents(batch)})"
        )
    watch.mark("optimizer")
    return StepResult(loss, labels, grad_norm, tuple(states), watch.seconds)


def describe_documents(batch: Batch) -> str:
    """The numbers of the documents that the lanes end in."""
    return ", ".join(str(document) for document in sorted(set(batch.document_B.tolist())))
