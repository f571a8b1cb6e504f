"""Segment-local causal attention, and Infini-attention: its gated mixture with the compressive memory.

Legend: B lanes, H query heads, K key-value heads (G = H / K query heads each), T tokens, L carried and new tokens
padded to whole segments, S segments, Q queries a segment, J keys a segment, D key size, E value size.
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_train.ops.grid import Grid, Recent, carry_recent
from infini_train.ops.memory import PAPER, Form, Memory, Ranks, Scanned, begin_scan, empty_memory, read_memory
from infini_train.ops.rope import Rope, rotate
from infini_train.ops.state import Stored

ROPE = Rope()


class InfiniState(NamedTuple):
    """All that a layer remembers: the compressive memory, and the open segment's (and overlap's) keys and values."""

    memory: Annotated[Memory, Stored("memory")]
    recent: Annotated[Recent, Stored("recent")]


def local_attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTE: Tensor,
    recent: Recent | None,
    grid: Grid,
    *,
    rope: Rope = ROPE,
    ranks: Ranks | None = None,
    overlapping: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Recent]:
    """Causal softmax attention inside each segment and document, rotary embedding by position in the segment.

    Args:
        q_BHTD: queries without rotary embedding; H a multiple of K.
        k_BKTD: keys.
        v_BKTE: values.
        recent: carried tokens, or None.
        grid: of this call (`make_grid`); one endless segment gives full attention.
        rope: the rotary frequencies.
        ranks: how the overlap travels between the ranks of `grid.shard`; not asked on one rank.
        overlapping: keys and values of the same tokens, to be seen by the next segment instead of the first ones; with
            other gradients, say.

    Returns:
        out_BHTE in the dtype of v, and the tokens to carry.
    """
    k_BKLD, v_BKLE, following = _join_recent(recent, k_BKTD, v_BKTE, grid, ranks)
    k_BSKJD, v_BSKJE = _key_windows(k_BKLD, grid), _key_windows(v_BKLE, grid)
    if overlapping is not None and grid.segments > 1:
        before = _join_recent(recent, *overlapping, grid, ranks)[:2]
        k_BSKJD, v_BSKJE = (
            torch.cat(
                (_key_windows(theirs, grid)[..., : grid.overlap_tokens, :], own[..., grid.overlap_tokens :, :]), -2
            )
            for theirs, own in zip(before, (k_BSKJD, v_BSKJE), strict=True)
        )
    out_BSHQE = _attend_segments(fold_queries(q_BHTD, grid), k_BSKJD, v_BSKJE, grid, rope)
    return unfold_queries(out_BSHQE, grid), following()


def infini_attention(  # noqa: PLR0913 (the inputs of the equations; a bag of them would only hide them)
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTE: Tensor,
    beta_H: Tensor,
    state: InfiniState | None,
    grid: Grid,
    *,
    form: Form = PAPER,
    rope: Rope = ROPE,
    ranks: Ranks | None = None,
) -> tuple[Tensor, InfiniState]:
    """Infini-attention (arXiv 2404.07143, Eq. 7 to 10) over all segments of the call at once.

    The memory is read before it is written; the gate is not applied where the memory is empty or belongs to another
    document.

    Args:
        q_BHTD: queries without rotary embedding.
        k_BKTD: keys.
        v_BKTE: values.
        beta_H: gate of each query head.
        state: what earlier calls left, or None for nothing.
        grid: of this call (`make_grid`).
        form: how the memory is written and addressed.
        rope: the rotary frequencies of the local attention.
        ranks: how memory and overlap travel between the ranks of `grid.shard`; not asked on one rank.

    Returns:
        out_BHTE in the dtype of v, and the state after the call, the same on all ranks. A segment left open is carried
        in `state.recent`; if a document started in it, the older memory is dropped at once, since nothing can read it
        any more.
    """
    kv_heads = k_BKTD.shape[1]
    k_BKLD, v_BKLE, following, scan = _begin_writing(k_BKTD, v_BKTE, state, grid, form, ranks)
    q_BSHQD = fold_queries(q_BHTD, grid)
    k_BSKJD, v_BSKJE = _key_windows(k_BKLD, grid), _key_windows(v_BKLE, grid)
    local_BSHQE = _attend_segments(q_BSHQD, k_BSKJD, v_BSKJE, grid, rope)  # while memories travel
    scanned = scan()
    visible_BSQ = grid.reads_BSQ & (scanned.written_BS > 0)[..., None]
    group = q_BSHQD.shape[2] // kv_heads
    # X: the rows of all query heads of a key-value head
    q_BSKXD = q_BSHQD.unflatten(2, (kv_heads, group)).flatten(3, 4)
    memory_BSKXE = read_memory(q_BSKXD, scanned, visible_BSQ.repeat(1, 1, group), form)
    memory_BSHQE = memory_BSKXE.unflatten(3, (group, -1)).flatten(2, 3)
    out_BSHQE = mix_by_gate(local_BSHQE, memory_BSHQE, beta_H, visible_BSQ)  # Eq. 10
    return unfold_queries(out_BSHQE, grid), InfiniState(scanned.final, following())


def write_memory(
    k_BKTD: Tensor,
    v_BKTE: Tensor,
    state: InfiniState | None,
    grid: Grid,
    *,
    form: Form = PAPER,
    ranks: Ranks | None = None,
) -> InfiniState:
    """The state that `infini_attention` leaves, where no output is needed; arguments as there."""
    *_, following, scan = _begin_writing(k_BKTD, v_BKTE, state, grid, form, ranks)
    return InfiniState(scan().final, following())


def _begin_writing(
    k_BKTD: Tensor, v_BKTE: Tensor, state: InfiniState | None, grid: Grid, form: Form, ranks: Ranks | None
) -> tuple[Tensor, Tensor, Callable[[], Recent], Callable[[], Scanned]]:
    """Carried and new keys and values joined, the tokens to carry, and the memories entering the segments."""
    lanes, kv_heads, _, key_dim = k_BKTD.shape
    memory = empty_memory(lanes, kv_heads, key_dim, v_BKTE.shape[-1], k_BKTD) if state is None else state.memory
    recent = None if state is None else state.recent
    k_BKLD, v_BKLE, following = _join_recent(recent, k_BKTD, v_BKTE, grid, ranks)
    scan = begin_scan(closed_segments(k_BKLD, grid), closed_segments(v_BKLE, grid), memory, grid, form, ranks)
    return k_BKLD, v_BKLE, following, scan


def _join_recent(
    recent: Recent | None, k_BKTD: Tensor, v_BKTE: Tensor, grid: Grid, ranks: Ranks | None
) -> tuple[Tensor, Tensor, Callable[[], Recent]]:
    """`carry_recent`, whose carried tokens lie on the left neighbour, and whose next ones on the last rank."""
    overlap, (rank, size) = grid.overlap_tokens, grid.shard
    assert size == 1 or ranks is not None
    if ranks is None or size == 1 or overlap == 0:
        k_BKLD, v_BKLE, following = carry_recent(recent, k_BKTD, v_BKTE, grid)
        return k_BKLD, v_BKLE, lambda: following
    tail_BKWX = torch.cat((k_BKTD[:, :, -overlap:], v_BKTE[:, :, -overlap:]), -1)  # X: D, then E
    left, last = ranks.from_left(tail_BKWX), ranks.from_last(tail_BKWX.detach())
    left_BKWX = left()
    if rank == 0 and recent is not None:  # added to the zeros, so that backward meets from_left on this rank too
        left_BKWX = left_BKWX + torch.cat((recent.k_BKRD, recent.v_BKRE), -1)
    sizes = (k_BKTD.shape[-1], v_BKTE.shape[-1])

    def as_recent(joined_BKWX: Tensor) -> Recent:
        k_BKWD, v_BKWE = joined_BKWX.split(sizes, -1)
        return Recent(k_BKWD, v_BKWE, grid.carried_document_BR, grid.carried_weight_BR)

    k_BKLD, v_BKLE, _ = carry_recent(as_recent(left_BKWX), k_BKTD, v_BKTE, grid)

    return k_BKLD, v_BKLE, lambda: as_recent(last())


def mix_by_gate(local_BSHQE: Tensor, memory_BSHQE: Tensor, beta_H: Tensor, visible_BSQ: Tensor) -> Tensor:
    """sigmoid(beta) of what was remembered and the rest of the local result; all of the latter where nothing was."""
    share_H = torch.sigmoid(beta_H.to(torch.promote_types(beta_H.dtype, torch.float32))).to(local_BSHQE.dtype)
    return torch.lerp(local_BSHQE, memory_BSHQE, share_H[:, None, None] * visible_BSQ[:, :, None, :, None])


def fold_queries(q_BHTD: Tensor, grid: Grid) -> Tensor:
    """(B, S, H, Q, D): the queries of each segment; carried and padded places are zeros."""
    if grid.segments == 1:
        return q_BHTD[:, None]
    if grid.open_tokens or grid.padding:
        q_BHTD = F.pad(q_BHTD, (0, 0, grid.open_tokens, grid.padding))
    return q_BHTD.unflatten(2, (grid.segments, grid.segment_tokens)).transpose(1, 2)


def unfold_queries(out_BSHQE: Tensor, grid: Grid) -> Tensor:
    """(B, H, T, E): the results of the call's own tokens."""
    if grid.segments == 1:
        return out_BSHQE[:, 0]
    return out_BSHQE.transpose(1, 2).flatten(2, 3)[:, :, grid.open_tokens : grid.open_tokens + grid.tokens]


