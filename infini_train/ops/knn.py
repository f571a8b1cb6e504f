"""Exact attention to the best of stored keys and values (Memorizing Transformers, arXiv 2203.08913, section 3.1).

A segment retrieves from the M places before it, and only then are its own keys and values stored; no gradient goes into
the store. Places of other documents are invisible. The search is exact and goes part by part, so that its memory stays
bounded; backward gathers what was found once more instead of keeping it.

Legend: B lanes, H query heads, K key-value heads, T tokens, S segments read, C segments closed (stored), N tokens a
segment, Q queries a segment, X the query rows of all heads that share a key-value head, M places of the store, P places
of the store and of the closed segments, J places retrieved, D key size, E value size.
"""

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from infini_train.ops.attention import closed_segments, fold_queries
from infini_train.ops.grid import Grid, Recent, carry_recent
from infini_train.ops.memory import visible_items
from infini_train.ops.state import Stored

# Scores, or gathered keys and values, that exist at once: 64 MiB in fp32.
PART_NUMBERS = 2**24


class Store(NamedTuple):
    """The last M places of the closed segments, oldest first.

    k_BKMD and v_BKME carry no rotary embedding and no gradient. weight_BM (fp32) is 0 where nothing is to be seen.
    """

    k_BKMD: Annotated[Tensor, Stored("k_BKMD", "lanes kv_heads places key_dim")]
    v_BKME: Annotated[Tensor, Stored("v_BKME", "lanes kv_heads places value_dim")]
    weight_BM: Annotated[Tensor, Stored("weight_BM", "lanes places")]


class MemorizingState(NamedTuple):
    """All that a retrieving layer remembers."""

    store: Annotated[Store, Stored("store")]
    recent: Annotated[Recent, Stored("recent")]


def empty_store(lanes: int, heads: int, sizes: tuple[int, int], stored_tokens: int, like: Tensor) -> Store:
    """A store of invisible places; sizes are (D, E), `like` gives dtype and device."""
    return Store(
        like.new_zeros(lanes, heads, stored_tokens, sizes[0]),
        like.new_zeros(lanes, heads, stored_tokens, sizes[1]),
        torch.zeros(lanes, stored_tokens, dtype=torch.float32, device=like.device),
    )


class Retrieved(NamedTuple):
    """memory_BSHQE: what each query found; visible_BSQ: whether there was anything to find; the next store."""

    memory_BSHQE: Tensor
    visible_BSQ: Tensor
    store: Store


def retrieve(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, state: MemorizingState, grid: Grid, top_k: int
) -> Retrieved:
    """Softmax attention of each query to the `top_k` visible places with the highest scores, without positions.

    Args:
        q_BHTD: queries; they alone get a gradient.
        k_BKTD: keys of the call.
        v_BKTE: values.
        state: before the call.
        grid: of this call.
        top_k: places a query attends to; all visible ones where there are fewer.
    """
    places = state.store.weight_BM.shape[1]
    visible_BSP = _visible_places(state.store, grid)
    k_BKPD, v_BKPE = state.store.k_BKMD, state.store.v_BKME
    if grid.closed:
        k_BKLD, v_BKLE, _ = carry_recent(state.recent, k_BKTD, v_BKTE, grid)
        k_BKPD, v_BKPE = (
            torch.cat((old, closed_segments(new.detach(), grid).transpose(1, 2).flatten(2, 3)), 2)
            for old, new in ((k_BKPD, k_BKLD), (v_BKPE, v_BKLE))
        )
    q_BSHQD = fold_queries(q_BHTD, grid)
    q_BSKXD = q_BSHQD.unflatten(2, (k_BKTD.shape[1], -1)).flatten(3, 4)
    found, something = [], []
    for segment in range(grid.segments):
        window = slice(segment * grid.segment_tokens, segment * grid.segment_tokens + places)
        visible_BM = visible_BSP[:, segment, window]
        inputs = (q_BSKXD[:, segment], k_BKPD[:, :, window], v_BKPE[:, :, window], visible_BM)
        found.append(_TopAttention.apply(*inputs, min(top_k, places)))  # type: ignore[no-untyped-call]
        something.append(visible_BM.any(1))
    memory_BSHQE = torch.stack(found, 1).unflatten(3, (-1, q_BSHQD.shape[3])).flatten(2, 3)
    last = slice(visible_BSP.shape[2] - places, None)
    weight_BM = (visible_BSP[:, -1, last] & grid.keep_open_B[:, None]).float()
    kept = (k_BKPD[:, :, last], v_BKPE[:, :, last])
    if grid.closed:  # a view would keep the keys and values of the whole window alive
        kept = (kept[0].clone(), kept[1].clone())
    return Retrieved(memory_BSHQE, grid.reads_BSQ & torch.stack(something, 1)[..., None], Store(*kept, weight_BM))


