"""Retrieval against its definition: one query after the other, float64, with its state and all gradients."""

import math

import pytest
import torch
from torch import Tensor

from infini_train.config.attention import MemorizingConfig
from infini_train.model.memorizing import MemorizingAttention
from infini_train.ops import knn
from infini_train.ops.rope import rotate

SEGMENT, TOKENS, HEADS, SIZE = 8, 29, 4, 8


def by_hand(attention: MemorizingAttention, hidden_TBD: Tensor, starts_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """arXiv 2203.08913, section 3.1: softmax over the best stored keys of the document, and a gate a head."""
    p, cache, stored = attention.projections, attention.layout.overlap_tokens, attention.stored_tokens
    document_BT = starts_BT.long().cumsum(1)

    def heads(linear, x_TBD: Tensor) -> Tensor:  # (B, H, T, D): two query heads share a key-value head
        x_BKTD = linear(x_TBD)[0].unflatten(-1, (-1, SIZE)).permute(1, 2, 0, 3)
        return x_BKTD.repeat_interleave(HEADS // x_BKTD.shape[1], 1)

    q = heads(p.linear_q, hidden_TBD)
    k, v = heads(p.linear_k, hidden_TBD), heads(p.linear_v, hidden_TBD)
    cached_k, cached_v = heads(p.linear_k, hidden_TBD.detach()), heads(p.linear_v, hidden_TBD.detach())
    rows = []
    for b in range(hidden_TBD.shape[1]):
        for h in range(HEADS):
            for t in range(TOKENS):
                begin = t // SEGMENT * SEGMENT
                origin = begin - cache
                same = [u for u in range(t + 1) if document_BT[b, u] == document_BT[b, t]]
                near = [u for u in same if u >= origin]
                keys = [(k if u >= begin else cached_k)[b, h, u] for u in near]
                values = [(v if u >= begin else cached_v)[b, h, u] for u in near]
                turned = [rotate(key[None], u - origin, attention.rope)[0] for u, key in zip(near, keys, strict=True)]
                query = rotate(q[b, h, t][None], t - origin, attention.rope)[0]
                out = (torch.stack(turned) @ query / math.sqrt(SIZE)).softmax(0) @ torch.stack(values)
                far = [u for u in same if begin - stored <= u < begin and weights_BT[b, u] > 0]
                if far:
                    scores = k[b, h, far].detach() @ q[b, h, t] / math.sqrt(SIZE)
                    best = scores.topk(min(attention.top_k, len(far)))
                    found = best.values.softmax(0) @ v[b, h, far].detach()[best.indices]
                    gate = torch.sigmoid(attention.gate[h])
                    out = gate * found + (1 - gate) * out
                rows.append(out)
    out_BHTE = torch.stack(rows).view(hidden_TBD.shape[1], HEADS, TOKENS, SIZE)
    return p.linear_o(out_BHTE.permute(2, 0, 1, 3).flatten(2))[0]


def example(tools, **changes: int):
    config = MemorizingConfig(
        **{"segment_tokens": SEGMENT, "cache_tokens": 5, "stored_tokens": 12, "top_k": 3} | changes
    )
    model = tools.build(tools.tiny(attention=config)).double()
    attention = model.layers["1"].attention
    with torch.no_grad():
        attention.gate.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    generator = torch.Generator().manual_seed(1)
    hidden_TBD = torch.randn(TOKENS, 2, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    starts_BT, weights_BT = torch.zeros(2, TOKENS, dtype=torch.bool), torch.ones(2, TOKENS)
    starts_BT[0, 0] = starts_BT[1, 11] = starts_BT[1, 0] = True
    weights_BT[0, 3] = weights_BT[1, 14] = 0
    return model, attention, hidden_TBD, starts_BT, weights_BT


@pytest.mark.parametrize(
    "changes",
    [{}, {"stored_tokens": 64, "top_k": 64}, {"top_k": 1}, {"cache_tokens": 0}, {"stored_tokens": 5}],
    ids=str,
)
@pytest.mark.parametrize("part_numbers", [1, 2**24])
def test_it_is_the_definition_with_its_gradients(changes, part_numbers, tools, monkeypatch):
    """Whatever the parts that the search goes in."""
    monkeypatch.setattr(knn, "PART_NUMBERS", part_numbers)
    model, attention, hidden_TBD, starts_BT, weights_BT = example(tools, **changes)
    grid = model.make_grids(starts_BT, weights_BT, None).of(attention.layout)
    weights = torch.randn(TOKENS, 2, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = [hidden_TBD, *attention.parameters()]
    found = attention(hidden_TBD, None, grid)[0]
    expected = by_hand(attention, hidden_TBD, starts_BT, weights_BT)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for mine, theirs in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_the_state_is_the_last_places_of_closed_segments(tools):
    """Two calls, cut inside a segment; the store holds keys and values as they were, and no gradient."""
    model, attention, hidden_TBD, starts_BT, weights_BT = example(tools)
    state, p = None, attention.projections
    for piece in (slice(0, 13), slice(13, TOKENS)):
        # the grid is made of the first state of this layout; all have the same marks
        states = None if state is None else (state.recent, state)
        grid = model.make_grids(starts_BT[:, piece], weights_BT[:, piece], states).of(attention.layout)
        _, state = attention(hidden_TBD[piece], state, grid)
    k_BKTD = p.linear_k(hidden_TBD)[0].unflatten(-1, (-1, SIZE)).permute(1, 2, 0, 3)
    v_BKTE = p.linear_v(hidden_TBD)[0].unflatten(-1, (-1, SIZE)).permute(1, 2, 0, 3)
    closed = slice(24 - 12, 24)
    torch.testing.assert_close(state.store.k_BKMD, k_BKTD[:, :, closed].detach())
    torch.testing.assert_close(state.store.v_BKME, v_BKTE[:, :, closed].detach())
    assert not state.store.k_BKMD.requires_grad
    seen = torch.ones(2, 12)
    seen[1, 14 - 12] = 0  # of weight 0
    assert torch.equal(state.store.weight_BM, seen)


def test_a_document_that_begins_empties_the_store_at_once(tools):
    model, attention, hidden_TBD, starts_BT, weights_BT = example(tools)
    starts_BT[0, 26] = True  # in the segment that stays open
    grid = model.make_grids(starts_BT, weights_BT, None).of(attention.layout)
    _, state = attention(hidden_TBD, None, grid)
    assert state.store.weight_BM[0].sum() == 0 and state.store.weight_BM[1].sum() > 0


def test_only_the_chosen_layer_stores(tools):
    config = tools.tiny("memorizing", num_layers=4)
    assert config.attention.retrieval_layer(config.num_layers) == 3
    names = [name for name, _ in tools.build(config).named_parameters() if name.endswith("gate")]
    assert names == ["layers.3.attention.gate"]


def test_everything_that_is_stored_is_attention_to_everything(tools):
    """With all places among the best and the gate open, a query attends to the whole past alone."""
    model, attention, hidden_TBD, starts_BT, weights_BT = example(tools, stored_tokens=64, top_k=64, cache_tokens=0)
    with torch.no_grad():
        attention.gate.fill_(60.0)
    starts_BT[:, 1:] = False
    grid = model.make_grids(starts_BT, torch.ones_like(weights_BT), None).of(attention.layout)
    out_TBD, _ = attention(hidden_TBD, None, grid)
    p = attention.projections
    q, k, v = p.split(hidden_TBD)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    last = q[:, :, 24:] @ k[:, :, :24].transpose(-1, -2) / math.sqrt(SIZE)
    torch.testing.assert_close(out_TBD[24:], p.join(last.softmax(-1) @ v[:, :, :24]))
