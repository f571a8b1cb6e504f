"""Segment-local causal attention, and Infini-attention: its gated mixture with the compressive memory.

Legend: B lanes, H query heads, K key-value heads (G = H / K query heads each), T tokens, L carried and new tokens
padded to whole segments, S segments, Q queries a segment, J keys a segment, D key size, E value size.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_train.ops.fla_kernels import begin_fused, find_kernel
from infini_train.ops.gated_delta import GatedMemory, Recalled, Writing, begin_gated, empty_gated_memory
from infini_train.ops.grid import Grid, Recent, carry_recent
from infini_train.ops.memory import PAPER, Form, Memory, begin_scan, empty_memory, read_memory
from infini_train.ops.ranks import Ranks
from infini_train.ops.rope import Rope, rotate
from infini_train.ops.sinks import take_sinks
from infini_train.ops.state import Stored
from infini_train.ops.varlen import attend_runs

ROPE = Rope()


class InfiniState(NamedTuple):
    """All that a layer remembers: the compressive memory, and the open segment's (and overlap's) keys and values."""

    memory: Annotated[Memory | GatedMemory, Stored("memory")]
    recent: Annotated[Recent, Stored("recent")]


class Maps(NamedTuple):
    """What is added to the identity in the memory's own maps of queries, keys, and what is read (after its norm)."""

    query_HDD: Tensor
    key_KDD: Tensor
    read_HEE: Tensor


class Additions(NamedTuple):
    """What may be beside the paper's form, and what is left out of it.

    How each token writes a gated delta memory, what each query says of its gate, a norm of what is read, and maps of
    the memory's own. To see
    what a part is worth, it can be left out: without the memory, nothing is read, as if it were empty; without the
    local attention its result is zero, and the gates stay as they are.
    """

    writing: Writing | None = None
    gate_HD: Tensor | None = None
    norm: Callable[[Tensor], Tensor] | None = None
    maps: Maps | None = None
    has_memory: bool = True
    has_local: bool = True


PLAIN = Additions()


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
    windows = _open_windows(recent, k_BKTD, v_BKTE, grid, ranks)
    k_BSKJD, v_BSKJE = windows.k_BSKJD, windows.v_BSKJE
    if overlapping is not None and grid.segments > 1:
        before = _open_windows(recent, *overlapping, grid, ranks)
        k_BSKJD, v_BSKJE = (
            torch.cat((theirs[..., : grid.overlap_tokens, :], own[..., grid.overlap_tokens :, :]), -2)
            for theirs, own in ((before.k_BSKJD, k_BSKJD), (before.v_BSKJE, v_BSKJE))
        )
    out_BSHQE = _attend_segments(fold_queries(q_BHTD, grid), k_BSKJD, v_BSKJE, grid, rope)
    return unfold_queries(out_BSHQE, grid), windows.following()


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
    additions: Additions = PLAIN,
) -> tuple[Tensor, InfiniState]:
    """Infini-attention (arXiv 2404.07143, Eq. 7 to 10) over all segments of the call at once.

    The memory is read before it is written; the gate is not applied where the memory is empty or belongs to another
    document (where every token reads all before it, it is applied everywhere, and an empty memory gives zeros).
    The gated delta memory (gated_delta.py) takes the place of Eq. 7 to 9 where `form` says so.

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
        additions: what is beside the paper's form.

    Returns:
        out_BHTE in the dtype of v, and the state after the call, the same on all ranks. A segment left open is carried
        in `state.recent`; if a document started in it, the older memory is dropped at once, since nothing can read it
        any more.
    """
    q_BSHQD = fold_queries(q_BHTD, grid)
    maps = additions.maps
    windows, recall = _begin_recall(q_BSHQD, k_BKTD, v_BKTE, state, grid, form, ranks, additions)
    local_BSHQE = _attend_segments(q_BSHQD, windows.k_BSKJD, windows.v_BSKJE, grid, rope)  # while memories travel
    recalled = recall()
    read_BSHQE = recalled.read_BSHQE
    assert read_BSHQE is not None
    if additions.norm is not None:
        read_BSHQE = additions.norm(read_BSHQE)
    if maps is not None:
        read_BSHQE = read_BSHQE + read_BSHQE @ maps.read_HEE
    beta_HQ = beta_H[:, None]
    if additions.gate_HD is not None:
        beta_HQ = beta_HQ + (q_BSHQD * additions.gate_HD[:, None].to(q_BSHQD.dtype)).sum(-1)
    if not additions.has_local:
        local_BSHQE = torch.zeros_like(local_BSHQE)
    visible_BSQ = recalled.visible_BSQ if additions.has_memory else torch.zeros_like(recalled.visible_BSQ)
    out_BSHQE = mix_by_gate(local_BSHQE, read_BSHQE, beta_HQ, visible_BSQ)  # Eq. 10
    return unfold_queries(out_BSHQE, grid), InfiniState(recalled.memory, windows.following())


