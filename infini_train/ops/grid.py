"""The segment grid of one call: which token lies in which segment, who sees whom, what is written and what is dropped.

Segment edges lie on a fixed grid of N tokens, whatever the documents do. A call may continue an open segment: the state
then holds that segment's keys and values ("recent" tokens), preceded by the overlap of the segment before it.
Everything here follows from document numbers and write weights; it is computed once a call and shared by all layers
that cut it alike.

Document numbers are relative: 0 is the document that was being read when the call began, each start mark adds one.
Carried tokens of earlier documents have negative numbers, and places before the beginning of everything `NOTHING`.

Several ranks may hold one window, each a contiguous shard of whole segments. Every rank reads the marks of the whole
window, so no mark has to cross ranks. In one endless segment the shards before a rank's own are to it an open segment.

Legend: B lanes, T tokens of the call, R recent (carried) tokens, L = R + T padded to whole segments, S segments
touched, C segments closed by the call, N tokens a segment, W overlap, Q queries a segment, J keys a segment (W + N),
P ranks that hold the window.
"""

from typing import Annotated, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from infini_train.ops.sinks import Cuts, SinkGrid, Sinks, find_sinks, no_sinks
from infini_train.ops.state import Stored
from infini_train.ops.varlen import Kernel, Runs, find_runs

NOTHING = -(2**30)
LONG = 2**30


class Recent(NamedTuple):
    """Tokens that are still needed: the last W before the open segment, then the open segment.

    k_BKRD and v_BKRE carry no rotary embedding. document_BR (int64) is relative to the document being read (0);
    weight_BR are write weights (fp32, >= 0). sinks is None where there are none.
    """

    k_BKRD: Annotated[Tensor, Stored("k_BKRD", "lanes kv_heads tokens key_dim")]
    v_BKRE: Annotated[Tensor, Stored("v_BKRE", "lanes kv_heads tokens value_dim")]
    document_BR: Annotated[Tensor, Stored("document_BR", "lanes tokens")]
    weight_BR: Annotated[Tensor, Stored("weight_BR", "lanes tokens")]
    sinks: Annotated[Sinks | None, Stored("sinks")] = None


def no_recent(
    k_shape: tuple[int, int, int], value_dim: int, overlap_tokens: int, like: Tensor, sink_tokens: int = 0
) -> Recent:
    """The carried tokens before anything was read: W invisible places. k_shape is (B, K, D)."""
    lanes, heads, key_dim = k_shape
    return Recent(
        like.new_zeros(lanes, heads, overlap_tokens, key_dim),
        like.new_zeros(lanes, heads, overlap_tokens, value_dim),
        torch.full((lanes, overlap_tokens), NOTHING, dtype=torch.int64, device=like.device),
        torch.zeros(lanes, overlap_tokens, dtype=torch.float32, device=like.device),
        no_sinks(k_shape, value_dim, sink_tokens, like),
    )


class Layout(NamedTuple):
    """Segments of N tokens, or one endless segment (None), and the W tokens before a segment that it sees as well.

    Also the first Z tokens of the document (sinks.py).
    """

    segment_tokens: int | None
    overlap_tokens: int
    sink_tokens: int = 0


class Grid(NamedTuple):
    """One call cut into segments, shared by all layers of one `Layout`.

    Who sees whom is told by mask_BSQJ, whose first columns are those of the Z sinks, or by runs (varlen.py); both are
    None where plain causal attention inside each segment is right. reads_BSQ: the query's document was
    already being read when its segment began, so it may read the memory entering that segment. document_BSQ and
    weight_BSQ: document number and write weight of the call's own tokens; in carried and padded places the number of
    the nearest of them, and 0. write_BCN: write weights
    of the closed segments' tokens, 0 for documents that ended inside the segment. keep_BC: no document started in the
    segment, so the older memory stays. keep_open_B: the same for the segment left open. keep_BP: the same for the shard
    of each rank, None on one rank. count_BC: tokens written. carried_document_BR and carried_weight_BR: marks of the
    tokens that the next window needs. age_BT: tokens of its document before each token, `LONG` or more where it
    began before the call (int32); last_age_B: that of the window's last token.
    """

    overlap_tokens: int
    segment_tokens: int
    open_tokens: int  # of the segment that the call continues
    tokens: int  # T
    segments: int  # S
    closed: int  # C
    shard: tuple[int, int]  # this rank, and of how many
    mask_BSQJ: Tensor | None
    reads_BSQ: Tensor
    document_BSQ: Tensor
    weight_BSQ: Tensor
    write_BCN: Tensor
    keep_BC: Tensor
    keep_open_B: Tensor
    keep_BP: Tensor | None
    count_BC: Tensor
    carried_document_BR: Tensor
    carried_weight_BR: Tensor
    age_BT: Tensor
    last_age_B: Tensor
    sinks: SinkGrid | None = None
    runs: Runs | None = None

    @property
    def sink_tokens(self) -> int:
        """Z."""
        return 0 if self.sinks is None else self.sinks.index_BSZ.shape[-1]

    @property
    def padding(self) -> int:
        """Invisible places after the last token that fill its segment; none when the call stays inside one segment."""
        return 0 if self.segments == 1 else self.segments * self.segment_tokens - self.open_tokens - self.tokens

    @property
    def left_open(self) -> int:
        """Tokens of the last segment, if the call leaves it open."""
        return self.open_tokens + self.tokens - self.closed * self.segment_tokens

    def to(self, device: torch.device) -> "Grid":
        """The same grid on another device."""
        return cast(Grid, pytree.tree_map_only(Tensor, lambda x: x.to(device), self))


