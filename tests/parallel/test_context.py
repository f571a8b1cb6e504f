"""A window held by several ranks against the same window on one: real processes over gloo, in float64.

This file is also the program of the ranks: started once, each reads jobs (a line of JSON) and answers what went wrong.
Every rank computes the whole window alone too, and compares its shard. Names and shapes as in tests/ops/conftest.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from infini_train.ops.attention import infini_attention, local_attention
from infini_train.ops.grid import make_grid
from infini_train.ops.rope import Rope
from infini_train.parallel.context import ContextRanks

WORLD, SEGMENT = 4, 4
GROUPS = {4: (0, 1, 2, 3), 2: (1, 3)}  # of a window on so many ranks
SEVERAL = [[0, 3, 4, 17], [15, 16, 31]]  # starts of documents in each of two rows


def load_ops():
    """What tests/ops shares, by its path: tests are no packages."""
    spec = importlib.util.spec_from_file_location("ops_tools", Path(__file__).parent.parent / "ops" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------------ on every rank


def draw(job):
    """The window of a job: random weights, some of them 0, and marks as the job says."""
    shape = {"heads": 4, "kv_heads": 2, "tokens": 32, "segment_tokens": SEGMENT, "value_size": 3} | job["shape"]
    window = ops.draw_window(ops.Shape(**shape), seed=job.get("seed", 0))
    starts = torch.zeros_like(window.starts_BT)
    for row, places in enumerate(job["starts"]):
        starts[row, places] = True
    weights = window.weights_BT.clone()
    for begin, end in job.get("padding", []):
        weights[:, begin:end] = 0
    return window._replace(starts_BT=starts, weights_BT=weights).with_fresh_leaves()


def attend_shard(window, update, ranks, remember=True):
    """This rank's shard of the outputs, and the window's final state."""
    size, overlap = window.shape.segment_tokens, window.shape.overlap_tokens
    state = window.first_state()
    grid = make_grid(window.starts_BT, window.weights_BT, state.recent, size, overlap, ranks.shard)
    q, k, v = (x.chunk(ranks.size, 2)[ranks.rank] for x in window[1:4])

    def attend(q, k, v, beta, state):
        return infini_attention(q, k, v, beta, state, grid, form=ops.form_of(update), rope=Rope(100.0), ranks=ranks)

    if remember:
        return attend(q, k, v, window.beta_H, state)
    return checkpoint(attend, q, k, v, window.beta_H, state, use_reentrant=False)


def directions(results, ranks):
    """What each rank's scalar weighs the outputs, M and z by, on every rank the same."""
    source = torch.Generator().manual_seed(1)
    names = ("out", "memory_BKDE", "normaliser_BKD")
    return [
        {name: torch.randn(results[name].shape, generator=source, dtype=torch.float64) for name in names}
        for _ in range(ranks)
    ]


