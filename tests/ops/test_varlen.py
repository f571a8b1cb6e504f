"""Local attention as runs of variable length against masks and plain loops; torch's own kernel needs CUDA."""

import functools
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from infini_train.ops import attention, varlen
from infini_train.ops.grid import make_grid, no_recent
from infini_train.ops.varlen import Runs, compare_with_mask, find_kernel, find_runs, make_room
from tests.ops.gated_draws import draw as draw_gated
from tests.ops.gated_draws import gradients as gated_gradients
from tests.ops.gated_draws import results, without_entering
from tests.ops.test_sinks import assert_equal, attend, by_loops, draw


def documented_kernel(q, k, v, cu_queries, cu_keys, *longest, window_size, enable_gqa):
    """What torch's varlen_attn is documented to compute, run by run: (queries, H, D), (keys, K, D) and (keys, K, E)."""
    assert window_size == (-1, 0) and enable_gqa == (q.shape[1] != k.shape[1])
    max_q, max_k = longest
    assert cu_queries.dtype == cu_keys.dtype == torch.int32
    outs = []
    runs = zip(pairwise(cu_queries.tolist()), pairwise(cu_keys.tolist()), strict=True)
    for (first, stop), (first_key, stop_key) in runs:
        queries, keys = stop - first, stop_key - first_key
        assert 0 <= queries <= min(keys, max_q) and keys <= max_k
        causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)  # aligned at the end
        parts = [x.transpose(0, 1) for x in (q[first:stop], k[first_key:stop_key], v[first_key:stop_key])]
        outs.append(F.scaled_dot_product_attention(*parts, attn_mask=causal, enable_gqa=enable_gqa).transpose(0, 1))
    assert stop == len(q) and stop_key == len(k)
    return torch.cat(outs)


@pytest.fixture
def with_runs(monkeypatch):
    """Every grid tells runs, however many, and the loop above takes the kernel's place."""
    monkeypatch.setattr(varlen, "RUN_ROWS", 1)
    as_runs = functools.partial(make_grid, kernel=documented_kernel)
    for path in ("tests.ops.conftest", "tests.ops.gated_draws", "tests.ops.test_sinks"):
        monkeypatch.setattr(f"{path}.make_grid", as_runs)


def seen(runs, queries, keys):
    """(queries, keys): who sees whom."""
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for (first, stop), (first_key, stop_key) in zip(*(pairwise(x.tolist()) for x in runs[:2]), strict=True):
        size = (stop - first, stop_key - first_key)
        mask[first:stop, first_key:stop_key] = torch.ones(size, dtype=torch.bool).tril(size[1] - size[0])
    return mask


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("overlap", [0, 3, 8])
@pytest.mark.parametrize("carried", [0, 1, 5, 8, 13])
def test_runs_see_what_the_mask_sees(overlap, carried, sinks, monkeypatch):
    """Of documents anywhere, in calls that go on in an open segment, over several segments or inside one."""
    monkeypatch.setattr(varlen, "RUN_ROWS", 1)
    for seed, tokens in enumerate((1, 2, 3, 6, 8, 11, 16, 30, 40, 63)):
        source = torch.Generator().manual_seed(seed)
        starts = torch.rand(2, carried + tokens, generator=source) < 0.15
        recent = no_recent((2, 1, 2), 2, overlap, torch.empty(0), sinks)
        for piece in (starts[:, :carried], starts[:, carried:]):
            if piece.shape[1] == 0:
                continue
            values = torch.ones(2, 1, piece.shape[1], 2)
            both = [
                make_grid(piece, torch.ones(piece.shape), recent, 8, overlap, sink_tokens=sinks, kernel=kernel)
                for kernel in (None, documented_kernel)
            ]
            _, recent = attention.local_attention(values, values, values, recent, both[0])
        masked, told = both
        assert told.mask_BSQJ is None and masked.runs is None
        queries, keys = masked.reads_BSQ.shape[2], overlap + sinks + masked.document_BSQ.shape[2] + told_open(masked)
        expected = masked.mask_BSQJ
        if expected is None:
            expected = torch.ones(queries, keys, dtype=torch.bool).tril().expand(2, masked.segments, -1, -1)
        windows = torch.block_diag(*expected.flatten(0, 1).to(torch.uint8)).bool()
        assert torch.equal(seen(told.runs, *windows.shape), windows)