class Grids(NamedTuple):
    """The grids of one call, one for each layout that its layers have; a call may have cut them by another length."""

    layouts: tuple[Layout, ...]
    grids: tuple[Grid, ...]

    def of(self, layout: Layout) -> Grid:
        """The grid of a layer."""
        return self.grids[self.layouts.index(layout)]

    def to(self, device: torch.device) -> "Grids":
        """The same grids on another device."""
        return Grids(self.layouts, tuple(grid.to(device) for grid in self.grids))


def make_grid(
    starts_BT: Tensor,
    weights_BT: Tensor,
    recent: Recent | None,
    segment_tokens: int | None,
    overlap_tokens: int = 0,
    shard: tuple[int, int] = (0, 1),
    sink_tokens: int = 0,
    *,
    kernel: Kernel | None = None,
) -> Grid:
    """The grid of a call.

    Args:
        starts_BT: bool, True at the first token of a document; of the whole window, whatever the shard.
        weights_BT: fp32 write weights >= 0; 0 for padding. Of the whole window too.
        recent: carried tokens before the window, or None for none. The open segment holds its length minus W tokens.
        segment_tokens: N, or None for one endless segment (full attention).
        overlap_tokens: W <= N.
        shard: (rank, ranks), of equal contiguous shards of the window. With more than one rank each shard is a whole
            number of segments and the window begins at a segment's edge; full attention then has no carried tokens.
        sink_tokens: Z.
        kernel: of attention to runs (varlen.py), where runs are to tell who sees whom, not a mask.
    """
    lanes, tokens = starts_BT.shape
    recent = recent or no_recent((lanes, 1, 1), 1, overlap_tokens, torch.empty(0, device=starts_BT.device))
    marks = _mark_tokens(starts_BT, weights_BT, recent, segment_tokens, overlap_tokens)
    carried_document_BR, carried_weight_BR = _carry_marks(marks, overlap_tokens)
    age_BT = _count_ages(starts_BT)
    rank, ranks = shard
    if ranks > 1:
        assert marks.open_tokens == 0 and tokens % (ranks * (segment_tokens or 1)) == 0
        tokens //= ranks
        marks = (_take_prefix if segment_tokens is None else _take_shard)(marks, overlap_tokens, shard)
    found = _cut_segments(marks, tokens, overlap_tokens)._asdict()
    keep_BS, query_BSQ, key_BSJ = (found.pop(name) for name in ("keep_BS", "query_BSQ", "key_BSJ"))
    closed = found["write_BCN"].shape[1]
    cuts = Cuts(keep_BS.shape[1], marks.segment_tokens, overlap_tokens, marks.open_tokens, sink_tokens, shard)
    sinks = find_sinks(starts_BT, recent.sinks, cuts) if sink_tokens else None
    return Grid(
        **found,
        **_find_sight(query_BSQ, key_BSJ, sinks, kernel)._asdict(),
        overlap_tokens=overlap_tokens,
        segment_tokens=marks.segment_tokens,
        open_tokens=marks.open_tokens,
        tokens=tokens,
        segments=cuts.segments,
        closed=closed,
        shard=shard,
        keep_BC=keep_BS[:, :closed],
        keep_open_B=keep_BS[:, -1] if marks.left_open else torch.ones_like(keep_BS[:, -1]),
        keep_BP=marks.keep_BP,
        count_BC=(found["write_BCN"] > 0).sum(-1),
        carried_document_BR=carried_document_BR,
        carried_weight_BR=carried_weight_BR,
        age_BT=age_BT[:, rank * tokens : (rank + 1) * tokens],
        last_age_B=age_BT[:, -1],
        sinks=sinks,
    )


