"""The gated delta memory: written token by token, with a write strength and a decay that each token chooses.

Not the paper's: the gated delta rule (arXiv 2412.06464) in the place of Eq. 8 and 9. Keys and queries have unit length,
and there is no normaliser. A token first lets the memory fade, then replaces what its key finds by its value:

    M <- a M,   M <- M + b k (v - k M)^T,   with 0 < a <= 1 and 0 <= b < 1

Over a chunk of tokens that is an affine map of M, written with one triangular solve (the WY form of arXiv 2406.06484):
Y = U - W M are the values as they are written, M' = d M + K~^T Y. So segments, ranks and carried states compose as for
the paper's updates. A document start drops the memory at once: the tokens after it see, read and write nothing older.

Everything is computed in the state's dtype; this form is also what a fused kernel is compared with. One token after the
other in plain loops: gated_reference.py.

Legend: as in memory.py; R rows of a segment, C chunks of the call, N tokens a chunk, G query heads of a key-value head.
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_train.ops.chain import gated_chain
from infini_train.ops.grid import Grid
from infini_train.ops.memory import Memory, Read, segmented_scan
from infini_train.ops.ranks import Ranks
from infini_train.ops.state import Stored

# Tokens of one triangular solve. More of them make the products larger, and the squares of a chunk too.
CHUNK_TOKENS = 64
# Added to the square of a key's or a query's length: one of zeros stays zero.
EPS = 1e-6


class GatedMemory(NamedTuple):
    """What is left of a document: fixed size, fp32 (fp64 under fp64 activations).

    memory_BKDE holds all tokens so far. entering_BKDE is what it was when the open segment began, which alone is read
    where a read is of older segments; None where every token reads all before it. written_B counts the tokens written
    since the document's start in closed segments.
    """

    memory_BKDE: Annotated[Tensor, Stored("memory_BKDE", "lanes kv_heads key_dim value_dim")]
    entering_BKDE: Annotated[Tensor | None, Stored("entering_BKDE", "lanes kv_heads key_dim value_dim")]
    written_B: Annotated[Tensor, Stored("written_B", "lanes")]


class Writing(NamedTuple):
    """How each token writes, fp32: log(1 - b), what its key's old value keeps, and log(a), what the memory keeps."""

    log_kept_BKT: Tensor
    log_decay_BKT: Tensor


class Recalled(NamedTuple):
    """What a call remembers: its reads (None if none were asked for), where there is one, and the memory it leaves."""

    read_BSHQE: Tensor | None
    visible_BSQ: Tensor
    memory: Memory | GatedMemory


class _Chunks(NamedTuple):
    """A call's tokens cut into chunks, and the affine map of each.

    decay_BKCN is what is left at a token of the memory entering its chunk, 0 in a document that began inside;
    inner_BKCNN what is left at a token (row) of what an earlier one (column) or itself wrote.
    """

    k_BKCND: Tensor
    decay_BKCN: Tensor
    inner_BKCNN: Tensor
    u_BKCNE: Tensor
    w_BKCND: Tensor
    out_BKCDN: Tensor  # K~^T: keys, as far as what they write lasts to the end of the chunk
    keep_BKC: Tensor  # d


class _States(NamedTuple):
    """The memory entering each chunk and after the last one (C + 1), the values written, the one leaving the window."""

    memory_BKCDE: Tensor
    y_BKCNE: Tensor
    leaving_BKDE: Tensor
    counts_BS: Tensor  # tokens written before each segment, and before the next one
    leaving_count_B: Tensor


def empty_gated_memory(
    lanes: int, kv_heads: int, key_dim: int, value_dim: int, like: Tensor, read: Read
) -> GatedMemory:
    """A memory in which nothing was written, in the state's dtype for activations like `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    memory = torch.zeros(lanes, kv_heads, key_dim, value_dim, dtype=dtype, device=like.device)
    count = torch.zeros(lanes, dtype=dtype, device=like.device)
    return GatedMemory(memory, torch.zeros_like(memory) if read == "segment" else None, count)


def unit(x: Tensor) -> Tensor:
    """Vectors of (nearly) unit length in the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


