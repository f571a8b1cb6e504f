"""Loss beside a teacher against the plain formula on all logits, with all gradients.

Legend: N tokens, D hidden size, V vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F

from infini_train.ops.chunked_loss import Rows, weighted_loss
from infini_train.ops.distillation import taught_loss
from tests.ops.test_chunked_loss import V, chunks, draw, side_by_side  # noqa: F401 (chunks is a fixture)


def draw_taught(**options):
    """As there, and the teacher's hidden states."""
    hidden_ND, weight_VD, labels_N, factors_N = draw(**options)
    source = torch.Generator().manual_seed(1)
    teacher_ND = hidden_ND + 0.3 * torch.randn(hidden_ND.shape, generator=source, dtype=hidden_ND.dtype)
    return hidden_ND, teacher_ND, weight_VD, labels_N, factors_N


def plain(hidden_ND, teacher_ND, weight_VD, labels_N, factors_N, share):
    """The three sums, and the gradients of the first."""
    hidden_ND, weight_VD = hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    log_p_NV = (hidden_ND @ weight_VD.t()).log_softmax(-1)
    log_t_NV = (teacher_ND @ weight_VD.detach().t()).log_softmax(-1)
    text_N = F.nll_loss(log_p_NV, labels_N, ignore_index=-100, reduction="none")
    divergence_N = F.kl_div(log_p_NV, log_t_NV, log_target=True, reduction="none").sum(-1)
    factors_N = factors_N.masked_fill(labels_N < 0, 0.0)
    sums = (text_N * factors_N).sum(), (divergence_N * factors_N).sum()
    objective = (1 - share) * sums[0] + share * sums[1]
    gradients = torch.autograd.grad(objective, (hidden_ND, weight_VD))
    return (torch.stack((objective, *sums)).detach(), *gradients)


def in_chunks(hidden_ND, teacher_ND, weight_VD, labels_N, factors_N, share, first=0, gather=lambda x_CK: x_CK):
    hidden_ND, weight_VD = hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    sums_3 = taught_loss(hidden_ND, teacher_ND, Rows(weight_VD, first, gather), labels_N, factors_N, share)
    return (sums_3.detach(), *torch.autograd.grad(2 * sums_3[0], (hidden_ND, weight_VD), torch.tensor(0.5)))


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_sums_and_gradients_are_those_of_all_logits(chunks, share):  # noqa: F811
    drawn = draw_taught()
    for found, expected in zip(in_chunks(*drawn, share), plain(*drawn, share), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_a_vocabulary_divided_over_ranks_gives_the_same(chunks, ops):  # noqa: F811
    hidden_ND, teacher_ND, weight_VD, labels_N, factors_N = drawn = draw_taught()

    def run(rank, crossing):
        rows = slice(rank * V // 2, (rank + 1) * V // 2)
        parts = hidden_ND, teacher_ND, weight_VD[rows], labels_N, factors_N
        return in_chunks(*parts, 0.3, first=rows.start, gather=side_by_side(crossing))

    found = ops.on_ranks(2, run)
    sums_3, grad_hidden_ND, grad_weight_VD = plain(*drawn, 0.3)
    torch.testing.assert_close(found[0][0], sums_3)
    torch.testing.assert_close(found[1][0], sums_3)
    torch.testing.assert_close(found[0][1] + found[1][1], grad_hidden_ND)
    torch.testing.assert_close(torch.cat((found[0][2], found[1][2])), grad_weight_VD)


def test_a_teacher_that_says_the_same_changes_nothing():
    hidden_ND, _, weight_VD, labels_N, factors_N = draw_taught()
    sums_3, grad_hidden_ND, grad_weight_VD = in_chunks(hidden_ND, hidden_ND, weight_VD, labels_N, factors_N, 1.0)
    assert sums_3[[0, 2]].abs().max() < 1e-12
    assert grad_hidden_ND.abs().max() < 1e-12 and grad_weight_VD.abs().max() < 1e-12


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_fp32_stays_near_float64(scale):
    drawn = draw_taught(scale=scale**0.5)
    exact = in_chunks(*drawn, 0.5)
    narrow = in_chunks(*(x.float() if x.is_floating_point() else x for x in drawn), 0.5)
    for found, expected in zip(narrow, exact, strict=True):
        assert (found.double() - expected).norm() <= 1e-5 * expected.norm()


def test_a_weight_that_is_not_trained_costs_no_gradient():
    hidden_ND, teacher_ND, weight_VD, labels_N, factors_N = draw_taught()
    hidden_ND.requires_grad_()
    taught_loss(hidden_ND, teacher_ND, Rows(weight_VD), labels_N, factors_N, 0.5)[0].backward()
    taught, hidden_ND.grad = hidden_ND.grad, None
    expected = in_chunks(hidden_ND.detach(), teacher_ND, weight_VD, labels_N, factors_N, 0.5)[1]
    torch.testing.assert_close(taught, expected)
    weighted_loss(hidden_ND, Rows(weight_VD), labels_N, factors_N).backward()
    assert hidden_ND.grad.abs().sum() > 0 and weight_VD.grad is None
