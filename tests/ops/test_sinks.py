"""Local attention with sinks against plain loops, in pieces, over ranks, and with documents that start anywhere."""

import pytest
import torch

from infini_train.ops.attention import InfiniState, infini_attention, local_attention
from infini_train.ops.grid import make_grid, no_recent
from infini_train.ops.memory import Form, empty_memory
from infini_train.ops.reference import rotate
from infini_train.ops.rope import Rope

ROPE = Rope(100.0)
LANES, HEADS, KV_HEADS, DIM = 3, 2, 1, 4


def draw(tokens, start_share, seed=0):
    source = torch.Generator().manual_seed(seed)

    def normal(heads):
        return torch.randn(LANES, heads, tokens, DIM, generator=source, dtype=torch.float64).requires_grad_()

    starts = torch.rand(LANES, tokens, generator=source) < start_share
    return (normal(HEADS), normal(KV_HEADS), normal(KV_HEADS)), starts


def by_loops(q_BHTD, k_BKTD, v_BKTE, starts_BT, segment, overlap, sinks):
    """Each token: the sinks of its document before what the segment sees, then what the segment sees."""
    rows = []
    for b in range(LANES):
        out = []
        for t in range(q_BHTD.shape[2]):
            begun = [u for u in range(t + 1) if starts_BT[b, u]]
            first = begun[-1] if begun else 0
            origin = t // segment * segment - overlap
            old = [u for u in range(first, min(first + sinks, t + 1)) if u < origin]
            near = list(range(max(origin, first), t + 1))
            places = [(u, sinks - len(old) + u - first) for u in old] + [(u, sinks + u - origin) for u in near]
            k_D = torch.stack([rotate(k_BKTD[b, 0, u], place, ROPE) for u, place in places])
            v_E = torch.stack([v_BKTE[b, 0, u] for u, _ in places])
            position = sinks + t - origin
            scores = [k_D @ rotate(q_BHTD[b, h, t], position, ROPE) / DIM**0.5 for h in range(HEADS)]
            out.append(torch.stack([torch.softmax(score, 0) @ v_E for score in scores]))
        rows.append(torch.stack(out, 1))
    return torch.stack(rows)


def attend(inputs, starts, sizes, recent=None, shard=(0, 1), ranks=None):
    segment, overlap, sinks = sizes
    grid = make_grid(starts, torch.ones(starts.shape), recent, segment, overlap, shard, sinks)
    return local_attention(*inputs, recent, grid, rope=ROPE, ranks=ranks)


def gradients(inputs, out):
    source = torch.Generator().manual_seed(1)
    return torch.autograd.grad((torch.randn(out.shape, generator=source, dtype=torch.float64) * out).sum(), inputs)


def assert_equal(inputs, found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(inputs, found), gradients(inputs, expected), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("start_share", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("sizes", [(4, 0, 2), (4, 3, 2), (4, 4, 3), (3, 1, 5), (16, 2, 3)], ids=str)
def test_outputs_and_gradients_equal_plain_loops(sizes, start_share):
    inputs, starts = draw(15, start_share)
    found, _ = attend(inputs, starts, sizes)
    assert_equal(inputs, found, by_loops(*inputs, starts, *sizes))


@pytest.mark.parametrize("start_share", [0.0, 0.15])
@pytest.mark.parametrize("places", [(4,), (1, 2), (7,), (3, 5, 13), tuple(range(1, 15))], ids=str)
@pytest.mark.parametrize("sizes", [(4, 0, 3), (4, 3, 2), (3, 1, 5)], ids=str)
def test_cut_anywhere_and_carried_equals_one_pass(sizes, places, start_share):
    inputs, starts = draw(15, start_share, seed=2)
    whole, last = attend(inputs, starts, sizes)
    outs, recent, edges = [], None, [0, *places, 15]
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        piece = [x[:, :, begin:end] for x in inputs]
        out, recent = attend(piece, starts[:, begin:end], sizes, recent)
        outs.append(out)
    assert_equal(inputs, torch.cat(outs, 2), whole)
    assert torch.equal(recent.sinks.start_B, last.sinks.start_B)
    torch.testing.assert_close(recent.sinks.k_BKZD, last.sinks.k_BKZD)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("start_share", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("sizes", [(4, 0, 3), (4, 3, 2), (2, 1, 5)], ids=str)
def test_ranks_equal_one_pass_from_a_state_that_is_not_empty(ops, sizes, start_share, ranks):
    before, starts_before = draw(12, start_share, seed=3)
    inputs, starts = draw(24, start_share, seed=4)
    _, recent = attend([x.detach() for x in before], starts_before, sizes)
    whole, last = attend(inputs, starts, sizes, recent)

    def run(rank, crossing):
        mine = [x.chunk(ranks, 2)[rank] for x in inputs]
        return attend(mine, starts, sizes, recent, (rank, ranks), crossing)

    found = ops.on_ranks(ranks, run)
    assert_equal(inputs, torch.cat([out for out, _ in found], 2), whole)
    for _, state in found:
        assert torch.equal(state.sinks.start_B, last.sinks.start_B)
        torch.testing.assert_close(state.sinks.v_BKZE, last.sinks.v_BKZE)


def test_the_memory_does_not_change_with_sinks():
    (q, k, v), starts = draw(15, 0.1, seed=5)
    found = []
    for sinks in (0, 2):
        recent = no_recent((LANES, KV_HEADS, DIM), DIM, 1, k, sinks)
        state = InfiniState(empty_memory(LANES, KV_HEADS, DIM, DIM, k), recent)
        grid = make_grid(starts, torch.ones(starts.shape), recent, 4, 1, sink_tokens=sinks)
        found.append(infini_attention(q, k, v, torch.zeros(HEADS), state, grid, form=Form(), rope=ROPE))
    assert all(torch.equal(*pair) for pair in zip(found[0][1].memory, found[1][1].memory, strict=True))
    assert not torch.allclose(found[0][0], found[1][0])
