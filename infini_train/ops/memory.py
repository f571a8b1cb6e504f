"""The compressive memory for all segments of a call at once (arXiv 2404.07143, Eq. 7 to 9).

Differs from the paper in form, not in value: the linear update is a segmented prefix sum, the delta update an affine
chain M_s = A_s M_{s-1} + B_s whose parts are computed for all segments together. A memory is empty by visibility
(nothing written since the document's start), never by testing a value. Equations as plain loops: reference.py.

Legend: B lanes, K key-value heads, D key size, E value size, S segments read, C segments closed (written), N tokens a
    segment,
Q query rows a segment (all query heads of one key-value head), F any flattened features.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from infini_train.ops.grid import Grid

Update = Literal["linear", "delta"]

# Only guards against underflow: a visible denominator is a sum of positive numbers.
TINY = 1e-30
# Segments summed by one masked product; longer calls go block by block, so that the cost stays linear in the length.
SCAN_BLOCK = 64


class Memory(NamedTuple):
    """What is left of everything older than the open segment: fixed size, fp32 (fp64 under fp64 activations).

    memory_BKDE and normaliser_BKD are the paper's M and z; written_B counts tokens written since the document's start
    (0: empty).
    """

    memory_BKDE: Tensor
    normaliser_BKD: Tensor
    written_B: Tensor


class Ranks(Protocol):
    """How memories of consecutive runs of segments meet, when several ranks hold one sequence.

    Each rank sums up its own run as an affine map of the memory entering it; `totals` is called only by who needs the
    map.
    """

    def entering_sum(self, totals: Callable[[], tuple[Tensor, Tensor]], initial_BF: Tensor) -> Tensor:
        """Memory entering this rank, for x -> keep_B * x + increment_BF; totals gives (keep_B, increment_BF)."""
        ...

    def entering_affine(self, totals: Callable[[], tuple[Tensor, Tensor]], initial_BKDE: Tensor) -> Tensor:
        """Memory entering this rank, for M -> A M + b; totals gives (A_BKDD, b_BKDE)."""
        ...

    def leaving(self, final: Memory) -> Memory:
        """The last rank's final memory, on every rank."""
        ...


class OneRank:
    """The whole sequence lies here: what enters is what the caller gave."""

    def entering_sum(self, totals: Callable[[], tuple[Tensor, Tensor]], initial_BF: Tensor) -> Tensor:
        """The initial memory itself."""
        return initial_BF

    def entering_affine(self, totals: Callable[[], tuple[Tensor, Tensor]], initial_BKDE: Tensor) -> Tensor:
        """The initial memory itself."""
        return initial_BKDE

    def leaving(self, final: Memory) -> Memory:
        """The final memory itself."""
        return final


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
        scanned = _visible_items(keep).to(items.dtype) @ items
        states.append(scanned[:, :-1])
        state_BF = scanned[:, -1]
    return torch.cat((*states, state_BF[:, None]), 1)


def _visible_items(keep_BC: Tensor) -> Tensor:
    """(B, C + 1, C + 1): item j (0: the initial state) is part of the state after i segments."""
    index = torch.arange(keep_BC.shape[1] + 1, device=keep_BC.device)
    oldest = torch.where(keep_BC, 0, index[1:]).cummax(1).values
    oldest = torch.cat((torch.zeros_like(oldest[:, :1]), oldest), 1)
    return (index <= index[:, None]) & (index >= oldest[..., None])


class Scanned(NamedTuple):
    """Memories entering the segments read (S of them), and the one left behind by the call."""

    memory_BSKDE: Tensor
    normaliser_BSKD: Tensor
    written_BS: Tensor
    final: Memory


def scan_memory(k_BCKND: Tensor, v_BCKNE: Tensor, initial: Memory, grid: Grid, update: Update, ranks: Ranks) -> Scanned:
    """Writes the closed segments and returns the memory that entered each segment (Eq. 8 and 9).

    Args:
        k_BCKND: keys of the closed segments, without rotary embedding.
        v_BCKNE: their values.
        initial: memory entering the call.
        grid: weights, document starts.
        update: "linear" (Eq. 8) or "delta" (Eq. 9).
        ranks: how memory travels between ranks.
    """
    if grid.closed == 0:  # a few tokens of generation: nothing to write yet
        return _leave(
            initial.memory_BKDE[:, None], initial.normaliser_BKD[:, None], initial.written_B[:, None], grid, ranks
        )
    dtype = initial.memory_BKDE.dtype
    feature = sigma(k_BCKND)
    weight_BC1N1 = grid.write_BCN[:, :, None, :, None]
    written_feature = feature * weight_BC1N1.to(feature.dtype)
    z_states, count_states = _scan_normaliser(written_feature, initial, grid, ranks)
    increment = (written_feature.transpose(-1, -2) @ v_BCKNE).to(dtype)
    if update == "linear":
        entering = ranks.entering_sum(
            lambda: _sum_totals(increment.flatten(2), grid.keep_BC), initial.memory_BKDE.flatten(1)
        )
        states = segmented_scan(entering, increment.flatten(2), grid.keep_BC)
        m_states = states.unflatten(2, initial.memory_BKDE.shape[1:])
    else:
        visible_BC = grid.keep_BC & (count_states[:, :-1] > 0)
        transition = _delta_transition(feature, weight_BC1N1, z_states[:, :-1], visible_BC, grid.keep_BC)
        entering = ranks.entering_affine(lambda: _affine_totals(transition, increment), initial.memory_BKDE)
        m_states = _affine_chain(transition, increment, entering)
    return _leave(m_states, z_states, count_states, grid, ranks)


