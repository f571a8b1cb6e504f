"""Attention sinks: the first tokens of a document, which local attention sees from everywhere in it.

A softmax has to put its weight somewhere, and a trained model puts what it has no use for on the first tokens that it
sees (arXiv 2309.17453). A segment that begins at its own first token has such a place; one that also looks back has
lost it. Here the first Z tokens of the document stay visible, at the positions right before all else that the segment
sees.

Only what lies before a segment's window of keys is added: whatever is in the window is seen there, once. So a segment
needs the sinks of one document at most, the one that was being read just before its window.

Places count from the first token of the call (of the rank's shard); those before it are negative. A document is known
by the place of its first token.

Legend: as in grid.py; Z sinks, P ranks that hold the window, X keys and values side by side.
"""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from infini_train.ops.ranks import Ranks
from infini_train.ops.state import Stored

NEVER = -(2**30)


class Sinks(NamedTuple):
    """The sinks of the document being read, as far as they were read, and the place of its first token (int64)."""

    k_BKZD: Annotated[Tensor, Stored("k_BKZD", "lanes kv_heads tokens key_dim")]
    v_BKZE: Annotated[Tensor, Stored("v_BKZE", "lanes kv_heads tokens value_dim")]
    start_B: Annotated[Tensor, Stored("start_B", "lanes")]


class SinkGrid(NamedTuple):
    """Where the sinks of one call lie. An index counts the Z that are known from before, then the call's own tokens.

    index_BSZ and seen_BSQZ are of each segment and its queries. starts_BP is the place of the first token of the
    document being read before the shard of each rank, and after the last: relative to the window. The state after
    the call is known from it.
    """

    index_BSZ: Tensor
    seen_BSQZ: Tensor
    starts_BP: Tensor


def no_sinks(k_shape: tuple[int, int, int], value_dim: int, sink_tokens: int, like: Tensor) -> Sinks | None:
    """The sinks before anything was read; None where there are to be none. k_shape is (B, K, D)."""
    if sink_tokens == 0:
        return None
    lanes, heads, key_dim = k_shape
    return Sinks(
        like.new_zeros(lanes, heads, sink_tokens, key_dim),
        like.new_zeros(lanes, heads, sink_tokens, value_dim),
        torch.zeros(lanes, dtype=torch.int64, device=like.device),
    )


class Cuts(NamedTuple):
    """How a call is cut, in tokens; `shard` is (rank, ranks)."""

    segments: int
    segment_tokens: int
    overlap_tokens: int
    open_tokens: int
    sink_tokens: int
    shard: tuple[int, int]


def find_sinks(starts_BT: Tensor, carried: Sinks | None, cuts: Cuts) -> SinkGrid:
    """The sinks of a call, from the document starts of the whole window."""
    lanes, window = starts_BT.shape
    rank, ranks = cuts.shard
    tokens, device = window // ranks, starts_BT.device
    place_T = torch.arange(window, device=device)
    carried_B = torch.zeros(lanes, dtype=torch.int64, device=device) if carried is None else carried.start_B.to(device)
    begun_BT = torch.where(starts_BT, place_T, NEVER).cummax(1).values
    start_BT = torch.where(begun_BT < 0, carried_B[:, None], begun_BT)
    starts_BP = torch.cat((carried_B[:, None], start_BT[:, tokens - 1 :: tokens]), 1)

    first = rank * tokens
    before_B1 = starts_BP[:, rank, None] - first
    own_BT = start_BT[:, first : first + tokens] - first
    # The first place that each segment sees without sinks, and the document just before it.
    edge_S = torch.arange(cuts.segments, device=device) * cuts.segment_tokens - cuts.open_tokens - cuts.overlap_tokens
    known_BX = torch.cat((before_B1, own_BT), 1)
    document_BS = known_BX[:, edge_S.clamp(0, tokens)]
    # Z places up to the last sink that lies before the edge; where there are fewer sinks, the first places are unused.
    last_BS = torch.minimum(document_BS + cuts.sink_tokens, edge_S)
    place_BSZ = last_BS[..., None] + torch.arange(-cuts.sink_tokens, 0, device=device)
    is_sink_BSZ = place_BSZ >= document_BS[..., None]
    index_BSZ = torch.where(place_BSZ < 0, place_BSZ - document_BS[..., None], place_BSZ + cuts.sink_tokens)

    query_BSQ = own_BT[:, None]
    if cuts.segments > 1:
        padding = cuts.segments * cuts.segment_tokens - cuts.open_tokens - tokens
        query_BSQ = torch.cat((before_B1.expand(-1, cuts.open_tokens), own_BT, own_BT[:, -1:].expand(-1, padding)), 1)
        query_BSQ = query_BSQ.unflatten(1, (cuts.segments, cuts.segment_tokens))
    seen_BSQZ = (query_BSQ == document_BS[..., None])[..., None] & is_sink_BSZ[:, :, None]
    return SinkGrid(torch.where(is_sink_BSZ, index_BSZ, 0), seen_BSQZ, starts_BP)


def take_sinks(
    k_BKTD: Tensor, v_BKTE: Tensor, carried: Sinks | None, grid: SinkGrid, shard: tuple[int, int], ranks: Ranks | None
) -> tuple[Tensor, Tensor, Sinks]:
    """Keys and values of each segment's sinks, (B, S, K, Z, ...), and the sinks after the window."""
    (lanes, heads, tokens, key_dim), value_dim = k_BKTD.shape, v_BKTE.shape[-1]
    rank, size = shard
    sinks = grid.index_BSZ.shape[-1]
    carried = carried or no_sinks((lanes, heads, key_dim), value_dim, sinks, k_BKTD)
    assert carried is not None
    own_BKTX, carried_BKZX = torch.cat((k_BKTD, v_BKTE), -1), torch.cat((carried.k_BKZD, carried.v_BKZE), -1)
    place_BPZ = grid.starts_BP[..., None] + torch.arange(sinks, device=own_BKTX.device)

    # What this rank has of the documents being read before each shard, and after the last.
    own_BPZ = place_BPZ - rank * tokens
    found_BKPZX = _pick(own_BKTX, own_BPZ.clamp(0, tokens - 1).flatten(1)).unflatten(2, own_BPZ.shape[1:])
    has_BPZ = (own_BPZ >= 0) & (own_BPZ < tokens)
    found_BKPZX = torch.where(has_BPZ[:, None, ..., None], found_BKPZX, 0)
    if size > 1:
        assert ranks is not None
        found_BKPZX = ranks.gather(found_BKPZX)().sum(0)
    found_BKPZX = torch.where((place_BPZ < 0)[:, None, ..., None], carried_BKZX[:, :, None], found_BKPZX)

    known_BKLX = torch.cat((found_BKPZX[:, :, rank], own_BKTX), 2)
    picked_BKSZX = _pick(known_BKLX, grid.index_BSZ.flatten(1)).unflatten(2, grid.index_BSZ.shape[1:])
    k_BSKZD, v_BSKZE = picked_BKSZX.transpose(1, 2).split((key_dim, value_dim), -1)
    k_BKZD, v_BKZE = found_BKPZX[:, :, size].split((key_dim, value_dim), -1)
    start_B = (grid.starts_BP[:, size] - size * tokens).clamp_min(NEVER)
    return k_BSKZD, v_BSKZE, Sinks(k_BKZD, v_BKZE, start_B)


def _pick(x_BKLX: Tensor, index_BN: Tensor) -> Tensor:
    return x_BKLX.gather(2, index_BN[:, None, :, None].expand(-1, x_BKLX.shape[1], -1, x_BKLX.shape[3]))