class _Marks(NamedTuple):
    """Document numbers and write weights of W, open and new tokens; keep_BP, and sizes in tokens: see `Grid`."""

    document_BL: Tensor
    weight_BL: Tensor
    keep_BP: Tensor | None
    open_tokens: int
    segment_tokens: int
    left_open: int


def _mark_tokens(
    starts_BT: Tensor, weights_BT: Tensor, recent: Recent, segment_tokens: int | None, overlap_tokens: int
) -> _Marks:
    """The marks of the whole window, after the carried ones."""
    tokens, device = starts_BT.shape[1], starts_BT.device
    open_tokens = recent.document_BR.shape[1] - overlap_tokens
    size = segment_tokens or open_tokens + tokens
    assert open_tokens >= 0 and (segment_tokens is None or open_tokens < segment_tokens)
    document_BL = torch.cat((recent.document_BR.to(device), starts_BT.long().cumsum(1)), 1)
    weight_BL = torch.cat((recent.weight_BR.to(device), weights_BT.float()), 1)
    left_open = open_tokens + tokens if segment_tokens is None else (open_tokens + tokens) % size
    return _Marks(document_BL, weight_BL, None, open_tokens, size, left_open)


def _carry_marks(marks: _Marks, overlap_tokens: int) -> tuple[Tensor, Tensor]:
    """The marks of the last tokens, for the next call."""
    document_BL, weight_BL, *_ = marks
    kept = slice(document_BL.shape[1] - overlap_tokens - marks.left_open, None)
    # A view would keep the marks of the whole window alive.
    return (document_BL[:, kept] - document_BL[:, -1:]).clamp_min(NOTHING), weight_BL[:, kept].clone()


class _Cut(NamedTuple):
    """What follows from the marks, segment by segment; the names are those of `Grid`, keep_BS is of all segments.

    query_BSQ and key_BSJ are document numbers: of each query, and of what its segment sees.
    """

    query_BSQ: Tensor
    key_BSJ: Tensor
    reads_BSQ: Tensor
    document_BSQ: Tensor
    weight_BSQ: Tensor
    write_BCN: Tensor
    keep_BS: Tensor