def write_memory(
    k_BKTD: Tensor,
    v_BKTE: Tensor,
    state: InfiniState | None,
    grid: Grid,
    *,
    form: Form = PAPER,
    ranks: Ranks | None = None,
    additions: Additions = PLAIN,
) -> InfiniState:
    """The state that `infini_attention` leaves, where no output is needed; arguments as there."""
    windows, recall = _begin_recall(None, k_BKTD, v_BKTE, state, grid, form, ranks, additions)
    return InfiniState(recall().memory, windows.following())


def _begin_recall(  # noqa: PLR0913
    q_BSHQD: Tensor | None,
    k_BKTD: Tensor,
    v_BKTE: Tensor,
    state: InfiniState | None,
    grid: Grid,
    form: Form,
    ranks: Ranks | None,
    additions: Additions,
) -> tuple["_Windows", Callable[[], Recalled]]:
    """What local attention sees, and what is read of the memory once it is here."""
    windows = _open_windows(None if state is None else state.recent, k_BKTD, v_BKTE, grid, ranks)
    writing, maps = additions.writing, additions.maps

    def mapped(k: Tensor) -> Tensor:
        return k if maps is None else k + k @ maps.key_KDD

    if maps is not None and q_BSHQD is not None:
        q_BSHQD = q_BSHQD + q_BSHQD @ maps.query_HDD
    lanes, kv_heads, _, key_dim = k_BKTD.shape
    sizes = (lanes, kv_heads, key_dim, v_BKTE.shape[-1])
    if form.update == "gated_delta":
        assert writing is not None
        gated = empty_gated_memory(*sizes, k_BKTD, form.read) if state is None else state.memory
        assert isinstance(gated, GatedMemory)
        k_BSKQD, v_BSKQE = fold_queries(mapped(k_BKTD), grid), fold_queries(v_BKTE, grid)
        by_segment = tuple(fold_queries(part[..., None], grid)[..., 0] for part in writing)
        kernel = find_kernel(k_BSKQD, gated)
        begin = begin_gated if kernel is None else partial(begin_fused, kernel)
        return windows, begin(q_BSHQD, k_BSKQD, v_BSKQE, Writing(*by_segment), gated, grid, ranks)

    memory = empty_memory(*sizes, k_BKTD) if state is None else state.memory
    assert isinstance(memory, Memory)
    closed = closed_segments(mapped(windows.k_BKLD), grid), closed_segments(windows.v_BKLE, grid)
    scan = begin_scan(*closed, memory, grid, form, ranks)

    def read() -> Recalled:
        scanned = scan()
        visible_BSQ = grid.reads_BSQ & (scanned.written_BS > 0)[..., None]
        if q_BSHQD is None:
            return Recalled(None, visible_BSQ, scanned.final)
        group = q_BSHQD.shape[2] // k_BKTD.shape[1]
        # X: the rows of all query heads of a key-value head
        q_BSKXD = q_BSHQD.unflatten(2, (-1, group)).flatten(3, 4)
        read_BSKXE = read_memory(q_BSKXD, scanned, visible_BSQ.repeat(1, 1, group), form)
        return Recalled(read_BSKXE.unflatten(3, (group, -1)).flatten(2, 3), visible_BSQ, scanned.final)

    return windows, read