def _visible_places(store: Store, grid: Grid) -> Tensor:
    """(B, C + 1, P): what may be seen before, between and after the closed segments, but for what is not yet stored."""
    weight_BP = torch.cat((store.weight_BM, grid.write_BCN.flatten(1)), 1)
    item_P = torch.zeros(weight_BP.shape[1], dtype=torch.int64, device=weight_BP.device)
    item_P[store.weight_BM.shape[1] :] = torch.arange(1, grid.closed + 1, device=weight_BP.device).repeat_interleave(
        grid.write_BCN.shape[2]
    )
    return visible_items(grid.keep_BC)[:, :, item_P] & (weight_BP > 0)[:, None]


class _TopAttention(torch.autograd.Function):
    """out_BKXE; the gradient of the queries alone."""

    @staticmethod
    def forward(ctx: Any, q_BKXD: Tensor, k_BKMD: Tensor, v_BKME: Tensor, visible_BM: Tensor, top_k: int) -> Tensor:
        precise = torch.promote_types(q_BKXD.dtype, torch.float32)
        hidden_B1M, anything_B = ~visible_BM[:, None, None], visible_BM.any(1)[:, None, None, None]
        out, indices, shares = [], [], []
        for q_part in q_BKXD.split(_part_rows(k_BKMD, v_BKME, top_k), 2):
            scores = (q_part @ k_BKMD.transpose(-1, -2)).to(precise) * k_BKMD.shape[-1] ** -0.5
            best = scores.masked_fill_(hidden_B1M, -torch.inf).topk(top_k, -1)
            share = torch.where(anything_B, best.values, 0.0).softmax(-1) * anything_B
            out.append(torch.einsum("bkxj,bkxje->bkxe", share.to(v_BKME.dtype), _gather(v_BKME, best.indices)))
            indices.append(best.indices)
            shares.append(share)
        ctx.save_for_backward(k_BKMD, v_BKME, torch.cat(indices, 2), torch.cat(shares, 2))
        return torch.cat(out, 2)

    @staticmethod
    def backward(ctx: Any, gradient_BKXE: Tensor) -> tuple[Tensor | None, ...]:
        k_BKMD, v_BKME, index_BKXJ, share_BKXJ = ctx.saved_tensors
        found = []
        parts = [x.split(_part_rows(k_BKMD, v_BKME, index_BKXJ.shape[-1]), 2) for x in (gradient_BKXE, index_BKXJ)]
        shares = share_BKXJ.split(parts[0][0].shape[2], 2)
        for gradient, index, share in zip(*parts, shares, strict=True):
            slope = torch.einsum("bkxe,bkxje->bkxj", gradient, _gather(v_BKME, index)).to(share.dtype)
            slope = share * (slope - (share * slope).sum(-1, keepdim=True)) * k_BKMD.shape[-1] ** -0.5
            found.append(torch.einsum("bkxj,bkxjd->bkxd", slope.to(k_BKMD.dtype), _gather(k_BKMD, index)))
        return torch.cat(found, 2), None, None, None, None


def _part_rows(k_BKMD: Tensor, v_BKME: Tensor, top_k: int) -> int:
    lanes, heads, places, key_dim = k_BKMD.shape
    return max(1, PART_NUMBERS // (lanes * heads * max(places, top_k * max(key_dim, v_BKME.shape[-1]))))


def _gather(x_BKMD: Tensor, index_BKXJ: Tensor) -> Tensor:
    """(B, K, X, J, D): whole rows, which is three times as fast on a CPU as `torch.gather`."""
    lanes, heads = (torch.arange(size, device=x_BKMD.device) for size in x_BKMD.shape[:2])
    return x_BKMD[lanes[:, None, None, None], heads[:, None, None], index_BKXJ]
