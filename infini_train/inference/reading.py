"""Several texts read and scored side by side, of any lengths, in constant memory.

Lanes advance by whole segments: there a lane's state has the same shape whatever it has read, so that any lanes can be
stacked, and each gives what it would give alone. What is left of a text after its last whole segment is its tail.

Legend: B lanes, T tokens of a forward, V vocabulary, N tokens with a score.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from infini_train.model.transformer import ModelState, Transformer
from infini_train.ops.grid import Grid
from infini_train.parallel import device

FORWARD_SEGMENTS = 4
UNSEGMENTED_TOKENS = 256  # in place of a segment, for variants without
SCORED_AT_ONCE = 1024  # tokens whose logits are in memory at a time


class Tail(NamedTuple):
    """What follows a state at a segment's edge; None begins a document. `tokens` are int64, at least one."""

    state: ModelState | None
    tokens: np.ndarray


class TailScore(NamedTuple):
    """Log-probabilities (fp32) of a tail's last tokens, each given all before it, and whether it was the likeliest."""

    logprobs_N: np.ndarray
    greedy_N: np.ndarray


def segment_of(model: Transformer) -> int:
    """Tokens by which lanes advance."""
    return model.config.segment_tokens or UNSEGMENTED_TOKENS


def take_lane(state: ModelState | None, lane: int) -> ModelState | None:
    """The state of one lane: every tensor of a state has the lanes first."""
    return pytree.tree_map_only(Tensor, lambda x_B: x_B[lane : lane + 1].clone(), state)


