"""Transformer-XL against its equations: segment by segment, the one before through hidden values without gradient."""

import math

import pytest
import torch
from torch import Tensor

from infini_train.config.attention import TransformerXLConfig
from infini_train.model.local import TransformerXLAttention
from infini_train.ops.rope import rotate

SEGMENT = 8


def by_hand(attention: TransformerXLAttention, hidden_TBD: Tensor, cache: int) -> Tensor:
    """arXiv 1901.02860, section 3.2, one head group after the other; positions are rotary."""
    p = attention.projections
    found = []
    for begin in range(0, len(hidden_TBD), SEGMENT):
        own = hidden_TBD[begin : begin + SEGMENT]
        seen = torch.cat((hidden_TBD[max(0, begin - cache) : begin].detach(), own))
        before, shift = len(seen) - len(own), cache - (len(seen) - len(own))

        def heads(linear, x_TBD: Tensor, size: int) -> Tensor:
            return linear(x_TBD)[0].unflatten(-1, (-1, size)).permute(1, 2, 0, 3)

        q = rotate(heads(p.linear_q, own, p.key_dim), cache, attention.rope)
        k = rotate(heads(p.linear_k, seen, p.key_dim), shift, attention.rope).repeat_interleave(2, 1)
        v = heads(p.linear_v, seen, p.value_dim).repeat_interleave(2, 1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(p.key_dim)
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1 + before).bool(), -math.inf)
        found.append(p.linear_o((scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2))[0])
    return torch.cat(found)


@pytest.mark.parametrize("cache", [1, 5, 8])
def test_it_is_the_recurrence_of_the_paper_with_its_gradients(cache, tools):
    model = tools.build(tools.tiny(attention=TransformerXLConfig(segment_tokens=SEGMENT, cache_tokens=cache)))
    attention = model.layers["0"].attention
    hidden_TBD = torch.randn(29, 2, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = torch.randn(29, 2, 32, generator=torch.Generator().manual_seed(2))
    grid = model.make_grids(torch.zeros(2, 29, dtype=torch.bool), torch.ones(2, 29), None).of(attention.layout)
    inputs = [hidden_TBD, *attention.parameters()]
    found, expected = attention(hidden_TBD, None, grid)[0], by_hand(attention, hidden_TBD, cache)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for mine, theirs in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_no_gradient_reaches_the_cache(tools):
    model = tools.build(tools.tiny("transformer-xl"))
    hidden_TBD = torch.randn(16, 1, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    attention = model.layers["0"].attention
    grid = model.make_grids(torch.zeros(1, 16, dtype=torch.bool), torch.ones(1, 16), None).of(attention.layout)
    out_TBD, _ = attention(hidden_TBD, None, grid)
    (gradient,) = torch.autograd.grad(out_TBD[8:].square().sum(), hidden_TBD)
    assert gradient[:8].abs().max() == 0 and gradient[8:].abs().min(0).values.max() > 0
