"""The compressive memory for all segments of a call at once (arXiv 2404.07143, Eq. 7 to 9).

Differs from the paper in form, not in value: the linear update is a segmented prefix sum, the delta update an affine
chain M_s = A_s M_{s-1} + B_s whose parts are computed for all segments together. A memory is empty by visibility
(nothing written since the document's start), never by testing a value. Equations as plain loops: reference.py.

When several ranks hold one window, each sums up its own run of segments as a map of the memory entering it. These maps
have a memory's size whatever the length. They are gathered on every rank, and both the memory entering a rank and the
one leaving the last rank are composed from them. Every rank computes with what all ranks gave, be it with weight 0: so
backward runs the same collectives everywhere.

Legend: B lanes, K key-value heads, D key size, E value size, S segments read, C segments closed (written), N tokens a
segment, Q query rows a segment (all query heads of one key-value head), F any flattened features, P ranks that hold the
window.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_train.ops.chain import affine_chain
from infini_train.ops.grid import Grid
from infini_train.ops.ranks import Ranks
from infini_train.ops.state import Stored

Read = Literal["segment", "token"]


class Form(NamedTuple):
    """How a memory is written and addressed; the default is the paper's."""

    update: Literal["linear", "delta", "gated_delta"] = "linear"  # Eq. 8, Eq. 9, or gated_delta.py
    features: Literal["elu", "sharp"] = "elu"  # sigma of keys and queries; not asked by gated_delta
    read: Read = "segment"  # what is older than the segment; or, with gated_delta, than the token


PAPER = Form()
# What every direction of a sharp feature has at least, before it is scaled, against a largest of D^2: the delta update
# divides one key by others, also by those that have no direction in common with it.
SHARP_FLOOR = 0.1
RMS_EPS = 1e-12  # a key of zeros has a level of zeros
# Only guards against underflow: a visible denominator is a sum of positive numbers.
TINY = 1e-30
# Segments summed by one masked product; longer calls go block by block, so that the cost stays linear in the length.
SCAN_BLOCK = 64


class Memory(NamedTuple):
    """What is left of everything older than the open segment: fixed size, fp32 (fp64 under fp64 activations).

    memory_BKDE and normaliser_BKD are the paper's M and z; written_B counts tokens written since the document's start
    (0: empty).
    """

    memory_BKDE: Annotated[Tensor, Stored("memory_BKDE", "lanes kv_heads key_dim value_dim")]
    normaliser_BKD: Annotated[Tensor, Stored("normaliser_BKD", "lanes kv_heads key_dim")]
    written_B: Annotated[Tensor, Stored("written_B", "lanes")]


