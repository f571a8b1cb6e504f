"""Documents packed into one row know nothing of each other: not in their outputs, not in their gradients."""

import pytest
import torch

# Starts of the documents in each row; segments of 4 tokens. What comes before the first start belongs to the document
# that the initial memory was written for.
STARTS = ((5, 6, 13), (0, 8, 17))
TOKENS = 22
DOCUMENTS = [
    (row, begin, end)
    for row, starts in enumerate(STARTS)
    for begin, end in zip(sorted({0, *starts}), (*(s for s in starts if s), TOKENS), strict=True)
]


@pytest.fixture(params=DOCUMENTS, ids=lambda document: "row{}_from{}_to{}".format(*document))
def document(request):
    return request.param


@pytest.fixture(params=[0, 3], ids=["alone", "overlap"])
def packed(request, ops):
    """Two rows of documents; both rows enter with a filled memory."""
    window = ops.draw(ops.Shape(heads=4, tokens=TOKENS, overlap_tokens=request.param), seed=20)
    memory = window.memory
    memory = memory._replace(written_B=torch.full_like(memory.written_B, 3.0))
    memory.memory_BKDE[1], memory.normaliser_BKD[1] = memory.memory_BKDE[0] + 1, memory.normaliser_BKD[0] + 1
    starts = torch.zeros_like(window.starts_BT)
    for row, places in enumerate(STARTS):
        starts[row, list(places)] = True
    return window._replace(starts_BT=starts, memory=memory)


def inside(window, document):
    """Which tokens, and which initial memories, belong to the document: [B, T] and [B]."""
    row, begin, end = document
    tokens = torch.zeros_like(window.starts_BT)
    tokens[row, begin:end] = True
    return tokens, tokens[:, 0] & ~window.starts_BT[:, 0]


def replace_outside(window, document, others):
    """The window with all that doesn't belong to the document taken from `others`; the marks of documents stay."""
    tokens, rows = inside(window, document)
    here = dict.fromkeys("qkv", tokens[:, None, :, None])
    here |= {"memory": rows[:, None, None, None], "normaliser": rows[:, None, None]}
    theirs, leaves = others.leaves(), window.leaves()
    mixed = {name: torch.where(mask, leaves[name], theirs[name]) for name, mask in here.items()}
    weights = torch.where(tokens, window.weights_BT, others.weights_BT)
    return window.replace_leaves(**mixed)._replace(weights_BT=weights)


def draw_others(ops, window):
    """Tokens and memories a thousand times larger."""
    others = ops.draw(window.shape, seed=21)
    return others.replace_leaves(
        v=1e3 * others.v_BKTE,
        q=5 * others.q_BHTD,
        k=5 * others.k_BKTD,
        memory=1e3 * torch.ones_like(window.memory.memory_BKDE),
        normaliser=1e3 * torch.ones_like(window.memory.normaliser_BKD),
    )


@pytest.mark.parametrize("places", [(), (6, 15, 20)], ids=["one_pass", "pieces"])
def test_others_leave_no_trace_in_a_documents_outputs(ops, packed, document, update, places):
    row, begin, end = document
    out, _ = packed.attend_in_pieces(update, places)
    changed, _ = replace_outside(packed, document, draw_others(ops, packed)).attend_in_pieces(update, places)
    assert torch.equal(out[row, :, begin:end], changed[row, :, begin:end])
    assert not torch.equal(out, changed)


@pytest.mark.parametrize("places", [(), (6, 15, 20)], ids=["one_pass", "pieces"])
def test_a_documents_outputs_have_no_gradient_outside(packed, document, update, places):
    row, begin, end = document
    window = packed.with_fresh_leaves()
    out, _ = window.attend_in_pieces(update, places)
    out[row, :, begin:end].square().sum().backward()
    leaves, (tokens, rows) = window.leaves(), inside(window, document)
    for name in "qkv":
        per_token = leaves[name].grad.abs().sum(dim=(1, 3))
        assert not per_token[~tokens].any(), name
        assert per_token[tokens].any() or end - begin == 1, name  # what a lone token sees doesn't depend on its key
    for name in ("memory", "normaliser"):
        assert not leaves[name].grad[~rows].any(), name
        assert leaves[name].grad[rows].any() == rows.any(), name


