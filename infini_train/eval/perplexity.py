"""Held-out perplexity, streamed window by window with the memory carried along: constant memory at any length.

Legend: B lanes, T window tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from infini_train.data.lanes import IGNORED, LaneReader, initial_state
from infini_train.data.shards import Dataset
from infini_train.model.transformer import Transformer
from infini_train.parallel import device


@dataclass(frozen=True)
class Perplexity:
    """Losses are in nats a token; `unigram_entropy` is that of the very same tokens, for comparison."""

    loss: float
    unigram_entropy: float
    tokens: int
    n_bytes: float
    documents: int
    damaged_documents: int = 0  # could not be read, so are not counted

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0)) if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / math.log(2) / self.n_bytes if self.n_bytes else math.nan


@torch.no_grad()
def evaluate_perplexity(
    model: Transformer,
    dataset: Dataset,
    *,
    lanes: int,
    window_tokens: int,
    max_tokens: int | None = None,
    carry_memory: bool = True,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> Perplexity:
    """Perplexity over the dataset's documents in their natural order, each from its beginning.

    Args:
        model: in any precision; left in the mode it was in.
        dataset: documents; only one window of each lane is in memory.
        lanes: documents read side by side. 1 streams one after the other.
        window_tokens: tokens of a lane in one forward, a multiple of the segment.
        max_tokens: stop after about this many tokens; None: all of them.
        carry_memory: as in training; False forgets at each window's edge.
        on_progress: called with the tokens of each window.
    """
    reader = LaneReader(dataset, lanes, window_tokens, None, epochs=1)
    position, state = initial_state(lanes), model.initial_state(lanes)
    counts_V = np.zeros(dataset.manifest.vocab_size, dtype=np.int64)
    loss_sum, tokens, n_bytes, documents = 0.0, 0, 0.0, 0
    while max_tokens is None or tokens < max_tokens:
        batch, position = reader.next(position)
        if batch is None:
            break
        labels = torch.from_numpy(batch.labels_BT).to(device.current())
        grid = model.make_grid(torch.from_numpy(batch.starts_BT), torch.from_numpy(batch.weights_BT), state)
        inputs = torch.from_numpy(batch.tokens_BT).to(device.current())
        loss_BT, after = model(inputs, grid.to(device.current()), state, labels)
        state = model.between_windows(after) if carry_memory else state
        loss_sum += loss_BT.double().sum().item()
        valid = batch.labels_BT[batch.labels_BT != IGNORED]
        counts_V += np.bincount(valid, minlength=len(counts_V))
        tokens, n_bytes = tokens + len(valid), n_bytes + batch.n_bytes
        documents += int((batch.starts_BT & (batch.weights_BT > 0)).sum())
        on_progress(len(valid))
    loss = loss_sum / tokens if tokens else math.nan
    return Perplexity(loss, unigram_entropy(counts_V), tokens, n_bytes, documents, reader.corrupt_documents)


def unigram_entropy(counts_V: np.ndarray) -> float:
    """Entropy in nats of tokens drawn with these frequencies: the loss of the best model that ignores all context."""
    total = counts_V.sum()
    if total == 0:
        return math.nan
    share = counts_V[counts_V > 0] / total
    return float(-(share * np.log(share)).sum())