def told_open(grid):
    """Keys of the open segment before the first query."""
    return grid.open_tokens if grid.segments == 1 else 0


@pytest.mark.usefixtures("with_runs")
@pytest.mark.parametrize("start_share", [0.0, 0.12, 0.6])
@pytest.mark.parametrize(
    "sizes", [{"tokens": 14, "overlap_tokens": 3}, {"heads": 4, "tokens": 9}, {"tokens": 3}], ids=str
)
def test_infini_attention_equals_the_reference(ops, update, sizes, start_share):
    window = ops.draw(ops.Shape(**sizes), seed=10, start_share=start_share).with_fresh_leaves()
    twin = window.with_fresh_leaves()
    fast, slow = ops.tensors(*window.attend(update)), ops.tensors(*twin.attend_by_reference(update))
    ops.assert_same(fast, slow)
    ops.assert_same(ops.gradients(window, fast), ops.gradients(twin, slow))


@pytest.mark.usefixtures("with_runs")
def test_ranks_equal_the_reference(ops):
    given = draw_gated("token", heads=4, tokens=24, overlap_tokens=2, seed=26, start_share=0.1)
    slow = without_entering(results(*given.attend_by_reference()), "token")
    found = ops.on_ranks(2, lambda rank, crossing: given.attend(None, (rank, 2), crossing))
    fast = without_entering(results(torch.cat([out for out, _ in found], 2), found[0][1]), "token")
    ops.assert_same(fast, slow)
    ops.assert_same(gated_gradients(given, fast), gated_gradients(given, slow))


