"""The Recurrent Memory Transformer against its definition: place by place, float64, all gradients."""

import math

import pytest
import torch
from torch import Tensor

from infini_train.config.attention import RmtConfig
from infini_train.model.transformer import Transformer
from infini_train.ops.rope import rotate

SEGMENT, MEMORY = 8, 3


def run_stack(model: Transformer, x_JD: Tensor, sees_JJ: Tensor) -> Tensor:
    """All layers over one segment of one lane; rotary positions count its places."""
    x_TBD = x_JD[:, None]
    for layer in model.layers.values():
        p = layer.attention.projections

        def heads(linear, size: int, mixed_TBD: Tensor) -> Tensor:
            return linear(mixed_TBD)[0].unflatten(-1, (-1, size)).permute(1, 2, 0, 3)

        mixed_TBD = layer.norm_attention(x_TBD)
        q = rotate(heads(p.linear_q, p.key_dim, mixed_TBD), 0, layer.attention.rope)
        k = rotate(heads(p.linear_k, p.key_dim, mixed_TBD), 0, layer.attention.rope).repeat_interleave(2, 1)
        v = heads(p.linear_v, p.value_dim, mixed_TBD).repeat_interleave(2, 1)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(p.key_dim)).masked_fill(~sees_JJ, -math.inf)
        x_TBD = x_TBD + p.linear_o((scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2))[0]
        x_TBD = x_TBD + layer.feed_forward(layer.norm_feed_forward(x_TBD))
    return x_TBD[:, 0]


def by_hand(model: Transformer, tokens_T: Tensor, starts_T: Tensor, weights_T: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv 2207.06881, section 3.2, of one lane: hidden values of the tokens, and the memory after them."""
    first_MD = memory_MD = model.memory_tokens.weight
    embedded_TD = model.embedding(tokens_T[None])[:, 0]
    document_T, out = starts_T.long().cumsum(0), []
    for begin in range(0, len(tokens_T), SEGMENT):
        segment = range(begin, min(begin + SEGMENT, len(tokens_T)))
        if starts_T[begin]:
            memory_MD = first_MD
        one_document = document_T[segment[-1]] == document_T[begin]
        places = [("read", i) for i in range(MEMORY)] + [("token", t) for t in segment]
        parts = [memory_MD, embedded_TD[begin : segment.stop]]
        if len(segment) == SEGMENT:
            places += [("write", i) for i in range(MEMORY)]
            parts.append(memory_MD if one_document else first_MD)

        def sees(mine: tuple[str, int], other: tuple[str, int], begin=begin, segment=segment) -> bool:
            (kind, i), (other_kind, j) = mine, other
            last = segment[-1]
            if kind == other_kind:
                return j <= i and (kind != "token" or bool(document_T[i] == document_T[j]))
            if kind == "token":
                return other_kind == "read" and bool(document_T[i] == document_T[begin])
            if kind == "write" and other_kind == "token":
                return bool(document_T[j] == document_T[last]) and bool(weights_T[j] > 0)
            return kind == "write" and other_kind == "read" and bool(document_T[last] == document_T[begin])

        sees_JJ = torch.tensor([[sees(mine, other) for other in places] for mine in places])
        x_JD = run_stack(model, torch.cat(parts), sees_JJ)
        out.append(x_JD[MEMORY : MEMORY + len(segment)])
        if len(segment) == SEGMENT:
            memory_MD = model.norm_final(x_JD[MEMORY + SEGMENT :])
    return torch.cat(out), memory_MD


def example(tools, tokens: int):
    model = tools.build(tools.tiny("rmt")).double()
    with torch.no_grad():
        model.memory_tokens.weight.mul_(20)
    starts_BT, weights_BT = torch.zeros(2, tokens, dtype=torch.bool), torch.ones(2, tokens)
    starts_BT[:, 0] = True
    if tokens > 20:
        starts_BT[0, 16] = starts_BT[1, 11] = starts_BT[1, 13] = True
        weights_BT[0, 5] = weights_BT[1, 14] = 0
    return model, tools.draw(tokens), starts_BT, weights_BT


@pytest.mark.parametrize("tokens", [5, 8, 32, 37])
def test_it_is_the_definition_with_its_gradients(tokens, tools):
    """Document starts at a segment's edge and inside, twice in one segment, tokens that are not written."""
    model, tokens_BT, starts_BT, weights_BT = example(tools, tokens)
    grid = model.make_grids(starts_BT, weights_BT, None)
    found_TBD, state = model.decode(tokens_BT, grid, None)
    lanes = [by_hand(model, tokens_BT[b], starts_BT[b], weights_BT[b]) for b in range(2)]
    expected_TBD = torch.stack([lane[0] for lane in lanes], 1)
    memory_BMD = torch.stack([lane[1] for lane in lanes])
    torch.testing.assert_close(found_TBD, expected_TBD, rtol=1e-9, atol=1e-10)
    written_B111 = (state[0].written_B > 0)[:, None, None]
    torch.testing.assert_close(
        torch.where(written_B111, state[0].memory_BMD, model.memory_tokens.weight), memory_BMD, rtol=1e-9, atol=1e-10
    )
    weights = torch.randn(found_TBD.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = [p for name, p in model.named_parameters() if not name.startswith(("norm_final", "head"))]
    gradients = torch.autograd.grad((found_TBD * weights).sum() + memory_BMD.detach().sum(), inputs)
    expected = torch.autograd.grad((expected_TBD * weights).sum(), inputs)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_gradients_flow_through_all_segments(tools):
    """The first segment's embeddings feel the last segment's loss, by way of the memory tokens alone."""
    model, tokens_BT, starts_BT, weights_BT = example(tools, 40)
    starts_BT[:, 1:] = False
    tokens_BT[:, :8] = 39
    tokens_BT[:, 8:] %= 39
    hidden_TBD, _ = model.decode(tokens_BT, model.make_grids(starts_BT, weights_BT, None), None)
    (gradient,) = torch.autograd.grad(hidden_TBD[32:].square().sum(), model.embedding.weight)
    assert gradient[39].abs().max() > 1e-9


def test_what_was_written_counts_the_documents_tokens(tools):
    model, tokens_BT, starts_BT, weights_BT = example(tools, 37)
    state = model.decode(tokens_BT, model.make_grids(starts_BT, weights_BT, None), None)[1]
    assert state[0].written_B.tolist() == [16, 18]  # from 16 on; from 13 on, one of them of weight 0
    assert state[0].recent.document_BR.shape == (2, 5) and state[0].recent.k_BKRD.shape[2] == MEMORY + 5


def test_memory_does_not_grow(tools):
    """It is taken behind the final norm: after many segments it is as large as after one."""
    model = tools.build(tools.tiny(attention=RmtConfig(segment_tokens=4, memory_tokens=2)))
    state, sizes = None, []
    for seed in range(40):
        state = tools.run(model, tools.draw(4, seed=seed), state=state)[1]
        sizes.append(state[0].memory_BMD.square().mean().item())
    assert max(sizes[-10:]) < 2 * sizes[0]
