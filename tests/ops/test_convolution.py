"""The short convolution against its loop: whole, in pieces, over ranks; values and gradients in float64."""

import pytest
import torch

from infini_train.ops import reference
from infini_train.ops.convolution import convolve
from infini_train.ops.grid import make_grid

LANES, TOKENS, CHANNELS, SEGMENT = 3, 24, 5, 4
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(params=[0.0, 0.15, 0.6], ids="starts {}".format)
def drawn(request):
    """x_BTD, weight_JD with a gradient each, and where documents start; never at the first token of the first lane."""
    source = torch.Generator().manual_seed(3)
    x_BTD = torch.randn(LANES, TOKENS, CHANNELS, generator=source, dtype=torch.float64).requires_grad_()
    weight_JD = torch.randn(3, CHANNELS, generator=source, dtype=torch.float64).requires_grad_()
    starts_BT = torch.rand(LANES, TOKENS, generator=source) < request.param
    starts_BT[0, 0] = False
    return x_BTD, weight_JD, starts_BT


def expected(x_BTD, weight_JD, starts_BT):
    """Output and its gradients by the reference, for a loss in which every number has another weight."""
    out_BTD, histories = reference.convolve(x_BTD, weight_JD, starts_BT)
    return out_BTD, torch.autograd.grad(weigh(out_BTD), (x_BTD, weight_JD)), histories


def weigh(out_BTD):
    return (out_BTD * torch.arange(out_BTD.numel(), dtype=out_BTD.dtype).view_as(out_BTD).cos()).sum()


@pytest.mark.parametrize("cuts", [(), (8,), (1, 2, 3, 5, 17), tuple(range(1, TOKENS))], ids=str)
def test_values_gradients_and_what_is_carried_are_those_of_the_loop(drawn, cuts):
    x_BTD, weight_JD, starts_BT = drawn
    out_BTD, gradients, histories = expected(*drawn)
    before, pieces = None, []
    for begin, end in zip((0, *cuts), (*cuts, TOKENS), strict=True):
        grid = make_grid(starts_BT[:, begin:end], torch.ones(LANES, end - begin), None, None)
        piece_TBD, before = convolve(x_BTD[:, begin:end].transpose(0, 1), weight_JD, before, grid)
        pieces.append(piece_TBD.transpose(0, 1))
    found_BTD = torch.cat(pieces, 1)
    torch.testing.assert_close(found_BTD, out_BTD, **EXACT)
    for found, right in zip(torch.autograd.grad(weigh(found_BTD), (x_BTD, weight_JD)), gradients, strict=True):
        torch.testing.assert_close(found, right, **EXACT)
    for row, history in zip(before, histories, strict=True):
        held = torch.stack(history[-3:])
        torch.testing.assert_close(row[3 - len(held) :], held, **EXACT)
        assert not row[: 3 - len(held)].any()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_equal_one_pass(drawn, ops, ranks):
    x_BTD, weight_JD, starts_BT = drawn
    first_BTD = torch.randn(LANES, 7, CHANNELS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    nothing = torch.zeros(LANES, 7, dtype=torch.bool)
    earlier = make_grid(nothing, torch.ones(LANES, 7), None, 7)
    before_BJD = convolve(first_BTD.transpose(0, 1), weight_JD, None, earlier)[1].detach()
    whole_TBD, carried = convolve(
        x_BTD.transpose(0, 1), weight_JD, before_BJD, make_grid(starts_BT, torch.ones(LANES, TOKENS), None, SEGMENT)
    )

    def run(rank, crossing):
        grid = make_grid(starts_BT, torch.ones(LANES, TOKENS), None, SEGMENT, shard=(rank, ranks))
        mine_TBD = x_BTD.transpose(0, 1).chunk(ranks)[rank]
        return convolve(mine_TBD, weight_JD, before_BJD, grid, crossing)

    found = ops.on_ranks(ranks, run)
    found_TBD = torch.cat([out for out, _ in found])
    torch.testing.assert_close(found_TBD, whole_TBD, **EXACT)
    for _, theirs in found:
        torch.testing.assert_close(theirs, carried, **EXACT)
    wanted = torch.autograd.grad(weigh(whole_TBD), (x_BTD, weight_JD))
    for got, right in zip(torch.autograd.grad(weigh(found_TBD), (x_BTD, weight_JD)), wanted, strict=True):
        torch.testing.assert_close(got, right, **EXACT)


def test_bf16_stays_bf16(drawn):
    x_BTD, weight_JD, starts_BT = (x.detach() for x in drawn)
    narrow = x_BTD.transpose(0, 1).bfloat16(), weight_JD.bfloat16()
    grid = make_grid(starts_BT, torch.ones(LANES, TOKENS), None, None)
    out_TBD, before_BJD = convolve(*narrow, None, grid)
    assert out_TBD.dtype == before_BJD.dtype == torch.bfloat16
    expected_BTD, _ = reference.convolve(x_BTD, weight_JD, starts_BT)
    torch.testing.assert_close(out_TBD.transpose(0, 1).double(), expected_BTD, rtol=0.05, atol=0.1)
