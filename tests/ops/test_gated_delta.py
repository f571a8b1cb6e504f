"""The gated delta memory against plain loops, against itself in pieces and over ranks, and in lower precision."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from infini_train.ops import gated_delta, gated_reference, reference
from infini_train.ops.attention import Additions, InfiniState, infini_attention, write_memory
from infini_train.ops.gated_delta import GatedMemory, Writing, unit
from infini_train.ops.gated_reference import GatedInputs
from infini_train.ops.grid import make_grid, no_recent
from infini_train.ops.memory import Form
from infini_train.ops.rope import Rope

ROPE = Rope(100.0)
SHAPES = {
    "plain": {},
    "one_token": {"tokens": 1},
    "inside_one_segment": {"tokens": 3},
    "ragged": {"tokens": 14, "segment_tokens": 5},
    "groups_of_two": {"heads": 4, "tokens": 9},
    "one_kv_head_for_three": {"heads": 3, "kv_heads": 1, "batch": 3, "tokens": 8, "overlap_tokens": 1},
    "values_wider_than_keys": {"key_size": 2, "value_size": 5, "tokens": 10},
    "segments_of_one_token": {"segment_tokens": 1, "tokens": 7},
    "overlap_of_a_whole_segment": {"tokens": 11, "segment_tokens": 3, "overlap_tokens": 3},
    "several_chunks_a_segment": {"tokens": 25, "segment_tokens": 11, "heads": 1, "kv_heads": 1},
}


class Draw(NamedTuple):
    """Random inputs of one call, and the memory before it; gradients are asked of all but the marks."""

    inputs: GatedInputs
    logits: tuple[Tensor, Tensor]  # of strength and decay
    marks: reference.Marks
    memory: GatedMemory
    segment_tokens: int
    overlap_tokens: int

    def leaves(self) -> dict[str, Tensor]:
        named = self.inputs._asdict() | dict(zip(("strength", "decay"), self.logits, strict=True))
        named |= {"memory": self.memory.memory_BKDE, "entering": self.memory.entering_BKDE}
        return {name: x for name, x in named.items() if isinstance(x, Tensor) and x.requires_grad}

    def take(self, part: slice, logits: tuple[Tensor, Tensor] | None = None) -> "Draw":
        inputs = self.inputs._replace(
            q_BHTD=self.inputs.q_BHTD[:, :, part],
            k_BKTD=self.inputs.k_BKTD[:, :, part],
            v_BKTE=self.inputs.v_BKTE[:, :, part],
        )
        marks = reference.Marks(*(mark[:, part] for mark in self.marks))
        return self._replace(inputs=inputs, logits=tuple(x[:, :, part] for x in self.logits), marks=marks)

    @property
    def form(self) -> Form:
        return Form("gated_delta", read="token" if self.memory.entering_BKDE is None else "segment")

    @property
    def first(self) -> InfiniState:
        k, v = self.inputs.k_BKTD, self.inputs.v_BKTE
        return InfiniState(self.memory, no_recent((*k.shape[:2], k.shape[3]), v.shape[3], self.overlap_tokens, k))

    def attend(self, state=None, shard=(0, 1), ranks=None):
        """The fast form."""
        state = state or self.first
        grid = make_grid(*self.marks, state.recent, self.segment_tokens, self.overlap_tokens, shard)
        tokens = grid.tokens
        part = slice(shard[0] * tokens, (shard[0] + 1) * tokens) if ranks else slice(None)
        mine = self.take(part)
        return infini_attention(
            *mine.inputs[:3],
            self.inputs.beta_H,
            state,
            grid,
            form=self.form,
            rope=ROPE,
            ranks=ranks,
            additions=mine.additions,
        )

    @property
    def writing(self) -> Writing:
        strength, decay = self.logits
        return Writing(torch.nn.functional.logsigmoid(-strength), torch.nn.functional.logsigmoid(decay))

    @property
    def additions(self) -> Additions:
        weight = self.inputs.norm_E
        norm = None
        if weight is not None:
            norm = lambda x: torch.nn.functional.rms_norm(x, weight.shape, weight, gated_reference.EPS)  # noqa: E731
        return Additions(self.writing, self.inputs.gate_HD, norm)

    def attend_in_pieces(self, *places: int):
        edges = [0, *places, self.inputs.q_BHTD.shape[2]]
        outs, state = [], None
        for pair in zip(edges[:-1], edges[1:], strict=True):
            out, state = self.take(slice(*pair)).attend(state)
            outs.append(out)
        return torch.cat(outs, 2), state

    def attend_by_reference(self, memory=None):
        strength, decay = (torch.sigmoid(x) for x in self.logits)
        inputs = self.inputs._replace(strength_BKT=strength, decay_BKT=decay)
        if memory is None:
            entering = self.memory.memory_BKDE if self.memory.entering_BKDE is None else self.memory.entering_BKDE
            memory = gated_reference.empty_memory(inputs)._replace(
                memory_BKDE=self.memory.memory_BKDE, entering_BKDE=entering, written_B=self.memory.written_B
            )
        form = reference.Form(self.segment_tokens, "linear", self.overlap_tokens, ROPE)
        return gated_reference.attend(inputs, self.marks, memory, form, self.form.read)


def draw(read="token", seed=0, start_share=0.0, plain_additions=False, filled=True, **shape):
    """`shape`: any of the sizes below."""
    sizes = {"batch": 2, "heads": 2, "kv_heads": 2, "tokens": 12, "segment_tokens": 4, "key_size": 4, "value_size": 4}
    batch, heads, kv_heads, tokens, segment_tokens, key_size, value_size, overlap_tokens = (
        {**sizes, "overlap_tokens": 0} | shape
    ).values()
    source = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=source, dtype=torch.float64).requires_grad_()

    q, k = normal(batch, heads, tokens, key_size), normal(batch, kv_heads, tokens, key_size)
    v, beta = normal(batch, kv_heads, tokens, value_size), normal(heads)
    logits = normal(batch, kv_heads, tokens), (2 + normal(batch, kv_heads, tokens)).detach().requires_grad_()
    extra = (None, None) if plain_additions else (normal(heads, key_size), normal(value_size))
    starts = torch.rand(batch, tokens, generator=source) < start_share
    weights = torch.tensor([0, 0.25, 1, 1, 2.5])[torch.randint(5, (batch, tokens), generator=source)]
    weights = weights if start_share else torch.ones_like(weights)
    written = 3.0 * (torch.arange(batch) % 2 == 0).double() * filled
    memory = (normal(batch, kv_heads, key_size, value_size) * (written > 0)[:, None, None, None]).detach()
    memory.requires_grad_()
    state = GatedMemory(memory, memory if read == "segment" else None, written)
    inputs = GatedInputs(q, k, v, *logits, beta, *extra)
    return Draw(inputs, logits, reference.Marks(starts, weights.double()), state, segment_tokens, overlap_tokens)


def results(out, state) -> dict[str, Tensor]:
    if isinstance(state, InfiniState):
        memory, recent = state.memory, state.recent
        entering = memory.memory_BKDE if memory.entering_BKDE is None else memory.entering_BKDE
        return {"out": out, "memory": memory.memory_BKDE, "entering": entering, "written": memory.written_B,
                "recent_k": recent.k_BKRD}  # fmt: skip
    return {"out": out, "memory": state.memory_BKDE, "entering": state.entering_BKDE, "written": state.written_B,
            "recent_k": state.recent_k_BKRD}  # fmt: skip


def gradients(given: Draw, found: dict[str, Tensor], names=("out", "memory")) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(1)
    total = sum(
        (torch.randn(found[name].shape, generator=source, dtype=torch.float64) * found[name]).sum() for name in names
    )
    leaves = given.leaves()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def without_entering(found: dict[str, Tensor], read: str) -> dict[str, Tensor]:
    """Where every token reads all before it, there is no other memory."""
    return {name: x for name, x in found.items() if read == "segment" or name != "entering"}


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
        state = write_memory(*piece.inputs[1:3], state, grid, form=given.form, writing=piece.writing)
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
    barrier, places = threading.Barrier(ranks, timeout=60), [None] * ranks
    with ThreadPoolExecutor(ranks) as pool:
        found = list(
            pool.map(lambda rank: given.attend(None, (rank, ranks), ops.Thread(rank, barrier, places)), range(ranks))
        )
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
        return write_memory(k, v, given.first, grid, form=given.form, writing=writing).memory.memory_BKDE

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
        state = write_memory(k, v, state, grid, form=form, writing=writing)
        probes = unit(torch.randn(1, 1, 1000, 16, generator=source))
        assert (probes @ state.memory.memory_BKDE).norm(dim=-1).max() < 4 * 16**0.5