def begin_gated(
    q_BSHRD: Tensor | None,
    k_BSKRD: Tensor,
    v_BSKRE: Tensor,
    writing_BSKR: Writing,
    initial: GatedMemory,
    grid: Grid,
    ranks: Ranks | None = None,
) -> Callable[[], Recalled]:
    """Writes all tokens of the call and starts what has to travel between ranks.

    Args:
        q_BSHRD: queries without rotary embedding, by segment (`fold_queries`); None where nothing is read.
        k_BSKRD: keys of the same tokens.
        v_BSKRE: their values.
        writing_BSKR: how they are written, by segment too.
        initial: memory entering the window, the same on all ranks. It says what is read: see `GatedMemory`.
        grid: weights, document starts. A token of weight w is written w times in a row, and fades w times as much.
        ranks: how memory travels between the ranks of `grid.shard`; not asked on one rank.

    Returns:
        A function that waits for the other ranks and returns what is read and the memory after the call; call it after
        whatever can be computed in the meantime.
    """
    chunks = _cut(k_BSKRD, v_BSKRE, writing_BSKR, initial.memory_BKDE.dtype, grid)
    finish_states = _begin_states(chunks, initial, grid, ranks)

    def finish() -> Recalled:
        states = finish_states()
        entering_BSKDE = _enter_segments(states, initial, grid)
        if initial.entering_BKDE is None:
            visible_BSQ = torch.ones_like(grid.reads_BSQ)
            read = None if q_BSHRD is None else _read_tokens(q_BSHRD, chunks, states)
        else:
            visible_BSQ = grid.reads_BSQ & (states.counts_BS[:, : grid.segments] > 0)[..., None]
            read = None if q_BSHRD is None else _read_segments(q_BSHRD, entering_BSKDE)
        return Recalled(read, visible_BSQ, _leave(states, entering_BSKDE, initial, grid))

    return finish


def _cut(k_BSKRD: Tensor, v_BSKRE: Tensor, writing_BSKR: Writing, dtype: torch.dtype, grid: Grid) -> _Chunks:
    """Chunks of at most `CHUNK_TOKENS`, the last of each segment filled with tokens that do nothing."""
    k_BKCND, v_BKCNE = _chunk(unit(k_BSKRD.to(dtype))), _chunk(v_BSKRE.to(dtype))
    weight_B1CN = _chunk(grid.weight_BSQ.to(dtype)[:, :, None])
    log_kept_BKCN, log_decay_BKCN = (_chunk(part.to(dtype)) * weight_B1CN for part in writing_BSKR)
    strength_BKCN1 = -torch.expm1(log_kept_BKCN)[..., None]

    document_BCN = _chunk(grid.document_BSQ[:, :, None], repeat_last=True)[:, 0]
    before_BC = F.pad(document_BCN[:, :-1, -1], (1, 0))  # 0: the document that was being read when the call began
    enters_B1CN = (document_BCN == before_BC[..., None])[:, None]
    leaves_B1CN = (document_BCN == document_BCN[..., -1:])[:, None]
    same_B1CNN = (document_BCN[..., :, None] == document_BCN[..., None, :])[:, None].tril()

    faded_BKCN = log_decay_BKCN.cumsum(-1)
    decay_BKCN = torch.where(enters_B1CN, faded_BKCN.exp(), 0.0)
    since_BKCNN = faded_BKCN[..., :, None] - faded_BKCN[..., None, :]
    inner_BKCNN = torch.where(same_B1CNN, since_BKCNN.clamp(max=0).exp(), 0.0)
    overlaps = strength_BKCN1 * (k_BKCND @ k_BKCND.transpose(-1, -2)) * inner_BKCNN
    targets = strength_BKCN1 * torch.cat((v_BKCNE, decay_BKCN[..., None] * k_BKCND), -1)
    solved = torch.linalg.solve_triangular(overlaps.tril(-1), targets, upper=False, unitriangular=True)
    u_BKCNE, w_BKCND = solved.split((v_BKCNE.shape[-1], k_BKCND.shape[-1]), -1)
    lasting_BKCN = torch.where(leaves_B1CN, inner_BKCNN[..., -1, :], 0.0)
    return _Chunks(
        k_BKCND,
        decay_BKCN,
        inner_BKCNN,
        u_BKCNE,
        w_BKCND,
        (k_BKCND * lasting_BKCN[..., None]).transpose(-1, -2),
        decay_BKCN[..., -1],
    )


