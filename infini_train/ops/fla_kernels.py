"""The gated delta memory through flash-linear-attention's chunked kernel, where it can be used.

Its `chunk_gated_delta_rule` (package and extra `fla`) is the rule of gated_delta.py; the rest is put in its terms:

- a token of weight w: its log decay times w, and 1 - (1 - b)^w as its write strength
- documents: all lanes are one row of sequences, cut at each document start (`cu_seqlens`); one that goes on from the
  call before begins with the carried memory, any other with zeros
- the map of a rank's shard, M -> A M + B: D more value columns, of values 0, begin as the unit matrix and end as A
- grouped queries: keys, values and memory are repeated for each query head

It gives no memories at segments' edges, so it serves `read: token` alone.

Legend: as in gated_delta.py; N sequences, X columns of the memory: E, and D more on several ranks.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_train.ops.gated_delta import (
    CHUNK_TOKENS,
    GatedMemory,
    Recalled,
    Writing,
    begin_gated,
    compose_maps,
    count_written,
    unit,
)
from infini_train.ops.grid import Grid, make_grid
from infini_train.ops.kernels import admit, largest_error
from infini_train.ops.ranks import Ranks

Kernel = Callable[..., tuple[Tensor, Tensor]]
MAX_KEY_DIM = 256  # of fla 0.6
TOLERANCE = 0.05  # bf16 has steps of 0.4 to 0.8 %, and gradients add some up
DTYPES = (torch.bfloat16, torch.float16)  # in fp32 the kernel may round products to TF32


def find_kernel(k_BSKRD: Tensor, initial: GatedMemory) -> Kernel | None:
    """The kernel for a call with these keys; None: gated_delta.py serves it."""
    if not k_BSKRD.is_cuda or k_BSKRD.dtype not in DTYPES or initial.entering_BKDE is not None:
        return None
    _, segments, _, rows, key_dim = k_BSKRD.shape
    if segments * rows <= CHUNK_TOKENS or key_dim > MAX_KEY_DIM:
        return None
    return _load(k_BSKRD.device, key_dim, initial.memory_BKDE.shape[-1])


@torch.compiler.disable  # type: ignore[untyped-decorator]
@functools.cache
def _load(device: torch.device, key_dim: int, value_dim: int) -> Kernel | None:
    """The installed kernel, if it does what it is used for at these sizes; one that does not is told, once."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None

    def compare(kernel: Kernel) -> float:
        return compare_with_chunks(kernel, device, torch.bfloat16, key_dim, value_dim)

    kernel = cast(Kernel, chunk_gated_delta_rule)
    name = "the installed flash-linear-attention"
    return admit(name, lambda: kernel, compare, TOLERANCE, "the project's own form")


def compare_with_chunks(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, key_dim: int = 32, value_dim: int = 32
) -> float:
    """The largest relative error of a kernel's reads, memory and gradients, also that of the memory before.

    On 192 random tokens, of the document before and of another one; NaN if anything is.
    """
    random = torch.Generator().manual_seed(0)
    starts_BT = torch.zeros(1, 3 * CHUNK_TOKENS, dtype=torch.bool)
    starts_BT[0, CHUNK_TOKENS + 7] = True
    grid = make_grid(starts_BT, torch.ones(starts_BT.shape), None, CHUNK_TOKENS).to(device)
    sizes = (key_dim, key_dim, value_dim)
    drawn = [torch.randn(1, 3, 2, CHUNK_TOKENS, size, generator=random).to(device, dtype) for size in sizes]
    drawn += [torch.randn(2, 1, 3, 2, CHUNK_TOKENS, generator=random).to(device)]
    drawn += [torch.randn(1, 2, key_dim, value_dim, generator=random).to(device)]

    def run(begin: Callable[..., Callable[[], Recalled]], *leaves: Tensor) -> tuple[Tensor, list[Tensor]]:
        *qkv, logits, memory = leaves
        writing = Writing(F.logsigmoid(logits[0]), F.logsigmoid(logits[1] + 4))
        recalled = begin(*qkv, writing, GatedMemory(memory, None, torch.ones(1, device=device)), grid)()
        assert recalled.read_BSHQE is not None and isinstance(recalled.memory, GatedMemory)
        outs = [recalled.read_BSHQE.float(), recalled.memory.memory_BKDE.float()]
        return outs[0].square().sum() + outs[1].sum(), outs

    fused = functools.partial(run, functools.partial(begin_fused, kernel))
    return largest_error(functools.partial(run, begin_gated), fused, drawn)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # neither the kernel nor the number of sequences is known