class _Sigma(torch.autograd.Function):
    """ELU + 1 keeping only its result for backward: the slope is min(sigma, 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = x.clamp(max=0).exp_().add_(x.relu())
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return gradient * result.clamp(max=1)


def sigma(x: Tensor) -> Tensor:
    """ELU + 1, written so that it has no floor: `elu(x) + 1` is 6e-8 in fp32 and 0 in bf16 for very negative x."""
    return _Sigma.apply(x)  # type: ignore[no-untyped-call]


class _Sharp(torch.autograd.Function):
    """Keeps only its input for backward, as much as `_Sigma` keeps, and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        powers, _, _ = _raise(x)
        return F.normalize(powers, dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        powers, level, scale = _raise(x)
        length = powers.norm(dim=-1, keepdim=True)
        result = powers / length
        of_powers = (gradient - result * (gradient * result).sum(-1, keepdim=True)) / length
        of_level = of_powers * 4 * level.relu() ** 3
        return scale * (of_level - level * (level * of_level).mean(-1, keepdim=True))


def _raise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """relu(x / rms(x))^4 and a floor, x / rms(x), 1 / rms(x)."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS)
    level = x * scale
    return level.relu().square().square() + SHARP_FLOOR, level, scale


def sharp(x: Tensor) -> Tensor:
    """Positive features of which few are large: relu(x / rms(x))^4 and a floor, of unit length in the last dimension.

    Not the paper's. Random keys overlap less in the mean than under `sigma`, and every key counts alike, so that a
    memory holds more random pairs (benchmarks/capacity.py). A key without a positive number is the floor alone, and
    has no gradient.
    """
    return _Sharp.apply(x)  # type: ignore[no-untyped-call]


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"elu": sigma, "sharp": sharp}


def empty_memory(lanes: int, kv_heads: int, key_dim: int, value_dim: int, like: Tensor) -> Memory:
    """A memory in which nothing was written, in the state's dtype for activations like `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    zeros = torch.zeros
    return Memory(
        zeros(lanes, kv_heads, key_dim, value_dim, dtype=dtype, device=like.device),
        zeros(lanes, kv_heads, key_dim, dtype=dtype, device=like.device),
        zeros(lanes, dtype=dtype, device=like.device),
    )


def segmented_scan(initial_BF: Tensor, increment_BCF: Tensor, keep_BC: Tensor) -> Tensor:
    """States before, between and after the segments of x_c = keep_c x_{c-1} + increment_c.

    A masked sum, never a difference of prefix sums: a dropped memory must leave no trace, not a cancelled one.

    Args:
        initial_BF: state before the first segment.
        increment_BCF: what each segment adds.
        keep_BC: bool; False drops everything older.

    Returns:
        (B, C + 1, F): entry c enters segment c, the last one leaves them all.
    """
    states, state_BF = [], initial_BF
    for increment, keep in zip(increment_BCF.split(SCAN_BLOCK, 1), keep_BC.split(SCAN_BLOCK, 1), strict=True):
        items = torch.cat((state_BF[:, None], increment), 1)
        scanned = visible_items(keep).to(items.dtype) @ items
        states.append(scanned[:, :-1])
        state_BF = scanned[:, -1]
    return torch.cat((*states, state_BF[:, None]), 1)


def visible_items(keep_BC: Tensor) -> Tensor:
    """(B, C + 1, C + 1): item j (0: the initial state) is part of the state after i segments."""
    index = torch.arange(keep_BC.shape[1] + 1, device=keep_BC.device)
    oldest = torch.where(keep_BC, 0, index[1:]).cummax(1).values
    oldest = torch.cat((oldest.new_zeros(len(oldest), 1), oldest), 1)
    return (index <= index[:, None]) & (index >= oldest[..., None])


class Scanned(NamedTuple):
    """Memories entering the segments read (S of them), and the one after the call."""

    memory_BSKDE: Tensor
    normaliser_BSKD: Tensor
    written_BS: Tensor
    final: Memory


class _Writes(NamedTuple):
    """What the closed segments write: sigma(keys), the same times the weights, values, weights."""

    feature_BCKND: Tensor
    weighted_BCKND: Tensor
    v_BCKNE: Tensor
    weight_BC1N1: Tensor


# Waits for the other ranks and gives the states entering this rank and leaving the last one; None on one rank, where
# the last state of the scan is the one that leaves.
_Crossing = Callable[[], tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]]


def begin_scan(
    k_BCKND: Tensor, v_BCKNE: Tensor, initial: Memory, grid: Grid, form: Form, ranks: Ranks | None = None
) -> Callable[[], Scanned]:
    """Writes the closed segments (Eq. 8 and 9) and starts what has to travel between ranks.

    Args:
        k_BCKND: keys of the closed segments, without rotary embedding.
        v_BCKNE: their values.
        initial: memory entering the window, the same on all ranks.
        grid: weights, document starts.
        form: how they are written; they must be read with the same.
        ranks: how memory travels between the ranks of `grid.shard`; not asked on one rank.

    Returns:
        A function that waits for the other ranks and returns the memory that entered each segment; call it after
        whatever can be computed in the meantime.
    """
    if grid.closed == 0:  # a few tokens of generation: nothing to write yet
        return lambda: _leave(Memory(*(state[:, None] for state in initial)), None, grid)
    dtype = initial.memory_BKDE.dtype
    feature = FEATURES[form.features](k_BCKND)
    weight_BC1N1 = grid.write_BCN[:, :, None, :, None]
    writes = _Writes(feature, feature * weight_BC1N1.to(feature.dtype), v_BCKNE, weight_BC1N1)
    z_increment_BCF = _join_count(writes.weighted_BCKND.sum(-2, dtype=dtype), grid.count_BC.to(dtype))
    return _UPDATES[form.update](writes, z_increment_BCF, initial, grid, ranks)


def _begin_linear(
    writes: _Writes, z_increment_BCF: Tensor, initial: Memory, grid: Grid, ranks: Ranks | None
) -> Callable[[], Scanned]:
    """M, z and the count in one sum: one exchange."""
    shape = initial.memory_BKDE.shape[1:]
    increments = (_sum_products(writes, initial).flatten(2), z_increment_BCF)
    starts = (initial.memory_BKDE.flatten(1), _join_count(initial.normaliser_BKD, initial.written_B))
    crossing = _begin_sum(increments, starts, grid, ranks)

    def finish() -> Scanned:
        entering, leaving = crossing()
        m_states, z_states = (
            segmented_scan(state, increment, grid.keep_BC)
            for state, increment in zip(entering, increments, strict=True)
        )
        final = None if leaving is None else Memory(leaving[0].unflatten(1, shape), *_split_count(leaving[1], shape))
        return _leave(Memory(m_states.unflatten(2, shape), *_split_count(z_states, shape)), final, grid)

    return finish


