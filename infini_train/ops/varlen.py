"""Local attention as causal attention over sequences of variable length, the form of flash attention's kernels.

The keys that a segment sees (sinks, overlap, its own tokens) fall into runs, each of one document. A query sees the
keys of its own run up to its own: causal attention, aligned at the end, since a run's queries are its last keys. So
no mask is needed, nothing is computed for what is not seen, and key-value heads are not repeated. Keys that no query
sees are runs without queries.

torch's kernel (`torch.nn.attention.varlen`) exists on CUDA alone, in half precision; elsewhere a mask does the same.

Legend: as in attention.py; N runs, M queries and X keys of the whole call (B S Q and B S J).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_train.ops.kernels import admit, largest_error

Kernel = Callable[..., Tensor]
DEVICE, DTYPES = "cuda", (torch.bfloat16, torch.float16)
MAX_DIM, DIM_MULTIPLE = 256, 8  # head sizes of flash attention
RUN_ROWS = 128  # of padding, of fp32 gradients of queries, for each run
TOLERANCE = 0.02  # bf16 has steps of 0.4 to 0.8 %


class Runs(NamedTuple):
    """Where each run begins among the queries and among the keys of a call, and where the last one ends; int32.

    And what attends to them, since a compiler can't look it up. Empty runs at the end fill their number up to one of a
    few, and most_queries and most_keys are what a run can have at most: these numbers are constants to a compiler,
    which would compile a layer again for others.
    """

    queries_N: Tensor
    keys_N: Tensor
    most_queries: int
    most_keys: int
    kernel: Kernel


def find_runs(document_BSJ: Tensor, first_query: int, kernel: Kernel) -> Runs | None:
    """The runs of a call; None where there are so many that a mask is better.

    Args:
        document_BSJ: document of each key that a segment sees; it only matters which neighbours are the same.
            On the meta device, where there are no values, one document fills each segment.
        first_query: place of the first query among a segment's keys; the last is at the end.
        kernel: takes the arguments of torch's `varlen_attn`.
    """
    keys = document_BSJ.shape[-1]
    is_first_BSJ = F.pad(document_BSJ[..., 1:] != document_BSJ[..., :-1], (1, 0), value=True)
    segments, queries = is_first_BSJ[..., 0].numel(), keys - first_query
    if is_first_BSJ.is_meta:
        start_N = torch.empty(segments, dtype=torch.int64, device=is_first_BSJ.device)
    else:
        start_N = _join_unseen(is_first_BSJ, first_query).flatten().nonzero()[:, 0]
    room = make_room(len(start_N), segments, queries)
    if room is None:
        return None
    start_N = F.pad(start_N, (0, room + 1 - len(start_N)), value=is_first_BSJ.numel())
    segment_N, place_N = start_N // keys, start_N % keys
    query_N = segment_N * queries + (place_N - first_query).clamp_min(0)
    return Runs(query_N.int(), start_N.int(), queries, keys, kernel)


def make_room(runs: int, segments: int, queries: int) -> int | None:
    """How many runs are told of a call that has so many, the rest of them empty; None: a mask is better.

    A kernel's backward takes `RUN_ROWS` rows of memory for each. That may double the rows of the call beside those of
    two runs a segment, more than which there seldom are. So calls of one size have four or five numbers.
    """
    usual = 2 * segments
    most = usual + segments * queries // RUN_ROWS
    return None if runs > most else min(usual << max(0, -(-runs // usual) - 1).bit_length(), most)


def _join_unseen(is_first_BSJ: Tensor, first_query: int) -> Tensor:
    """Runs that end before the first query of their segment become one: kernels take memory for each run."""
    place_J = torch.arange(is_first_BSJ.shape[-1], device=is_first_BSJ.device)
    before_BSJ = is_first_BSJ & (place_J <= first_query)
    last_BS1 = torch.where(before_BSJ, place_J, 0).amax(-1, keepdim=True)
    return is_first_BSJ & ((place_J > first_query) | (place_J == last_BS1) | (place_J == 0))


def attend_runs(q_BSHQD: Tensor, k_BSKJD: Tensor, v_BSKJE: Tensor, runs: Runs) -> Tensor:
    """out_BSHQE: each query attends to its run."""
    lanes, segments, _, queries, _ = q_BSHQD.shape
    q_MHD, k_XKD, v_XKE = (x.transpose(2, 3).flatten(0, 2) for x in (q_BSHQD, k_BSKJD, v_BSKJE))
    groups = q_MHD.shape[1] != k_XKD.shape[1]
    out_MHE = runs.kernel(q_MHD, k_XKD, v_XKE, *runs[:4], window_size=(-1, 0), enable_gqa=groups)
    return out_MHE.unflatten(0, (lanes, segments, queries)).transpose(2, 3)


def find_kernel(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> Kernel | None:
    """The kernel for heads of these sizes; None: local attention needs a mask."""
    if device.type != DEVICE or dtype not in DTYPES:
        return None
    if key_dim != value_dim or key_dim > MAX_DIM or key_dim % DIM_MULTIPLE:
        return None
    return _load(device, dtype, key_dim)


@functools.cache
def _load(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel | None:
    def load() -> Kernel:
        from torch.nn.attention.varlen import varlen_attn

        return cast(Kernel, varlen_attn)

    def compare(kernel: Kernel) -> float:
        return compare_with_mask(kernel, device, dtype, head_dim)

    return admit("torch's varlen attention", load, compare, TOLERANCE, "attention under a mask")


def compare_with_mask(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """The largest relative error of a kernel's outputs and gradients against a mask, on random heads in two groups.

    Two segments of 300 queries that see 400 keys, more than a block of a kernel; documents end among the first keys, so
    that some have no query, and inside a segment. NaN if anything is.
    """
    queries, keys, heads, groups = 300, 400, 4, 2
    random = torch.Generator().manual_seed(0)
    shapes = (heads, queries), (groups, keys), (groups, keys)
    drawn = [torch.randn(1, 2, *shape, head_dim, generator=random).to(device, dtype) for shape in shapes]
    document_BSJ = torch.zeros(1, 2, keys, dtype=torch.int64)
    document_BSJ[:, 0, 60:], document_BSJ[:, 1, 170:] = 1, 2
    on_host = find_runs(document_BSJ, keys - queries, kernel)
    assert on_host is not None
    runs = on_host._replace(queries_N=on_host.queries_N.to(device), keys_N=on_host.keys_N.to(device))
    is_same = document_BSJ[..., keys - queries :, None] == document_BSJ[..., None, :]
    mask = (is_same & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)).to(device)[:, :, None]

    def by_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(heads // groups, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def run(attend: Callable[..., Tensor], *qkv: Tensor) -> tuple[Tensor, list[Tensor]]:
        out = attend(*qkv)
        return out.float().square().sum(), [out]

    def by_runs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_runs(q, k, v, runs)

    return largest_error(functools.partial(run, by_mask), functools.partial(run, by_runs), drawn)