def begin_fused(
    kernel: Kernel,
    q_BSHRD: Tensor | None,
    k_BSKRD: Tensor,
    v_BSKRE: Tensor,
    writing_BSKR: Writing,
    initial: GatedMemory,
    grid: Grid,
    ranks: Ranks | None = None,
) -> Callable[[], Recalled]:
    """`begin_gated` by this kernel: fla's chunk_gated_delta_rule, or a function of the same meaning."""
    (rank, size), group = grid.shard, 1 if q_BSHRD is None else q_BSHRD.shape[2] // k_BSKRD.shape[2]
    start_BKDX, before_B = initial.memory_BKDE, initial.written_B
    if ranks is not None and size > 1:
        identity_BKDD = torch.eye(k_BSKRD.shape[-1]).to(start_BKDX).expand(*start_BKDX.shape[:2], -1, -1)
        start_BKDX, before_B = torch.cat((torch.zeros_like(start_BKDX), identity_BKDD), -1), torch.zeros_like(before_B)
        v_BSKRE = F.pad(v_BSKRE, (0, k_BSKRD.shape[-1]))
    read_BSHRX, leaving_BKDX = _call(kernel, group, q_BSHRD, (k_BSKRD, v_BSKRE), writing_BSKR, start_BKDX, grid)
    count_B = count_written(before_B, grid)[:, -1]

    def recall(read_BSHRE: Tensor, memory_BKDE: Tensor, count_B: Tensor) -> Recalled:
        memory = GatedMemory(memory_BKDE, None, count_B * grid.keep_open_B.to(memory_BKDE.dtype))
        read = None if q_BSHRD is None else read_BSHRE.to(q_BSHRD.dtype)
        return Recalled(read, torch.ones_like(grid.reads_BSQ), memory)

    if ranks is None or size == 1:
        return lambda: recall(read_BSHRX, leaving_BKDX, count_B)
    gathered = ranks.gather(torch.cat((leaving_BKDX.flatten(1), count_B[:, None]), 1))

    def finish() -> Recalled:
        entering, counts = compose_maps(gathered(), initial, grid)
        before_B1HDE = torch.stack(entering)[rank].repeat_interleave(group, 1)[:, None]
        widths = before_B1HDE.shape[-1], k_BSKRD.shape[-1]
        own_BSHRE, seen_BSHRD = read_BSHRX.to(before_B1HDE.dtype).split(widths, -1)
        return recall(own_BSHRE + seen_BSHRD @ before_B1HDE, entering[size], counts[size])

    return finish


def _call(
    kernel: Kernel,
    group: int,
    q_BSHRD: Tensor | None,
    written: tuple[Tensor, Tensor],
    writing_BSKR: Writing,
    start_BKDX: Tensor,
    grid: Grid,
) -> tuple[Tensor, Tensor]:
    """What is read (B, S, H, R, X), and the memory after the last token (B, K, D, X); `written` are keys and values."""
    k_BSKRD, v_BSKRX = written
    dtype, state_dtype = k_BSKRD.dtype, start_BKDX.dtype
    unit_BSKRD = unit(k_BSKRD.to(state_dtype)).to(dtype)
    q_unit_BSHRD = unit_BSKRD if q_BSHRD is None else unit(q_BSHRD.to(state_dtype)).to(dtype)
    weight_BS1R = grid.weight_BSQ.to(state_dtype)[:, :, None]
    log_kept_BSKR, log_decay_BSKR = (part.to(state_dtype) * weight_BS1R for part in writing_BSKR)
    of_kv_heads = unit_BSKRD, v_BSKRX.to(dtype), log_decay_BSKR, -torch.expm1(log_kept_BSKR)
    k, v, g, beta = (_in_a_row(part).repeat_interleave(group, 2) for part in of_kv_heads)
    sequences = _cut_sequences(grid)
    out, final_NHDX = kernel(
        _in_a_row(q_unit_BSHRD),
        k,
        v,
        g=g,
        beta=beta,
        scale=1.0,
        initial_state=_begin_sequences(start_BKDX, sequences).repeat_interleave(group, 1),
        output_final_state=True,
        cu_seqlens=sequences.edges,
    )
    read_BSHRX = out[0].unflatten(0, tuple(grid.weight_BSQ.shape)).transpose(2, 3)
    return read_BSHRX, final_NHDX[sequences.last_B, ::group]


class _Sequences(NamedTuple):
    """Where sequences begin and the last one ends (N + 1), each lane's first and last, and which first ones go on."""

    edges: Tensor
    first_B: Tensor
    last_B: Tensor
    goes_on_B: Tensor


def _cut_sequences(grid: Grid) -> _Sequences:
    document_BT = grid.document_BSQ.flatten(1)
    begins_BT = torch.ones_like(document_BT, dtype=torch.bool)
    begins_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    edges = F.pad(begins_BT.flatten().nonzero()[:, 0], (0, 1), value=document_BT.numel())
    counts_B = begins_BT.sum(1)
    last_B = counts_B.cumsum(0) - 1
    return _Sequences(edges, last_B + 1 - counts_B, last_B, document_BT[:, 0] == 0)


def _begin_sequences(start_BKDX: Tensor, sequences: _Sequences) -> Tensor:
    """The memory before each sequence (N, K, D, X)."""
    carried_BKDX = torch.where(sequences.goes_on_B[:, None, None, None], start_BKDX, 0.0)
    shape = len(sequences.edges) - 1, *start_BKDX.shape[1:]
    return start_BKDX.new_zeros(shape).index_copy(0, sequences.first_B, carried_BKDX)


def _in_a_row(x_BSKRX: Tensor) -> Tensor:
    """(1, B S R, K, ...): the tokens of all lanes one after the other, as the kernel has them."""
    return x_BSKRX.transpose(2, 3).flatten(0, 2)[None].contiguous()