def _begin_delta(
    writes: _Writes, z_increment_BCF: Tensor, initial: Memory, grid: Grid, ranks: Ranks | None
) -> Callable[[], Scanned]:
    """What a segment forgets of M depends on the z that enters it, so z and the count go first: two exchanges."""
    shape = initial.memory_BKDE.shape[1:]
    z_start = _join_count(initial.normaliser_BKD, initial.written_B)
    z_crossing = _begin_sum((z_increment_BCF,), (z_start,), grid, ranks)
    increment = _sum_products(writes, initial)
    (z_entering,), z_leaving = z_crossing()
    z_states, count_states = _split_count(segmented_scan(z_entering, z_increment_BCF, grid.keep_BC), shape)
    visible_BC = grid.keep_BC & (count_states[:, :-1] > 0)
    transition = _delta_transition(writes, z_states[:, :-1] + _sum_repeats(writes), visible_BC, grid.keep_BC)
    m_crossing = _begin_affine(transition, increment, initial.memory_BKDE, grid, ranks)

    def finish() -> Scanned:
        (entering,), leaving = m_crossing()
        final = None
        if leaving is not None and z_leaving is not None:
            final = Memory(leaving[0], *_split_count(z_leaving[0], shape))
        return _leave(Memory(_affine_chain(transition, increment, entering), z_states, count_states), final, grid)

    return finish


_UPDATES = {"linear": _begin_linear, "delta": _begin_delta}


def _leave(states: Memory, final: Memory | None, grid: Grid) -> Scanned:
    """Splits the states (B, C + 1, ...) into those that are read and the one after the call.

    On one rank that is the last of them, less what the open segment dropped; `final` is what leaves the last rank.
    """
    if final is None:
        m_last, z_last, count_last = (state[:, -1] for state in states)
        keep = grid.keep_open_B.to(m_last.dtype)
        final = Memory(m_last * keep[:, None, None, None], z_last * keep[:, None, None], count_last * keep)
    read = slice(0, grid.segments)
    return Scanned(states.memory_BKDE[:, read], states.normaliser_BKD[:, read], states.written_B[:, read], final)


def _sum_products(writes: _Writes, initial: Memory) -> Tensor:
    """sigma(K)^T V of each segment (B, C, K, D, E), in the memory's dtype."""
    return (writes.weighted_BCKND.transpose(-1, -2) @ writes.v_BCKNE).to(initial.memory_BKDE.dtype)


def _sum_repeats(writes: _Writes) -> Tensor:
    """What weights above 1 add to z while their segment is written (B, C, K, D): see `_delta_transition`."""
    repeats_BC11N = (writes.weight_BC1N1 - 1).clamp_min(0).transpose(-1, -2)
    dtype = torch.promote_types(writes.feature_BCKND.dtype, torch.float32)
    return (repeats_BC11N.to(dtype) @ writes.feature_BCKND.to(dtype))[..., 0, :]


def _join_count(z_KD: Tensor, count: Tensor) -> Tensor:
    """(..., K D + 1): z, then the count of written tokens."""
    return torch.cat((z_KD.flatten(-2), count[..., None]), -1)