@pytest.mark.usefixtures("with_runs")
@pytest.mark.parametrize("start_share", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("sizes", [(4, 0, 2), (4, 3, 2), (3, 1, 5), (16, 2, 3)], ids=str)
def test_sinks_equal_plain_loops(sizes, start_share):
    inputs, starts = draw(15, start_share)
    assert_equal(inputs, attend(inputs, starts, sizes)[0], by_loops(*inputs, starts, *sizes))


@pytest.mark.usefixtures("with_runs")
@pytest.mark.parametrize("places", [(1, 2), (7,), tuple(range(1, 15))], ids=str)
def test_sinks_carried_equal_plain_loops(places):
    inputs, starts = draw(15, 0.15, seed=2)
    outs, recent, edges = [], None, [0, *places, 15]
    for begin, end in pairwise(edges):
        out, recent = attend([x[:, :, begin:end] for x in inputs], starts[:, begin:end], (4, 3, 2), recent)
        outs.append(out)
    assert_equal(inputs, torch.cat(outs, 2), by_loops(*inputs, starts, 4, 3, 2))


def test_runs_that_no_query_sees_are_one(monkeypatch):
    document_BSJ = torch.tensor([[[5, 6, 7, 7, 7, 8, 8, 9]]])
    monkeypatch.setattr(varlen, "RUN_ROWS", 1)
    assert find_runs(document_BSJ, 4, documented_kernel).keys_N.unique().tolist() == [0, 2, 5, 7, 8]
    assert find_runs(document_BSJ, 5, documented_kernel).keys_N.unique().tolist() == [0, 5, 7, 8]


@pytest.mark.parametrize(
    ("runs", "room"), [(8, 16), (16, 16), (17, 32), (33, 64), (65, 128), (129, 144), (144, 144), (145, None)]
)
def test_few_numbers_of_runs_are_told(runs, room):
    """Of eight segments of 2048 queries: what is compiled for one call serves nearly all others."""
    assert make_room(runs, 8, 2048) == room


@pytest.mark.parametrize("starts", [(), (5,), (5, 20), (64, 96)])
def test_what_a_compiler_sees_of_the_runs_is_the_same_for_most_calls(starts):
    starts_BT = torch.zeros(1, 128, dtype=torch.bool)
    starts_BT[0, list(starts)] = True
    runs = make_grid(starts_BT, torch.ones(1, 128), None, 32, 8, kernel=documented_kernel).runs
    assert (len(runs.queries_N), len(runs.keys_N), *runs[2:4]) == (9, 9, 32, 40)
    assert runs.queries_N[-1] == 128 and runs.keys_N[-1] == 4 * 40


@pytest.mark.parametrize(("tokens", "has_mask"), [(7, True), (500, False)])
def test_very_short_documents_keep_the_mask(tokens, has_mask):
    starts = torch.arange(4096)[None] % tokens == 0
    grid = make_grid(starts, torch.ones(starts.shape), None, 1024, 64, kernel=documented_kernel)
    assert (grid.runs is None, grid.mask_BSQJ is not None) == (has_mask, has_mask)


def test_values_are_not_asked_for_on_the_meta_device():
    """A plan has none: a document fills each segment."""
    runs = find_runs(torch.empty(2, 3, 10, dtype=torch.int64, device="meta"), 2, documented_kernel)
    assert [x.shape for x in runs[:2]] == [(13,), (13,)] and runs.keys_N.is_meta and runs[2:4] == (8, 10)


def test_the_kernel_is_for_equal_heads_in_half_precision_on_cuda(monkeypatch):
    monkeypatch.setattr(varlen, "_load", lambda device, dtype, head_dim: documented_kernel)
    cuda, half = torch.device("cuda"), torch.bfloat16
    assert find_kernel(cuda, half, 64, 64) is documented_kernel
    for other in [
        (torch.device("cpu"), half, 64, 64),
        (cuda, torch.float32, 64, 64),
        (cuda, half, 64, 32),
        (cuda, half, 12, 12),
        (cuda, half, 264, 264),
    ]:
        assert find_kernel(*other) is None


def in_single_precision(q, k, v, *given, **options):
    return documented_kernel(q.float(), k.float(), v.float(), *given, **options).to(q.dtype)


def from_the_start(q, k, v, cu_queries, cu_keys, *given, **options):
    """Aligned where a run's first key is, as SDPA has it: the first of its keys are taken to be its only ones."""
    runs = zip(pairwise(cu_queries.tolist()), cu_keys.tolist()[:-1], strict=True)
    picked = torch.cat([torch.arange(key, key + stop - first) for (first, stop), key in runs])
    return F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k[picked], v[picked])), is_causal=True, enable_gqa=True
    ).transpose(0, 1)


def without_gradient(q, k, v, *given, **options):
    k.register_hook(lambda gradient: gradient * float("nan"))
    return in_single_precision(q, k, v, *given, **options)


def broken(*_, **__):
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("kernel", "warning"),
    [
        (in_single_precision, None),
        (from_the_start, "on a test it is "),
        (without_gradient, "on a test it is nan of the values away"),
        (broken, "torch's varlen attention is not used: no kernel image"),
    ],
)
def test_the_kernel_is_used_only_if_it_does_what_is_expected(monkeypatch, caplog, kernel, warning):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    found = varlen._load.__wrapped__(torch.device("cpu"), torch.bfloat16, 16)
    assert found is (None if warning else kernel)
    assert warning in caplog.text if warning else not caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_torchs_kernel_equals_a_mask(dtype, head_dim):
    from torch.nn.attention.varlen import varlen_attn

    assert compare_with_mask(varlen_attn, torch.device("cuda"), dtype, head_dim) < varlen.TOLERANCE


def test_runs_move_with_their_grid():
    grid = make_grid(torch.zeros(1, 8, dtype=torch.bool), torch.ones(1, 8), None, 4, kernel=documented_kernel)
    moved = grid.to(torch.device("meta"))
    assert isinstance(moved.runs, Runs) and moved.runs.keys_N.is_meta and moved.reads_BSQ.is_meta
