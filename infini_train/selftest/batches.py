"""Made-up batches in which everything happens that a layout could get wrong.

Legend: L lanes of the global batch, B of a data-parallel rank, T window tokens.
"""

import numpy as np

from infini_train.config.run import RunConfig
from infini_train.data.lanes import IGNORED, Batch

# Columns at which documents start, by lane modulo 8: nowhere, inside a segment, on the edges of segments and of the
# shards of 2, 4 and 8 context-parallel ranks, twice in a segment, in the first segment, at both ends of the window.
STARTS: tuple[tuple[int, ...], ...] = ((), (13,), (16, 32), (3, 5, 33), (8, 48), (31, 40), (32,), (0, 63))
PADDED_LANE, PADDING = 2, slice(20, 39)  # padding between documents, over an edge of shards
LOSS_WEIGHTS = (0.0, 0.5, 1.0, 2.0)
EMPTY_STEP = 1  # in which the second half of the lanes, with all data-parallel ranks that have them, has no labels


def make_batch(step: int, config: RunConfig) -> Batch:
    """The global batch of a step (0 is the first); the same in every layout.

    Later steps draw from ever fewer tokens, so that gradients grow and are clipped.
    """
    lanes, window = config.train.batch_lanes, config.train.window_tokens
    random = np.random.default_rng(step)
    tokens_LT = random.integers(0, config.model.vocab_size // 2**step, (lanes, window + 1))
    labels_LT = tokens_LT[:, 1:].copy()
    starts_LT, weights_LT = np.zeros((lanes, window), bool), np.ones((lanes, window), np.float32)
    for lane in range(lanes):
        starts_LT[lane, list(STARTS[(lane + step) % len(STARTS)])] = True
    starts_LT[:, 0] |= step == 0
    padding = slice(PADDING.start + step, PADDING.stop + step)
    weights_LT[PADDED_LANE % lanes, padding] = 0
    labels_LT[PADDED_LANE % lanes, padding] = IGNORED
    starts_LT[PADDED_LANE % lanes, [padding.start, padding.stop]] = True
    labels_LT[1::4, 50:] = IGNORED  # so that no two ranks have as many labels
    labels_LT[-1, step * 7 :] = IGNORED
    if step == EMPTY_STEP:
        labels_LT[lanes // 2 :] = IGNORED
    loss_weights_LT = None  # of the first step: all labels count alike
    if step:
        loss_weights_LT = random.choice(np.array(LOSS_WEIGHTS, np.float32), (lanes, window))
    n_bytes = float(lanes * window)
    return Batch(tokens_LT[:, :-1], labels_LT, starts_LT, weights_LT, np.arange(lanes), n_bytes, loss_weights_LT)


def take_lanes(batch: Batch, first: int, count: int) -> Batch:
    """Those of a data-parallel rank."""
    rows = slice(first, first + count)
    arrays = (batch.tokens_BT, batch.labels_BT, batch.starts_BT, batch.weights_BT, batch.document_B)
    loss_weights_BT = None if batch.loss_weights_BT is None else batch.loss_weights_BT[rows]
    n_bytes = batch.n_bytes * count / len(batch.tokens_BT)
    return Batch(*(array[rows] for array in arrays), n_bytes, loss_weights_BT)