def gradients_of(window, terms):
    """Gradients of the sum of the terms for every leaf; 0 where there is none."""
    leaves = window.leaves()
    found = torch.autograd.grad(sum(terms), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def sum_over_ranks(values, ranks):
    summed = {name: x.clone(memory_format=torch.contiguous_format) for name, x in values.items()}
    for x in summed.values():
        dist.all_reduce(x, group=ranks.group)
    return summed


def check_parity(job, ranks):
    """Output, final state and all gradients; `final` says whether the scalar knows the final state."""
    window = draw(job)
    twin = window.with_fresh_leaves()
    by_reference = job.get("judge") == "reference"
    whole = twin.attend_by_reference(job["update"]) if by_reference else twin.attend(job["update"])
    expected = ops.state_tensors(*whole)
    out, state = attend_shard(window, job["update"], ranks, job.get("remember", True))
    found = ops.state_tensors(out, state)
    mine = {"out": expected["out"].chunk(ranks.size, 2)[ranks.rank]}
    ops.assert_same(found, expected | mine)
    if not by_reference:
        assert torch.equal(state.recent.document_BR, whole[1].recent.document_BR)
        assert torch.equal(state.recent.weight_BR, whole[1].recent.weight_BR)
    assert_same_everywhere(ops.state_tensors(out[:0], state), ranks)

    weights = directions(expected, ranks.size)
    names = ("out", "memory_BKDE", "normaliser_BKD") if job.get("final", True) else ("out",)
    shard = {"out": weights[ranks.rank]["out"].chunk(ranks.size, 2)[ranks.rank]}
    slopes = gradients_of(window, [((weights[ranks.rank] | shard)[name] * found[name]).sum() for name in names])
    outs = torch.cat([w["out"].chunk(ranks.size, 2)[r] for r, w in enumerate(weights)], 2)
    summed = {name: outs if name == "out" else sum(w[name] for w in weights) for name in names}
    expected_slopes = gradients_of(twin, [(summed[name] * expected[name]).sum() for name in names])
    ops.assert_same(sum_over_ranks(slopes, ranks), expected_slopes)
    if not job.get("final", True) or ranks.rank > 0:
        return
    assert all(x.abs().max() > 0 for x in expected_slopes.values()), "each leaf counts"


def assert_same_everywhere(values, ranks):
    """To the last bit: the carried state may not drift apart."""
    for name, x in values.items():
        first = x.detach().clone().contiguous()
        dist.broadcast(first, group=ranks.group, group_src=0)
        assert torch.equal(first, x), name


def check_local(job, ranks):
    window = draw(job)
    twin = window.with_fresh_leaves()
    sizes = SEGMENT, window.shape.overlap_tokens
    grid = make_grid(twin.starts_BT, twin.weights_BT, None, *sizes)
    expected, recent = local_attention(*twin[1:4], None, grid)
    grid = make_grid(window.starts_BT, window.weights_BT, None, *sizes, ranks.shard)
    shards = (x.chunk(ranks.size, 2)[ranks.rank] for x in window[1:4])
    out, found_recent = local_attention(*shards, None, grid, ranks=ranks)
    torch.testing.assert_close(out, expected.chunk(ranks.size, 2)[ranks.rank], rtol=1e-10, atol=1e-10)
    assert found_recent.sinks is None is recent.sinks
    for found, right in zip(found_recent[:4], recent[:4], strict=True):
        assert torch.equal(found, right)
    weight = directions({"out": expected, "memory_BKDE": out[:0], "normaliser_BKD": out[:0]}, 1)[0]["out"]
    slopes = gradients_of(window, [(weight.chunk(ranks.size, 2)[ranks.rank] * out).sum()])
    ops.assert_same(sum_over_ranks(slopes, ranks), gradients_of(twin, [(weight * expected).sum()]))


def check_leak(job, ranks):
    """The second document, from `place` on, in rows that begin with another one and a filled memory."""
    place, update = job["place"], job["update"]
    window = draw(job | {"starts": [[place], [place]]})
    behind = torch.arange(window.shape.tokens) >= place
    out, state = attend_shard(window, update, ranks)
    part = behind.chunk(ranks.size)[ranks.rank]
    slopes = sum_over_ranks(gradients_of(window, [out[:, :, part].square().sum()]), ranks)
    for name in "qkv":
        per_token = slopes[name].abs().sum((0, 1, 3))
        assert not per_token[~behind].any(), name
        assert name != "v" or per_token[behind].all()
    assert not slopes["memory"].any() and not slopes["normaliser"].any()

    other = ops.draw_window(window.shape, seed=99)  # another document, far larger, and another memory
    mixed = {n: torch.where(behind[:, None], window.leaves()[n], 1e3 * other.leaves()[n]) for n in "qkv"}
    mixed |= {n: 1e3 + window.leaves()[n] for n in ("memory", "normaliser")}
    weights = torch.where(behind, window.weights_BT, other.weights_BT)
    changed = window.replace_leaves(**mixed)._replace(weights_BT=weights)
    changed_out, changed_state = attend_shard(changed, update, ranks)
    assert torch.equal(changed_out[:, :, part], out[:, :, part])
    assert part.all() or not torch.equal(changed_out, out)
    for found, right in zip(changed_state.memory, state.memory, strict=True):
        assert torch.equal(found, right)

    edge = place - place % SEGMENT  # alone, at the same phase of the grid, before it what is never written
    alone = changed.take(slice(edge, None))._replace(memory=ops.draw_window(window.shape, filled=False).memory)
    alone.weights_BT[:, : place - edge] = 0
    alone = alone.with_fresh_leaves()
    out_alone, _ = alone.attend(update)
    expected = torch.cat((out_alone.new_zeros(2, 4, edge, 3), out_alone), 2)
    mine = expected.chunk(ranks.size, 2)[ranks.rank][:, :, part]
    torch.testing.assert_close(out[:, :, part], mine, rtol=1e-11, atol=1e-11)
    alone_slopes = gradients_of(alone, [out_alone[:, :, place - edge :].square().sum()])
    for name in "qkv":
        right = alone_slopes[name][:, :, place - edge :]
        torch.testing.assert_close(slopes[name][:, :, behind], right, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(slopes["beta"], alone_slopes["beta"], rtol=1e-10, atol=1e-10)

    before = sum_over_ranks(gradients_of(window, [attend_shard(window, update, ranks)[0][:, :, ~part].sum()]), ranks)
    assert not any(before[name][:, :, behind].any() for name in "qkv")


def check_bytes(job, ranks):
    """What a rank sends for a forward and for a backward is the formula's, whatever the length."""
    sent = []
    for tokens in (32, 256):
        window = draw(job | {"shape": job["shape"] | {"tokens": tokens}, "starts": [[5], [20]]})
        ranks.sent_bytes = 0
        out, _ = attend_shard(window, job["update"], ranks)
        forward = ranks.sent_bytes
        out.sum().backward()
        sent.append((forward, ranks.sent_bytes - forward))
    shape = window.shape
    heads, key_size, value_size = shape.kv_heads, shape.key_size, shape.value_size
    numbers = heads * key_size * (value_size + 1) + 1
    numbers += heads * key_size * key_size if job["update"] == "delta" else 0
    tail = 8 * shape.batch * heads * shape.overlap_tokens * (key_size + value_size)
    last = ranks.size - 1
    memories = 8 * shape.batch * numbers * last
    expected = (memories + tail, memories + tail * (ranks.rank > 0))  # the last one's goes to all, not to its right
    assert sent == [expected, expected], (sent, expected)


def check_16_bits(job, ranks):
    """Memories cross in fp32; the final state is one process's, as near as bf16 activations allow."""
    window = draw(job).to(torch.bfloat16)
    expected, found = window.attend(job["update"])[1], attend_shard(window, job["update"], ranks)[1]
    assert all(x.dtype == torch.float32 for x in found.memory)
    assert found.recent.k_BKRD.dtype == torch.bfloat16
    for x, right in zip(found.memory, expected.memory, strict=True):
        torch.testing.assert_close(x, right, rtol=2e-2, atol=2e-2)


def serve(rank, folder, jobs, answers):
    """Answers each line of jobs with a line: null, or what went wrong."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    groups = {size: dist.new_group(list(members)) for size, members in GROUPS.items()}
    ranks = {size: ContextRanks(groups[size]) for size, members in GROUPS.items() if rank in members}
    for line in jobs:
        job, error = json.loads(line), None
        try:
            if job["ranks"] in ranks:
                globals()[job["check"]](job, ranks[job["ranks"]])
        except Exception:
            error = traceback.format_exc()
        print(json.dumps(error), file=answers, flush=True)
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a check on all ranks: run(check, ranks, **job)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pipes = [(os.pipe(), os.pipe()) for _ in range(WORLD)]
    theirs = [end for jobs, answers in pipes for end in (jobs[0], answers[1])]
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("ranks")), *map(str, theirs)]
    process = subprocess.Popen(command, env=environment, pass_fds=theirs)
    for end in theirs:
        os.close(end)
    jobs = [os.fdopen(end, "w") for (_, end), _ in pipes]
    answers = [os.fdopen(end) for _, (end, _) in pipes]

    def send(check, ranks, **job):
        for file in jobs:
            print(json.dumps({"check": check, "ranks": ranks, "shape": {}, "starts": [], **job}), file=file, flush=True)
        errors = [json.loads(file.readline()) for file in answers]
        assert not any(errors), "\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error)

    yield send
    for file in jobs:
        file.close()
    assert process.wait(timeout=60) == 0


@pytest.fixture(params=["linear", "delta"])
def update(request):
    return request.param


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("overlap", [0, 3])
def test_shards_equal_the_reference(run, update, ranks, overlap):
    shape = {"overlap_tokens": overlap, "heads": 2, "kv_heads": 1}
    run("check_parity", ranks, update=update, shape=shape, starts=[[18], [4, 21]], judge="reference")


@pytest.mark.parametrize("update", ["linear sharp", "delta sharp"])
def test_other_features_cross_alike(run, update):
    shape = {"overlap_tokens": 3, "heads": 2, "kv_heads": 1}
    run("check_parity", 4, update=update, shape=shape, starts=[[18], [4, 21]], judge="reference")


MARKS = {
    "no_start": [],
    "inside_a_shard": [[13], [22]],
    "on_a_shards_edge": [[8], [16, 24]],
    "in_the_first_segment": [[2], [0]],
    "at_every_edge_or_more": SEVERAL,
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("overlap", [0, 2, 4])
@pytest.mark.parametrize("starts", MARKS.values(), ids=MARKS.keys())
def test_shards_equal_one_process(run, update, ranks, overlap, starts):
    run("check_parity", ranks, update=update, shape={"overlap_tokens": overlap}, starts=starts, seed=3)


SHAPES = {
    "wide_values": {"key_size": 2, "value_size": 5, "kv_heads": 4},
    "one_kv_head": {"key_size": 6, "value_size": 1, "kv_heads": 1, "batch": 3, "overlap_tokens": 1},
    "one_segment_a_rank": {"tokens": 16},
    "uneven_blocks_of_segments": {"tokens": 2 * 2 * 66, "segment_tokens": 2, "heads": 2, "batch": 1},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(run, update, shape):
    run("check_parity", 2, update=update, shape=shape, starts=[[9]], seed=4)


@pytest.mark.parametrize("padding", [[[8, 16]], [[0, 8]], [[5, 27]], [[24, 32]]], ids=str)
def test_padding(run, update, padding):
    """Up to whole ranks that write nothing."""
    run("check_parity", 4, update=update, shape={"overlap_tokens": 2}, starts=[[], [8, 24]], padding=padding, seed=5)


@pytest.mark.parametrize("remember", [True, False], ids=["kept", "computed_again"])
def test_a_loss_that_knows_no_final_state(run, update, remember):
    """As in training: the first rank's outputs need nothing from the others, but backward must still meet them."""
    shape = {"overlap_tokens": 2}
    run("check_parity", 4, update=update, shape=shape, starts=SEVERAL, final=False, remember=remember, seed=6)


@pytest.mark.parametrize("overlap", [0, 3])
@pytest.mark.parametrize("ranks", [2, 4])
def test_local_attention(run, ranks, overlap):
    run("check_local", ranks, shape={"overlap_tokens": overlap}, starts=SEVERAL)


@pytest.mark.parametrize("place", [13, 16, 17, 2, 31])
@pytest.mark.parametrize("overlap", [0, 3])
def test_documents_know_nothing_of_each_other(run, update, place, overlap):
    run("check_leak", 4, update=update, shape={"overlap_tokens": overlap}, place=place, seed=7)


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_do_not_depend_on_the_length(run, update, ranks):
    run("check_bytes", ranks, update=update, shape={"overlap_tokens": 3})


def test_memories_cross_in_fp32(run, update):
    run("check_16_bits", 4, update=update, shape={"overlap_tokens": 2}, starts=[[18], []])


@pytest.mark.parametrize(
    ("tokens", "segment", "open_tokens"), [(28, 4, 0), (24, 8, 0), (33, None, 0), (32, None, 2), (32, 4, 1)], ids=str
)
def test_what_a_shard_cannot_be(tokens, segment, open_tokens):
    """Parts of segments, shards of different lengths, or a window that goes on with an open segment."""
    marks = torch.zeros(1, tokens, dtype=torch.bool), torch.ones(1, tokens)
    first = torch.zeros(1, open_tokens, dtype=torch.bool), torch.ones(1, open_tokens)
    recent = None
    if open_tokens:
        x_BKTD = torch.zeros(1, 1, open_tokens, 2)
        recent = local_attention(x_BKTD, x_BKTD, x_BKTD, None, make_grid(*first, None, segment))[1]
    make_grid(*marks, recent, segment)
    with pytest.raises(AssertionError):
        make_grid(*marks, recent, segment, 0, (0, 2))


if __name__ == "__main__":
    ops, pipes = load_ops(), [int(end) for end in sys.argv[2:]]
    # Forked here, before any thread runs: torch is imported once.
    rank = next((rank for rank in range(1, WORLD) if os.fork() == 0), 0)
    for other, end in enumerate(pipes):
        if other // 2 != rank:
            os.close(end)
    serve(rank, sys.argv[1], os.fdopen(pipes[2 * rank]), os.fdopen(pipes[2 * rank + 1], "w"))
    if rank == 0:
        assert all(os.wait()[1] == 0 for _ in range(1, WORLD))
