"""The gated delta memory against plain loops, against itself in pieces and over ranks, and in lower precision."""

import pytest
import torch

from infini_train.ops import gated_delta
from infini_train.ops.attention import Additions, write_memory
from infini_train.ops.gated_delta import GatedMemory, Writing, unit
from infini_train.ops.grid import make_grid
from infini_train.ops.memory import Form
from tests.ops.gated_draws import SHAPES, draw, gradients, results, without_entering


@pytest.fixture(params=["segment", "token"])
def read(request):
    return request.param


@pytest.fixture(params=[64, 3], ids=["one_chunk", "chunks_of_three"])
def chunk_tokens(request, monkeypatch):
    monkeypatch.setattr(gated_delta, "CHUNK_TOKENS", request.param)


@pytest.mark.usefixtures("chunk_tokens")
@pytest.mark.parametrize("start_share", [0.0, 0.12, 0.6])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_outputs_state_and_gradients_equal_the_reference(ops, shape, read, start_share):
    given = draw(read, seed=10, start_share=start_share, **shape)
    fast, slow = (without_entering(results(*f()), read) for f in (given.attend, given.attend_by_reference))
    ops.assert_same(fast, slow)
    ops.assert_same(gradients(given, fast), gradients(given, slow))


def test_the_papers_gate_and_no_norm(ops, read):
    given = draw(read, seed=3, start_share=0.1, plain_additions=True)
    fast, slow = (without_entering(results(*f()), read) for f in (given.attend, given.attend_by_reference))
    ops.assert_same(fast, slow)
    ops.assert_same(gradients(given, fast), gradients(given, slow))


@pytest.mark.usefixtures("chunk_tokens")
@pytest.mark.parametrize("overlap_tokens", [0, 1, 4])
@pytest.mark.parametrize(
    "places",
    [(4,), (4, 12), (1,), (7,), (3, 5), (6, 7, 13), tuple(range(1, 14))],
    ids=lambda places: "at_" + "_".join(map(str, places[:3])),
)
def test_cut_anywhere_and_carried_equals_one_pass(ops, read, places, overlap_tokens):
    given = draw(read, tokens=14, kv_heads=1, overlap_tokens=overlap_tokens, seed=12, start_share=0.15)
    whole, pieces = results(*given.attend()), results(*given.attend_in_pieces(*places))
    ops.assert_same(pieces, whole)
    ops.assert_same(gradients(given, pieces), gradients(given, whole))


@pytest.mark.parametrize("places", [(4,), (7,), (3, 5), tuple(range(1, 14))])
def test_writing_alone_leaves_the_same_state(ops, read, places):
    given = draw(read, tokens=14, seed=5, start_share=0.15)
    _, whole = given.attend()
    state, edges = given.first, [0, *places, 14]
    for pair in zip(edges[:-1], edges[1:], strict=True):
        piece = given.take(slice(*pair))
        grid = make_grid(*piece.marks, state.recent, 4)
        state = write_memory(*piece.inputs[1:3], state, grid, form=given.form, additions=Additions(piece.writing))
    ops.assert_same(results(torch.zeros(1), state), results(torch.zeros(1), whole))


@pytest.mark.usefixtures("chunk_tokens")
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("overlap_tokens", [0, 2])
@pytest.mark.parametrize("start_share", [0.0, 0.1])
def test_composed_memories_of_ranks_equal_one_pass(ops, read, start_share, overlap_tokens, ranks):
    """From a memory that is not empty, with documents that start anywhere."""
    given = draw(
        read, heads=4, tokens=24, overlap_tokens=overlap_tokens, value_size=3, seed=16, start_share=start_share
    )
    whole = results(*given.attend())
    found = ops.on_ranks(ranks, lambda rank, crossing: given.attend(None, (rank, ranks), crossing))
    joined = torch.cat([out for out, _ in found], 2)
    for _, state in found:
        ops.assert_same(results(joined, state), whole)
    ops.assert_same(gradients(given, results(joined, found[0][1])), gradients(given, whole))


def test_padding_leaves_the_memory_as_it_is(ops, read):
    """Weight 0: no write and no decay."""
    given = draw(read, tokens=12, seed=7)
    given.marks.weights_BT[:, 8:] = 0
    _, padded = given.attend()
    _, short = given.take(slice(0, 8)).attend()
    torch.testing.assert_close(padded.memory.memory_BKDE, short.memory.memory_BKDE, rtol=1e-12, atol=1e-12)