class _Windows(NamedTuple):
    """Carried and new keys and values joined; those that each segment sees, sinks first; and what to carry."""

    k_BKLD: Tensor
    v_BKLE: Tensor
    k_BSKJD: Tensor
    v_BSKJE: Tensor
    following: Callable[[], Recent]


def _open_windows(recent: Recent | None, k_BKTD: Tensor, v_BKTE: Tensor, grid: Grid, ranks: Ranks | None) -> _Windows:
    k_BKLD, v_BKLE, following = _join_recent(recent, k_BKTD, v_BKTE, grid, ranks)
    k_BSKJD, v_BSKJE = _key_windows(k_BKLD, grid), _key_windows(v_BKLE, grid)
    if grid.sinks is None:
        return _Windows(k_BKLD, v_BKLE, k_BSKJD, v_BSKJE, following)
    carried = None if recent is None else recent.sinks
    k_BSKZD, v_BSKZE, sinks = take_sinks(k_BKTD, v_BKTE, carried, grid.sinks, grid.shard, ranks)
    k_BSKJD, v_BSKJE = torch.cat((k_BSKZD, k_BSKJD), 3), torch.cat((v_BSKZE, v_BSKJE), 3)
    return _Windows(k_BKLD, v_BKLE, k_BSKJD, v_BSKJE, lambda: following()._replace(sinks=sinks))


def _join_recent(
    recent: Recent | None, k_BKTD: Tensor, v_BKTE: Tensor, grid: Grid, ranks: Ranks | None
) -> tuple[Tensor, Tensor, Callable[[], Recent]]:
    """`carry_recent`, whose carried tokens lie on the left neighbour, and whose next ones on the last rank.

    In one endless segment they lie on all ranks before this one, and nothing is carried to the next window.
    """
    overlap, (rank, size) = grid.overlap_tokens, grid.shard
    assert size == 1 or ranks is not None
    if ranks is not None and size > 1 and grid.closed == 0:
        k_BKLD, v_BKLE = _gather_before(k_BKTD, v_BKTE, rank, ranks)
        none = Recent(
            k_BKLD[:, :, :0], v_BKLE[:, :, :0], grid.carried_document_BR[:, :0], grid.carried_weight_BR[:, :0]
        )
        return k_BKLD, v_BKLE, lambda: none
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


def _gather_before(k_BKTD: Tensor, v_BKTE: Tensor, rank: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Keys and values of all ranks up to this one, in order."""
    joined_PBKTX = ranks.gather(torch.cat((k_BKTD, v_BKTE), -1))()
    joined_BKLX = joined_PBKTX[: rank + 1].movedim(0, 2).flatten(2, 3)
    k_BKLD, v_BKLE = joined_BKLX.split((k_BKTD.shape[-1], v_BKTE.shape[-1]), -1)
    return k_BKLD, v_BKLE


def mix_by_gate(local_BSHQE: Tensor, memory_BSHQE: Tensor, beta_HQ: Tensor, visible_BSQ: Tensor) -> Tensor:
    """sigmoid(beta) of what was remembered and the rest of the local result; all of the latter where nothing was.

    beta_HQ is broadcast to (B, S, H, Q): a number a head (H, 1), or one a query.
    """
    share_HQ = torch.sigmoid(beta_HQ.to(torch.promote_types(beta_HQ.dtype, torch.float32))).to(local_BSHQE.dtype)
    return torch.lerp(local_BSHQE, memory_BSHQE, (share_HQ * visible_BSQ[:, :, None])[..., None])


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
    q_rotated = rotate(q_BSHQD, grid.sink_tokens + grid.overlap_tokens + first_query, rope)
    k_rotated = rotate(k_BSKJD, 0, rope)
    if grid.runs is not None:
        return attend_runs(q_rotated, k_rotated, v_BSKJE, grid.runs)
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