def _chunk(x_BSKRX: Tensor, *, repeat_last: bool = False) -> Tensor:
    """(B, K, C, N, ...): each segment's rows in whole chunks, filled up with zeros, or with its last row."""
    rows = x_BSKRX.shape[3]
    size = min(rows, CHUNK_TOKENS)
    filling = -rows % size
    if filling:
        last = x_BSKRX[:, :, :, -1:].expand(*x_BSKRX.shape[:3], filling, *x_BSKRX.shape[4:])
        x_BSKRX = torch.cat((x_BSKRX, last if repeat_last else torch.zeros_like(last)), 3)
    return x_BSKRX.unflatten(3, (-1, size)).transpose(1, 2).flatten(2, 3)


def _unchunk(x_BKCNX: Tensor, segments: int, rows: int) -> Tensor:
    """(B, S, K, R, ...), without what `_chunk` added."""
    return x_BKCNX.unflatten(2, (segments, -1)).flatten(3, 4)[:, :, :, :rows].transpose(1, 2)


def _begin_states(chunks: _Chunks, initial: GatedMemory, grid: Grid, ranks: Ranks | None) -> Callable[[], _States]:
    """The states of all chunks. Ranks exchange the affine map of their shard, and the count, as one tensor."""
    rank, size = grid.shard
    start_BKDE = initial.memory_BKDE
    if ranks is None or size == 1:
        memory_BKCDE, y_BKCNE, leaving_BKDE = _run(chunks, start_BKDE, chunks.u_BKCNE)
        counts_BS = count_written(initial.written_B, grid)
        return lambda: _States(memory_BKCDE, y_BKCNE, leaving_BKDE, counts_BS, counts_BS[:, -1])

    # With nothing before the shard, and beside it what the shard makes of each direction of a memory before it.
    lanes, kv_heads, key_dim, value_dim = start_BKDE.shape
    widths = value_dim, key_dim
    identity = torch.eye(key_dim, dtype=start_BKDE.dtype, device=start_BKDE.device)
    from_nothing = torch.cat((torch.zeros_like(start_BKDE), identity.expand(lanes, kv_heads, -1, -1)), -1)
    u_BKCNX = F.pad(chunks.u_BKCNE, (0, key_dim))
    memory_BKCDX, y_BKCNX, shard_BKDX = _run(chunks, from_nothing, u_BKCNX)
    counts_BS = count_written(torch.zeros_like(initial.written_B), grid)
    gathered = ranks.gather(torch.cat((shard_BKDX.flatten(1), counts_BS[:, -1:]), 1))

    def finish() -> _States:
        entering, counts = compose_maps(gathered(), initial, grid)
        # Taken out of a stack, so that also the first rank, which needs no other, meets the others in backward.
        before_BK1DE = torch.stack(entering)[rank][:, :, None]
        own_BKCDE, kept_BKCDD = memory_BKCDX.split(widths, -1)
        own_BKCNE, seen_BKCND = y_BKCNX.split(widths, -1)
        is_first_BS = torch.cat((torch.ones_like(grid.keep_BC[:, :1]), grid.keep_BC), 1).long().cumprod(1)
        return _States(
            own_BKCDE + kept_BKCDD @ before_BK1DE,
            own_BKCNE + seen_BKCND @ before_BK1DE,
            entering[size],
            counts_BS + counts[rank][:, None] * is_first_BS,
            counts[size],
        )

    return finish


def count_written(written_B: Tensor, grid: Grid) -> Tensor:
    """Tokens written before each segment of the call and before the next one (B, S + 1), or before the only one."""
    counts_BS = written_B[:, None]
    if not grid.closed:  # a few tokens of generation
        return counts_BS
    return segmented_scan(counts_BS, grid.count_BC.to(written_B.dtype)[..., None], grid.keep_BC)[..., 0]