@torch.no_grad()
def read_segments(
    model: Transformer, texts: Sequence[np.ndarray], on_progress: Callable[[int], object] = lambda tokens: None
) -> list[Tail]:
    """Reads the whole segments of each text, a lane each; what is left of it, at least its last token, is its tail.

    Args:
        model: any variant; memory stays constant where its state does.
        texts: int64 ids, each from the beginning of its document, at least one.
        on_progress: called with the tokens read, of all lanes together.
    """
    segment = segment_of(model)
    ends = [(len(text) - 1) // segment * segment for text in texts]
    tails: list[Tail | None] = [None] * len(texts)
    lanes, state, begin = list(range(len(texts))), None, 0
    while lanes:
        for row, lane in enumerate(lanes):
            if ends[lane] == begin:
                tails[lane] = Tail(take_lane(state, row), texts[lane][begin:])
        going = [row for row, lane in enumerate(lanes) if ends[lane] > begin]
        state, lanes = _keep_lanes(state, going, len(lanes)), [lanes[row] for row in going]
        if lanes:
            stop = min(begin + FORWARD_SEGMENTS * segment, *(ends[lane] for lane in lanes))
            tokens_BT = torch.from_numpy(np.stack([texts[lane][begin:stop] for lane in lanes]))
            state = prefill(model, tokens_BT, state)
            on_progress(tokens_BT.numel())
            begin = stop
    return [tail for tail in tails if tail is not None]


def _keep_lanes(state: ModelState | None, rows: list[int], lanes: int) -> ModelState | None:
    if len(rows) == lanes:
        return state
    return pytree.tree_map_only(Tensor, lambda x_B: x_B[rows], state)


@torch.no_grad()
def advance(
    model: Transformer, tokens_BT: Tensor, state: ModelState | None, weights_BT: Tensor | None = None
) -> tuple[Tensor, ModelState]:
    """hidden_TBD and state after tokens of all lanes; a state of None begins a document in each.

    Write weights of 0 mark padding after a lane's end.
    """
    return model.decode(tokens_BT.to(device.current()), _make_grid(model, tokens_BT, state, weights_BT), state)


@torch.no_grad()
def prefill(model: Transformer, tokens_BT: Tensor, state: ModelState | None) -> ModelState:
    """The state alone, as `advance` leaves it, for tokens that predict nothing."""
    return model.prefill(tokens_BT.to(device.current()), _make_grid(model, tokens_BT, state), state)


@torch.no_grad()
def score_positions(
    model: Transformer,
    tokens_BT: np.ndarray,
    labels_BT: np.ndarray,
    starts_BT: np.ndarray,
    weights_BT: np.ndarray,
    state: ModelState | None,
) -> tuple[np.ndarray, ModelState]:
    """Loss of each label in nats, float64, and the state after the tokens.

    Args:
        model: any variant, on its device.
        tokens_BT: int64.
        labels_BT: int64; `data.lanes.IGNORED` has no loss.
        starts_BT: bool, where documents begin.
        weights_BT: float32, 0 for padding.
        state: before the tokens; None: all lanes begin a document.
    """
    here = device.current()
    grid = model.make_grids(torch.from_numpy(starts_BT), torch.from_numpy(weights_BT), state).to(here)
    loss_BT, state = model(torch.from_numpy(tokens_BT).to(here), grid, state, torch.from_numpy(labels_BT).to(here))
    return loss_BT.double().cpu().numpy(), state


def _make_grid(
    model: Transformer, tokens_BT: Tensor, state: ModelState | None, weights_BT: Tensor | None = None
) -> Grid:
    starts_BT = torch.zeros(tokens_BT.shape, dtype=torch.bool)
    starts_BT[:, 0] = state is None
    if weights_BT is None:
        weights_BT = torch.ones(tokens_BT.shape)
    return model.make_grids(starts_BT, weights_BT, state).to(device.current())


def score_tails(model: Transformer, tails: Sequence[Tail], counts: Sequence[int], *, lanes: int) -> list[TailScore]:
    """Scores of the last tokens of each tail.

    Args:
        model: any variant.
        tails: of any lengths; read side by side, the shorter ones padded at their end.
        counts: how many of each tail's last tokens are scored; fewer than it has, since its first one needs no score.
        lanes: read side by side, at most.
    """
    scores: list[TailScore | None] = [None] * len(tails)
    for batch in _alike(tails, lanes):
        found = _score_batch(model, [tails[i] for i in batch], [counts[i] for i in batch])
        for i, score in zip(batch, found, strict=True):
            scores[i] = score
    return [score for score in scores if score is not None]


def _alike(tails: Sequence[Tail], lanes: int) -> Iterator[list[int]]:
    """Numbers of tails that can be read together: states of one shape, lengths that differ little."""

    def shape(tail: Tail) -> Hashable:
        return tuple(tuple(leaf.shape) for leaf in pytree.tree_leaves(tail.state) if isinstance(leaf, Tensor))

    groups: dict[Hashable, list[int]] = {}
    for i in sorted(range(len(tails)), key=lambda i: len(tails[i].tokens)):
        groups.setdefault(shape(tails[i]), []).append(i)
    for group in groups.values():
        yield from (group[first : first + lanes] for first in range(0, len(group), lanes))


def _join(states: Sequence[ModelState | None]) -> ModelState | None:
    if states[0] is None:
        return None
    flat = [pytree.tree_flatten(state) for state in states]
    joined: list[Any] = [
        torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0]
        for leaves in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return pytree.tree_unflatten(joined, flat[0][1])


@torch.no_grad()
def _score_batch(model: Transformer, tails: Sequence[Tail], counts: Sequence[int]) -> list[TailScore]:
    """One batch: the window goes on while any lane has tokens; logits are made where there is a score alone."""
    lengths = [len(tail.tokens) - 1 for tail in tails]
    width = max(lengths)
    tokens_BT = torch.zeros(len(tails), width + 1, dtype=torch.int64)
    scored_BT = torch.zeros(len(tails), width, dtype=torch.bool)
    weights_BT = torch.zeros(len(tails), width)
    for lane, (tail, length, count) in enumerate(zip(tails, lengths, counts, strict=True)):
        assert 0 <= count <= length
        tokens_BT[lane, : length + 1] = torch.from_numpy(tail.tokens)
        scored_BT[lane, length - count : length] = True
        weights_BT[lane, :length] = 1
    state = _join([tail.state for tail in tails])
    logprobs_BT, greedy_BT = torch.zeros(scored_BT.shape), torch.zeros_like(scored_BT)
    for begin in range(0, width, FORWARD_SEGMENTS * segment_of(model)):
        window = slice(begin, begin + FORWARD_SEGMENTS * segment_of(model))
        hidden_TBD, state = advance(model, tokens_BT[:, :-1][:, window], state, weights_BT[:, window])
        where_BT = scored_BT[:, window]
        hidden_ND = hidden_TBD.transpose(0, 1)[where_BT.to(hidden_TBD.device)]
        labels_N = tokens_BT[:, 1:][:, window][where_BT]
        logprobs_N, greedy_N = _score_tokens(model, hidden_ND, labels_N)
        logprobs_BT[:, window][where_BT], greedy_BT[:, window][where_BT] = logprobs_N, greedy_N
    return [
        TailScore(logprobs_T[where_T].numpy(), greedy_T[where_T].numpy())
        for logprobs_T, greedy_T, where_T in zip(logprobs_BT, greedy_BT, scored_BT, strict=True)
    ]


def _score_tokens(model: Transformer, hidden_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, and whether it is the likeliest."""
    logprobs, greedy = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
    for first in range(0, len(labels_N), SCORED_AT_ONCE):
        piece = slice(first, first + SCORED_AT_ONCE)
        logits_NV = model.logits(hidden_ND[piece, None])[:, 0]
        labels = labels_N[piece].to(logits_NV.device)
        logprobs.append(logits_NV.log_softmax(-1).gather(1, labels[:, None])[:, 0].cpu())
        greedy.append((logits_NV.argmax(-1) == labels).cpu())
    return torch.cat(logprobs), torch.cat(greedy)