def _cut_segments(marks: _Marks, tokens: int, overlap_tokens: int) -> _Cut:
    """What each segment sees, reads and writes."""
    document_BL, weight_BL, _, open_tokens, size, left_open = marks
    segments, closed = -(-(open_tokens + tokens) // size), (open_tokens + tokens - left_open) // size
    if segments > 1:  # padding goes on with the last document but comes after every query and is never written
        padding = segments * size - open_tokens - tokens
        document_BL = torch.cat((document_BL, document_BL[:, -1:].expand(-1, padding)), 1)
        weight_BL = F.pad(weight_BL, (0, padding))

    inside_BX = document_BL[:, overlap_tokens:]
    rows = inside_BX.shape[1] if segments == 1 else size
    inside_BSN = inside_BX.unflatten(1, (segments, rows))
    before_BS = torch.cat((torch.zeros_like(inside_BSN[:, :1, 0]), inside_BSN[:, :-1, -1]), 1)
    first_query = open_tokens if segments == 1 else 0
    query_BSQ = inside_BSN[:, :, first_query:]
    weight_BSN = weight_BL[:, overlap_tokens:].unflatten(1, (segments, rows))
    weight_BSQ = weight_BSN[:, :, first_query:]
    if segments > 1 and open_tokens:
        weight_BSQ = weight_BSQ.clone()
        weight_BSQ[:, 0, :open_tokens] = 0
    write_BCN = weight_BSN[:, :closed]
    write_BCN = torch.where(inside_BSN[:, :closed] == inside_BSN[:, :closed, -1:], write_BCN, 0.0)
    return _Cut(
        query_BSQ,
        document_BL.unfold(1, overlap_tokens + rows, rows),
        query_BSQ == before_BS[..., None],
        query_BSQ.clamp_min(0),
        weight_BSQ,
        write_BCN,
        inside_BSN[:, :, -1] == before_BS,
    )


def _count_ages(starts_BT: Tensor) -> Tensor:
    place_T = torch.arange(starts_BT.shape[1], dtype=torch.int32, device=starts_BT.device)
    return place_T - torch.where(starts_BT, place_T, -LONG).cummax(1).values


def _take_shard(marks: _Marks, overlap_tokens: int, shard: tuple[int, int]) -> _Marks:
    """A shard's marks after those of the W tokens before it, and keep_BP.

    Document 0 is then the one that was being read when the shard began.
    """
    rank, ranks = shard
    tokens = (marks.document_BL.shape[1] - overlap_tokens) // ranks
    last_BP = marks.document_BL[:, overlap_tokens + tokens - 1 :: tokens]
    before_BP = F.pad(last_BP[:, :-1], (1, 0))
    part = slice(rank * tokens, rank * tokens + overlap_tokens + tokens)
    document_BL = (marks.document_BL[:, part] - before_BP[:, rank, None]).clamp_min(NOTHING)
    weight_BL = marks.weight_BL[:, part]
    return marks._replace(document_BL=document_BL, weight_BL=weight_BL, keep_BP=last_BP == before_BP)


def _take_prefix(marks: _Marks, overlap_tokens: int, shard: tuple[int, int]) -> _Marks:
    """The marks of one endless segment up to the end of a shard; the shards before it are its open tokens."""
    rank, ranks = shard
    tokens = marks.document_BL.shape[1] // ranks
    stop = (rank + 1) * tokens
    return _Marks(marks.document_BL[:, :stop], marks.weight_BL[:, :stop], None, rank * tokens, stop, stop)


class _Sight(NamedTuple):
    """Who sees whom; see `Grid`."""

    mask_BSQJ: Tensor | None
    runs: Runs | None


def _find_sight(query_BSQ: Tensor, key_BSJ: Tensor, sinks: SinkGrid | None, kernel: Kernel | None) -> _Sight:
    """Mask or runs by which a query sees what is not later and of the same document, and sinks.

    Neither where a mask would be plain causal attention. Runs are told even then, but not where there are very many.
    """
    queries, keys = query_BSQ.shape[2], key_BSJ.shape[2]
    if kernel is not None:
        seen_BSJ = key_BSJ
        if sinks is not None:  # those seen lie right before the keys of their document
            is_seen_BSZ = sinks.seen_BSQZ.any(2)
            seen_BSJ = torch.cat((torch.where(is_seen_BSZ, key_BSJ[..., :1], NOTHING - 1), key_BSJ), -1)
        runs = find_runs(seen_BSJ, seen_BSJ.shape[2] - queries, kernel)
        if runs is not None:
            return _Sight(None, runs)
    if sinks is None and queries == keys and not _has_inner_start(query_BSQ):
        return _Sight(None, None)
    causal_QJ = torch.ones(queries, keys, dtype=torch.bool, device=key_BSJ.device).tril(keys - queries)
    mask_BSQJ = causal_QJ & (query_BSQ[..., None] == key_BSJ[..., None, :])
    return _Sight(mask_BSQJ if sinks is None else torch.cat((sinks.seen_BSQZ, mask_BSQJ), -1), None)


def _has_inner_start(query_BSQ: Tensor) -> bool:
    # Reads the data: free on the host, where batches are made. On the meta device take the general path.
    return query_BSQ.is_meta or bool((query_BSQ[:, :, 1:] != query_BSQ[:, :, :-1]).any())


def carry_recent(recent: Recent | None, k_BKTD: Tensor, v_BKTE: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Recent]:
    """Carried and new keys and values joined, and what the next call needs of them.

    Returns:
        k_BKLD and v_BKLE padded to whole segments (W + S N; W + open + T inside one segment), and the next `Recent`.
    """
    k_BKLD, v_BKLE = k_BKTD, v_BKTE
    if recent is None and grid.overlap_tokens:
        recent = no_recent((k_BKTD.shape[0], *k_BKTD.shape[1::2]), v_BKTE.shape[-1], grid.overlap_tokens, k_BKTD)
    if recent is not None and recent.k_BKRD.shape[2]:
        k_BKLD, v_BKLE = torch.cat((recent.k_BKRD, k_BKTD), 2), torch.cat((recent.v_BKRE, v_BKTE), 2)
    stop = k_BKLD.shape[2]
    tail = slice(stop - grid.overlap_tokens - grid.left_open, stop)
    k_BKRD, v_BKRE = k_BKLD[:, :, tail], v_BKLE[:, :, tail]
    if tail.start:  # a view would keep the keys and values of the whole window alive
        k_BKRD, v_BKRE = k_BKRD.clone(), v_BKRE.clone()
    following = Recent(k_BKRD, v_BKRE, grid.carried_document_BR, grid.carried_weight_BR)
    if grid.padding:
        k_BKLD, v_BKLE = F.pad(k_BKLD, (0, 0, 0, grid.padding)), F.pad(v_BKLE, (0, 0, 0, grid.padding))
    return k_BKLD, v_BKLE, following