def test_from_an_edge_on_segments_may_have_another_length(ops, read):
    """As in training, whose windows may each be cut by another length. Gradients flow across the edges."""
    given = draw(read, start_share=0.1, tokens=28, overlap_tokens=3, heads=2, kv_heads=1)
    outs, slow_outs, state, memory = [], [], None, None
    for part, size in ((slice(0, 8), 4), (slice(8, 20), 6), (slice(20, 28), 8)):
        piece = given.take(part)._replace(segment_tokens=size)
        out, state = piece.attend(state)
        slow_out, memory = piece.attend_by_reference(memory)
        outs.append(out)
        slow_outs.append(slow_out)
    found, expected = results(torch.cat(outs, 2), state), results(torch.cat(slow_outs, 2), memory)
    ops.assert_same(without_entering(found, read), without_entering(expected, read))
    ops.assert_same(gradients(given, found), gradients(given, expected))


def test_weights_are_repetitions_of_a_token(read):
    """A token of weight 3 is written as three equal tokens without decay would be."""
    given = draw(read, tokens=1, seed=8)
    kept = Writing(given.writing.log_kept_BKT, torch.zeros_like(given.writing.log_decay_BKT))

    def write(weights, tokens):
        marks = torch.zeros(2, tokens, dtype=torch.bool), torch.full((2, tokens), weights)
        k, v = (x.expand(-1, -1, tokens, -1) for x in given.inputs[1:3])
        writing = Writing(*(x.expand(-1, -1, tokens) for x in kept))
        grid = make_grid(*marks, given.first.recent, 8)
        return write_memory(k, v, given.first, grid, form=given.form, additions=Additions(writing)).memory.memory_BKDE

    torch.testing.assert_close(write(3.0, 1), write(1.0, 3), rtol=1e-6, atol=1e-6)  # weights are fp32; keys not quite 1


@pytest.mark.parametrize("start_share", [0.0, 0.1])
def test_bf16_stays_within_rounding_of_the_inputs(read, start_share):
    """Against the exact result for the same rounded inputs: what the fast form itself adds."""
    given = draw(read, tokens=64, segment_tokens=16, key_size=16, value_size=16, seed=4, start_share=start_share)
    names = ("q_BHTD", "k_BKTD", "v_BKTE")
    narrow = {name: getattr(given.inputs, name).detach().bfloat16() for name in names}
    rounded = given._replace(inputs=given.inputs._replace(**{name: x.double() for name, x in narrow.items()}))
    weights = {name: getattr(given.inputs, name).bfloat16() for name in ("gate_HD", "norm_E")}
    low = given._replace(
        inputs=given.inputs._replace(**narrow, **weights, beta_H=given.inputs.beta_H.float()),
        logits=tuple(x.float() for x in given.logits),
        memory=GatedMemory(*(None if x is None else x.float() for x in given.memory)),
    )
    (exact, exact_state), (out, state) = rounded.attend(), low.attend()
    assert out.dtype == torch.bfloat16
    assert state.memory.memory_BKDE.dtype == torch.float32
    scale = exact.detach().abs().max()
    assert (out.double() - exact).abs().max() < 0.03 * scale
    memory = exact_state.memory.memory_BKDE
    assert (state.memory.memory_BKDE.double() - memory).abs().max() < 1e-5 * memory.abs().max()


@pytest.mark.parametrize("kept", ["nothing", "all"])
def test_extreme_strengths_and_decays_stay_finite(read, kept):
    """b of 1 or 0, a of 1 or 0, equal keys: the solve has its largest entries."""
    given = draw(read, tokens=256, segment_tokens=128, seed=9)
    far = 200.0 if kept == "nothing" else -200.0
    inputs = given.inputs._replace(k_BKTD=given.inputs.k_BKTD[:, :, :1].expand(-1, -1, 256, -1))
    extreme = given._replace(
        inputs=inputs, logits=(torch.full_like(given.logits[0], far), torch.full_like(given.logits[1], -far))
    )
    extreme.logits[0].requires_grad_()
    found = results(*extreme.attend())
    assert all(x.isfinite().all() for x in found.values())
    assert all(x.isfinite().all() for x in gradients(extreme, found).values())


def test_what_is_read_never_outgrows_what_was_written():
    """Over 64 thousand tokens in fp32: the delta rule contracts, whatever the keys."""
    source = torch.Generator().manual_seed(0)
    state, form = None, Form("gated_delta", read="token")
    for _ in range(16):
        k = torch.randn(1, 1, 4096, 16, generator=source) + 1  # overlapping keys
        v = torch.randn(1, 1, 4096, 16, generator=source)
        writing = Writing(torch.full((1, 1, 4096), -0.7), torch.zeros(1, 1, 4096))
        marks = torch.zeros(1, 4096, dtype=torch.bool), torch.ones(1, 4096)
        grid = make_grid(*marks, None if state is None else state.recent, 64)
        state = write_memory(k, v, state, grid, form=form, additions=Additions(writing))
        probes = unit(torch.randn(1, 1, 1000, 16, generator=source))
        assert (probes @ state.memory.memory_BKDE).norm(dim=-1).max() < 4 * 16**0.5