def _split_count(z_F: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    return z_F[..., :-1].unflatten(-1, shape[:2]), z_F[..., -1]


def _begin_sum(
    increments_BCF: tuple[Tensor, ...], starts_BF: tuple[Tensor, ...], grid: Grid, ranks: Ranks | None
) -> _Crossing:
    """Several sums, exchanged as one. Which ranks' sums are dropped follows from the marks."""
    rank, size = grid.shard
    if ranks is None or size == 1 or grid.keep_BP is None:
        return lambda: (starts_BF, None)
    index = torch.arange(1, grid.closed + 1, device=grid.keep_BC.device)
    dropped_B = torch.where(grid.keep_BC, 0, index).amax(1)  # all before the last start
    stays_B1C = (index >= dropped_B[:, None]).to(starts_BF[0].dtype)[:, None]
    gathered = ranks.gather(torch.cat([(stays_B1C @ increment)[:, 0] for increment in increments_BCF], 1))
    ends_B2P = visible_items(grid.keep_BP)[:, [rank, size]].to(starts_BF[0].dtype)

    def finish() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        start_BF = torch.cat(starts_BF, 1)
        ends_B2F = ends_B2P[:, :, 1:] @ gathered().transpose(0, 1) + ends_B2P[:, :, :1] * start_BF[:, None]
        sizes = [start.shape[1] for start in starts_BF]
        return ends_B2F[:, 0].split(sizes, 1), ends_B2F[:, 1].split(sizes, 1)

    return finish


def _begin_affine(
    transition_BCKDD: Tensor, increment_BCKDE: Tensor, start_BKDE: Tensor, grid: Grid, ranks: Ranks | None
) -> _Crossing:
    """M -> A M + b, exchanged as one tensor; A is 0 where a document starts."""
    rank, size = grid.shard
    if ranks is None or size == 1:
        return lambda: ((start_BKDE,), None)
    gathered = ranks.gather(_affine_totals(transition_BCKDD, increment_BCKDE))

    def finish() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        a_BPKDD, b_BPKDE = gathered().transpose(0, 1).split((start_BKDE.shape[2], start_BKDE.shape[3]), -1)
        states = _affine_chain(a_BPKDD, b_BPKDE, start_BKDE)
        return (states[:, rank],), (states[:, size],)

    return finish


def _delta_transition(writes: _Writes, z_BCKD: Tensor, visible_BC: Tensor, keep_BC: Tensor) -> Tensor:
    """I - sigma(K)^T diag(w / (sigma(K) z)) sigma(K): 0 where a document starts, I while the memory is empty.

    z is the normaliser entering the segment. A weight w > 1 means that the segment is read w times in a row, each
    time with the z that the times before have left; z_BCKD then holds what all but the last have added. For keys in one
    direction that is exactly the product of w transitions; and it never takes back more of M than there is, as w
    times the quotient of one reading would.
    """
    feature = writes.feature_BCKND.to(z_BCKD.dtype)  # the chain multiplies errors: fp32 throughout
    visible = visible_BC[:, :, None, None, None]
    denominator = torch.where(visible, feature @ z_BCKD[..., None], 1.0).clamp_min(TINY)
    # Two square roots instead of one quotient: its gradient would divide by the denominator's square and overflow.
    weight_BC1N1 = torch.where(visible, writes.weight_BC1N1.to(feature.dtype), 0.0)
    share = feature * weight_BC1N1.sqrt() / denominator.sqrt()
    identity = torch.eye(feature.shape[-1], dtype=feature.dtype, device=feature.device)
    return (identity - share.transpose(-1, -2) @ share) * keep_BC[:, :, None, None, None].to(feature.dtype)


def _affine_chain(transition_BCKDD: Tensor, increment_BCKDE: Tensor, entering_BKDE: Tensor) -> Tensor:
    """All states of M_c = A_c M_{c-1} + B_c: (B, C + 1, K, D, E)."""
    parts = (part.transpose(0, 1).flatten(1, 2) for part in (transition_BCKDD, increment_BCKDE))
    states = affine_chain(entering_BKDE.flatten(0, 1), *parts)
    return states.unflatten(1, entering_BKDE.shape[:2]).transpose(0, 1)


def _affine_totals(transition_BCKDD: Tensor, increment_BCKDE: Tensor) -> Tensor:
    """The map of all segments (B, K, D, D + E), A and then b."""
    identity = torch.eye(transition_BCKDD.shape[-1], dtype=increment_BCKDE.dtype, device=increment_BCKDE.device)
    start_BKDX = F.pad(identity, (0, increment_BCKDE.shape[-1])).expand(*transition_BCKDD[:, 0].shape[:3], -1)
    increment_BCKDX = F.pad(increment_BCKDE, (len(identity), 0))
    return _affine_chain(transition_BCKDD, increment_BCKDX, start_BKDX)[:, -1]


def read_memory(q_BSKQD: Tensor, scanned: Scanned, visible_BSQ: Tensor, form: Form) -> Tensor:
    """A_mem = sigma(Q) M / (sigma(Q) z) (Eq. 7): (B, S, K, Q, E); 0 where the memory is invisible.

    visible_BSQ is made safe before the division, so that an invisible read has no gradient either.
    """
    feature = FEATURES[form.features](q_BSKQD)
    dtype = feature.dtype
    visible = visible_BSQ[:, :, None, :, None]
    denominator = feature @ scanned.normaliser_BSKD[..., None].to(dtype)
    denominator = torch.where(visible, denominator, 1.0).clamp_min(TINY)
    return torch.where(visible, feature @ scanned.memory_BSKDE.to(dtype) / denominator, 0.0)
