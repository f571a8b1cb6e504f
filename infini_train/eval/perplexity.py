"""Held-out perplexity, streamed window by window with the memory carried along: constant memory at any length.

Legend: B lanes, T window tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from infini_train.data.corpus import Corpus
from infini_train.data.lanes import IGNORED, LaneReader
from infini_train.data.shards import Dataset
from infini_train.parallel import mesh
from infini_train.parallel.pipeline import Stages, cut_micro_batches, run_window


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


def default_lanes(stages: Stages, micro_lanes: int) -> int:
    """Lanes of an evaluation that fill each rank with as much as in training."""
    return micro_lanes * stages.place.data[1] * _micro_batches(stages)


@torch.no_grad()
def evaluate_perplexity(
    stages: Stages,
    dataset: Dataset,
    *,
    lanes: int,
    window_tokens: int,
    max_tokens: int | None = None,
    carry_memory: bool = True,
    on_progress: Callable[[int], None] = lambda tokens: None,
    gives_up: Callable[[], bool] = lambda: False,
) -> Perplexity | None:
    """Perplexity over the dataset's documents in their natural order, each from its beginning.

    All ranks call it together, and get the same result.

    Args:
        stages: the model in any precision.
        dataset: documents; only one window of each lane is in memory.
        lanes: documents read side by side. 1 streams one after the other.
        window_tokens: tokens of a lane in one forward, a multiple of the segment (of every context-parallel rank).
        max_tokens: stop when about this many tokens are read; None: all of them.
        carry_memory: as in training; False forgets at each window's edge.
        on_progress: called with the tokens of each window.
        gives_up: asked before each window; if it is true on any rank, all return None.
    """
    place = stages.place
    mine = lanes // place.data[1]
    rows = slice(mine * place.data[0], mine * (place.data[0] + 1))
    reader = LaneReader(Corpus.of(dataset, seed=None, epochs=1), lanes, window_tokens, rows=rows)
    micro_batches = _micro_batches(stages)
    position, carried = reader.start(), stages.initial_carried(mine // micro_batches, micro_batches)
    counts_V = np.zeros(dataset.manifest.vocab_size, dtype=np.int64)
    shares = np.array([stages.parallel.tensor_size, *[stages.parallel.model_size] * 4])  # ranks that count the same
    sums = np.zeros(5)  # loss, labels, bytes, documents, and tokens read, of which some may have no label
    while max_tokens is None or sums[4] < max_tokens:
        batch, position = reader.next(position)
        if batch is None:
            break
        losses, after = run_window(stages, stages, cut_micro_batches(batch, micro_batches), carried)
        carried = after if carry_memory else carried
        valid, text_BT = batch.labels_BT[batch.labels_BT != IGNORED], batch.weights_BT > 0
        counts_V += np.bincount(valid, minlength=len(counts_V))
        here = [losses.text, len(valid), batch.n_bytes, float((batch.starts_BT & text_BT).sum()), float(text_BT.sum())]
        *found, stop = mesh.sum_over_world([*here, float(gives_up())])
        if stop:
            return None
        sums += np.array(found) / shares
        on_progress(round(found[4] / shares[4]))
    *counts, damaged = mesh.sum_over_world([*counts_V.tolist(), float(reader.corrupt_documents)])
    loss_sum, tokens, n_bytes, documents, _ = sums.tolist()
    return Perplexity(
        loss_sum / tokens if tokens else math.nan,
        unigram_entropy(np.array(counts)),
        round(tokens),
        n_bytes,
        round(documents),
        round(damaged / stages.parallel.model_size),
    )


def _micro_batches(stages: Stages) -> int:
    """As few as the schedule takes."""
    return stages.parallel.pipeline_size if stages.parallel.virtual_stages > 1 else 1


def unigram_entropy(counts_V: np.ndarray) -> float:
    """Entropy in nats of tokens drawn with these frequencies: the loss of the best model that ignores all context."""
    total = counts_V.sum()
    if total == 0:
        return math.nan
    share = counts_V[counts_V > 0] / total
    return float(-(share * np.log(share)).sum())