def _leave(m_states: Tensor, z_states: Tensor, count_states: Tensor, grid: Grid, ranks: Ranks) -> Scanned:
    """Splits the states into those that are read and the one left behind, less what the open segment dropped."""
    keep = grid.keep_open_B.to(m_states.dtype)
    final = Memory(
        m_states[:, -1] * keep[:, None, None, None], z_states[:, -1] * keep[:, None, None], count_states[:, -1] * keep
    )
    read = slice(0, grid.segments)
    return Scanned(m_states[:, read], z_states[:, read], count_states[:, read], ranks.leaving(final))


def _scan_normaliser(written_feature: Tensor, initial: Memory, grid: Grid, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """States of z, (B, C + 1, K, D), and of the count of written tokens, (B, C + 1), around the segments."""
    dtype = initial.normaliser_BKD.dtype
    z_increment = written_feature.sum(-2, dtype=dtype)
    increment = torch.cat((z_increment.flatten(2), grid.count_BC[..., None].to(dtype)), 2)
    start = torch.cat((initial.normaliser_BKD.flatten(1), initial.written_B[:, None]), 1)
    entering = ranks.entering_sum(lambda: _sum_totals(increment, grid.keep_BC), start)
    states = segmented_scan(entering, increment, grid.keep_BC)
    return states[..., :-1].unflatten(2, initial.normaliser_BKD.shape[1:]), states[..., -1]


def _sum_totals(increment_BCF: Tensor, keep_BC: Tensor) -> tuple[Tensor, Tensor]:
    initial = torch.zeros_like(increment_BCF[:, 0])
    return keep_BC.all(1).to(increment_BCF.dtype), segmented_scan(initial, increment_BCF, keep_BC)[:, -1]


def _delta_transition(
    feature_BCKND: Tensor, weight_BC1N1: Tensor, z_BCKD: Tensor, visible_BC: Tensor, keep_BC: Tensor
) -> Tensor:
    """I - sigma(K)^T diag(w / (sigma(K) z)) sigma(K): 0 where a document starts, I while the memory is empty."""
    feature = feature_BCKND.to(z_BCKD.dtype)  # the chain multiplies errors: fp32 throughout
    visible = visible_BC[:, :, None, None, None]
    denominator = torch.where(visible, feature @ z_BCKD[..., None], 1.0).clamp_min(TINY)
    # Two square roots instead of one quotient: its gradient would divide by the denominator's square and overflow.
    share = feature * torch.where(visible, weight_BC1N1.to(feature.dtype), 0.0).sqrt() / denominator.sqrt()
    identity = torch.eye(feature.shape[-1], dtype=feature.dtype, device=feature.device)
    return (identity - share.transpose(-1, -2) @ share) * keep_BC[:, :, None, None, None].to(feature.dtype)


def _affine_chain(transition_BCKDD: Tensor, increment_BCKDE: Tensor, entering_BKDE: Tensor) -> Tensor:
    """All states of M_c = A_c M_{c-1} + B_c: (B, C + 1, K, D, E). The only loop: one D x D product a segment."""
    states = [entering_BKDE]
    for transition, increment in zip(transition_BCKDD.unbind(1), increment_BCKDE.unbind(1), strict=True):
        states.append(torch.matmul(transition, states[-1]) + increment)
    return torch.stack(states, 1)


def _affine_totals(transition_BCKDD: Tensor, increment_BCKDE: Tensor) -> tuple[Tensor, Tensor]:
    total_a, total_b = transition_BCKDD[:, 0], increment_BCKDE[:, 0]
    for transition, increment in zip(transition_BCKDD.unbind(1)[1:], increment_BCKDE.unbind(1)[1:], strict=True):
        total_a, total_b = transition @ total_a, transition @ total_b + increment
    return total_a, total_b


def read_memory(q_BSKQD: Tensor, scanned: Scanned, visible_BSQ: Tensor) -> Tensor:
    """A_mem = sigma(Q) M / (sigma(Q) z) (Eq. 7): (B, S, K, Q, E); 0 where the memory is invisible.

    visible_BSQ is made safe before the division, so that an invisible read has no gradient either.
    """
    feature = sigma(q_BSKQD)
    dtype = feature.dtype
    visible = visible_BSQ[:, :, None, :, None]
    denominator = feature @ scanned.normaliser_BSKD[..., None].to(dtype)
    denominator = torch.where(visible, denominator, 1.0).clamp_min(TINY)
    return torch.where(visible, feature @ scanned.memory_BSKDE.to(dtype) / denominator, 0.0)