def test_a_document_among_others_equals_itself_alone(ops, packed, document, update):
    """Alone: from its segment's edge on, with other tokens that are never written in the place of those before it."""
    row, begin, end = document
    edge = begin - begin % packed.shape.segment_tokens
    window = packed.with_fresh_leaves()
    direction = torch.randn(4, end - begin, 4, generator=torch.Generator().manual_seed(22), dtype=torch.float64)
    out, _ = window.attend(update)
    (direction * out[row, :, begin:end]).sum().backward()

    alone = replace_outside(packed, document, draw_others(ops, packed)).rows(torch.tensor([row])).take(slice(edge, end))
    alone.weights_BT[0, : begin - edge] = 0
    if begin > 0:
        alone = alone._replace(memory=ops.draw(alone.shape, filled=False).memory)
    alone = alone.with_fresh_leaves()
    out_alone, _ = alone.attend(update)
    (direction * out_alone[0, :, begin - edge :]).sum().backward()

    torch.testing.assert_close(out_alone[0, :, begin - edge :], out[row, :, begin:end], rtol=1e-11, atol=1e-11)
    among, apart = window.leaves(), alone.leaves()
    for name in "qkv":
        found, expected = apart[name].grad[0, :, begin - edge :], among[name].grad[row, :, begin:end]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(apart["beta"].grad, among["beta"].grad, rtol=1e-10, atol=1e-10)


def test_final_memory_holds_the_last_document_only(ops, packed, update):
    """Also in an open segment: 22 tokens are five segments and two tokens more."""
    for row, starts in enumerate(STARTS):
        document = (row, starts[-1], TOKENS)
        _, state = packed.attend(update)
        _, changed = replace_outside(packed, document, draw_others(ops, packed)).attend(update)
        for name, x in state.memory._asdict().items():
            assert torch.equal(x[row], getattr(changed.memory, name)[row]), name
        assert state.memory.written_B[row] == (packed.weights_BT[row, starts[-1] : 20] > 0).sum()


@pytest.mark.parametrize("start", range(12, 15))
def test_a_start_in_the_open_segment_empties_the_memory(ops, update, start):
    window = ops.draw(ops.Shape(batch=1, tokens=15), start_share=0.0, seed=23)
    window.starts_BT[0, start] = True
    _, state = window.attend(update)
    assert not any(x.any() for x in state.memory)


def test_padding_behind_a_start_is_a_document_that_writes_nothing(ops, update):
    """Padding is marked by a start and write weights of 0: memory stays empty, padding reads none of the text."""
    window = ops.draw(ops.Shape(batch=1, tokens=16), start_share=0.0, seed=24)
    window.starts_BT[0, 6] = True
    window.weights_BT[0, 6:] = 0
    out, state = window.attend(update)
    assert not any(x.any() for x in state.memory)
    changed, _ = replace_outside(window, (0, 6, 16), draw_others(ops, window)).attend(update)
    assert torch.equal(out[:, :, 6:], changed[:, :, 6:])


def test_tokens_of_weight_zero_are_not_written(ops, update):
    window = ops.draw(ops.Shape(batch=1, tokens=12), start_share=0.0, seed=25).with_fresh_leaves()
    hidden = torch.tensor([1, 2, 7, 11])
    window.weights_BT[0, hidden] = 0
    out, state = window.attend(update)
    (state.memory.memory_BKDE.square().sum() + state.memory.normaliser_BKD.square().sum()).backward()
    for x in (window.k_BKTD, window.v_BKTE):
        per_token = x.grad.abs().sum(dim=(0, 1, 3))
        assert not per_token[hidden].any()
        assert (per_token > 0).sum() == 8
    assert state.memory.written_B.tolist() == [3 + 8]