def closed_segments(x_BKLD: Tensor, grid: Grid) -> Tensor:
    """(B, C, K, N, D): the tokens of the segments that this call closes."""
    first = grid.overlap_tokens
    inside = x_BKLD[:, :, first : first + grid.closed * grid.segment_tokens]
    return inside.unflatten(2, (grid.closed, grid.segment_tokens)).transpose(1, 2)


def _attend_segments(q_BSHQD: Tensor, k_BSKJD: Tensor, v_BSKJE: Tensor, grid: Grid, rope: Rope) -> Tensor:
    first_query = grid.open_tokens if grid.segments == 1 else 0
    q_rotated = rotate(q_BSHQD, grid.overlap_tokens + first_query, rope)
    k_rotated = rotate(k_BSKJD, 0, rope)
    group = q_BSHQD.shape[2] // k_BSKJD.shape[2]
    if group > 1:
        k_rotated, v_BSKJE = (x.repeat_interleave(group, 2) for x in (k_rotated, v_BSKJE))
    mask = None if grid.mask_BSQJ is None else grid.mask_BSQJ.flatten(0, 1)[:, None]
    out = F.scaled_dot_product_attention(
        q_rotated.flatten(0, 1), k_rotated.flatten(0, 1), v_BSKJE.flatten(0, 1), attn_mask=mask, is_causal=mask is None
    )
    return out.unflatten(0, q_BSHQD.shape[:2])


def _key_windows(x_BKLD: Tensor, grid: Grid) -> Tensor:
    """(B, S, K, J, D): each segment's tokens after the W tokens before it."""
    if grid.segments == 1:
        return x_BKLD[:, None]
    if grid.overlap_tokens == 0:
        return x_BKLD.unflatten(2, (grid.segments, grid.segment_tokens)).transpose(1, 2)
    # Not unfold, whose backward is slow and whose last dimension is not the contiguous one.
    whole = (grid.segments, grid.segment_tokens)
    before_BKSWD = x_BKLD[:, :, : -grid.overlap_tokens].unflatten(2, whole)[..., : grid.overlap_tokens, :]
    inside_BKSND = x_BKLD[:, :, grid.overlap_tokens :].unflatten(2, whole)
    return torch.cat((before_BKSWD, inside_BKSND), 3).transpose(1, 2)