def compose_maps(maps_PBF: Tensor, initial: GatedMemory, grid: Grid) -> tuple[list[Tensor], list[Tensor]]:
    """The memory, and the tokens written, before each rank's shard and after the last one.

    `maps_PBF` are the maps of the ranks: for each lane K D (E + D) numbers, and the tokens written in the shard.
    """
    kv_heads, key_dim, value_dim = initial.memory_BKDE.shape[1:]
    map_PBKDX = maps_PBF[..., :-1].unflatten(-1, (kv_heads, key_dim, -1))
    assert grid.keep_BP is not None
    entering, counts = [initial.memory_BKDE], [initial.written_B]
    for map_BKDX, added_B, keep_B in zip(map_PBKDX, maps_PBF[..., -1], grid.keep_BP.unbind(1), strict=True):
        own_BKDE, kept_BKDD = map_BKDX.split((value_dim, key_dim), -1)
        entering.append(own_BKDE + kept_BKDD @ entering[-1])
        counts.append(counts[-1] * keep_B + added_B)
    return entering, counts


def _run(chunks: _Chunks, start_BKDX: Tensor, u_BKCNX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The states before, between and after the chunks (C + 1), what each token writes, the last state.

    The last one stands alone: carried as a view of all, it would keep the states of the whole window alive.
    """
    shape = start_BKDX.shape[:2]
    parts = (u_BKCNX, chunks.w_BKCND, chunks.out_BKCDN, chunks.keep_BKC)
    states, written = gated_chain(start_BKDX.flatten(0, 1), *(part.flatten(0, 1).transpose(0, 1) for part in parts))
    states_BKCDX, written_BKCNX = (x.transpose(0, 1).unflatten(0, shape) for x in (states, written))
    return states_BKCDX, written_BKCNX, states[-1].unflatten(0, shape).clone()


def _enter_segments(states: _States, initial: GatedMemory, grid: Grid) -> Tensor:
    """The memory that entered each segment (B, S, K, D, E)."""
    chunks = states.memory_BKCDE.shape[2] - 1
    entering_BSKDE = states.memory_BKCDE[:, :, : chunks : chunks // grid.segments].transpose(1, 2)
    if initial.entering_BKDE is None or grid.open_tokens == 0:
        return entering_BSKDE
    return torch.cat((initial.entering_BKDE[:, None], entering_BSKDE[:, 1:]), 1)


def _leave(states: _States, entering_BSKDE: Tensor, initial: GatedMemory, grid: Grid) -> GatedMemory:
    """The state after the call. What entered the segment left open is dropped if a document started in it."""
    memory_BKDE, count_B = states.leaving_BKDE, states.leaving_count_B
    keep_B = grid.keep_open_B.to(memory_BKDE.dtype)
    if initial.entering_BKDE is None:
        return GatedMemory(memory_BKDE, None, count_B * keep_B)
    entering_BKDE = memory_BKDE
    if grid.left_open:
        entering_BKDE = entering_BSKDE[:, -1] * keep_B[:, None, None, None]
    return GatedMemory(memory_BKDE, entering_BKDE, count_B * keep_B)


def _read_segments(q_BSHRD: Tensor, entering_BSKDE: Tensor) -> Tensor:
    """Queries times M, which is what entered the query's segment; in the dtype of the queries."""
    group = q_BSHRD.shape[2] // entering_BSKDE.shape[2]
    q_BSKGRD = unit(q_BSHRD.to(entering_BSKDE.dtype)).unflatten(2, (-1, group))
    return (q_BSKGRD @ entering_BSKDE[:, :, :, None]).flatten(2, 3).to(q_BSHRD.dtype)


def _read_tokens(q_BSHRD: Tensor, chunks: _Chunks, states: _States) -> Tensor:
    """Queries times M, which holds all tokens up to the query's own; in the dtype of the queries."""
    (segments, heads, rows), kv_heads = q_BSHRD.shape[1:4], chunks.k_BKCND.shape[1]
    q_BHCND = _chunk(unit(q_BSHRD.to(chunks.k_BKCND.dtype)))
    q_BKGCND = q_BHCND.unflatten(1, (kv_heads, heads // kv_heads))
    older = (q_BKGCND * chunks.decay_BKCN[:, :, None, ..., None]) @ states.memory_BKCDE[:, :, None, :-1]
    overlaps = (q_BKGCND @ chunks.k_BKCND[:, :, None].transpose(-1, -2)) * chunks.inner_BKCNN[:, :, None]
    read_BKGCNE = older + overlaps @ states.y_BKCNE[:, :, None]
    return _unchunk(read_BKGCNE.flatten(1, 2), segments, rows).to(q_BSHRD.dtype)
