"""The loss in chunks against cross-entropy of all logits, with all gradients.

Legend: N tokens, D hidden size, V vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F

from infini_train.ops import chunked_loss
from infini_train.ops.chunked_loss import Rows, chunk_tokens, token_losses, weighted_loss

D, V = 8, 24


@pytest.fixture(params=[5, 7, 64], ids=["chunks-of-5", "chunks-of-7", "one-chunk"])
def chunks(request, monkeypatch):
    """21 tokens in five chunks, the last of one token, in three, or in one."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4)
    monkeypatch.setattr(chunked_loss, "LEAST_TOKENS", request.param)


def draw(tokens=21, dtype=torch.float64, scale=1.0):
    """Hidden states, a weight, labels of which some are none, and factors of which some are 0 or negative."""
    source = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = (scale * torch.randn(rows, D, generator=source, dtype=torch.float64) for rows in (tokens, V))
    labels_N = torch.randint(0, V, (tokens,), generator=source)
    labels_N[[0, 9, 10]] = -100
    factors_N = torch.randn(tokens, generator=source).mul(3).round()
    return hidden_ND.to(dtype), weight_VD.to(dtype), labels_N, factors_N


def whole(hidden_ND, weight_VD, labels_N, factors_N):
    """Losses, and the gradients of their weighted sum: all logits at once, in fp32 at least."""
    hidden_ND, weight_VD = hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    logits_NV = hidden_ND @ weight_VD.t()
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    loss_N = F.cross_entropy(logits_NV, labels_N, ignore_index=-100, reduction="none")
    return (loss_N.detach(), *torch.autograd.grad((loss_N * factors_N).sum(), (hidden_ND, weight_VD)))


def in_chunks(hidden_ND, weight_VD, labels_N, factors_N, first=0, gather=lambda x_CK: x_CK, scale=1.0):
    """The same by the functions under test, of one rank's rows."""
    hidden_ND, weight_VD = hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    rows = Rows(weight_VD, first, gather)
    loss_N = token_losses(hidden_ND, rows, labels_N)
    assert not loss_N.requires_grad
    total = weighted_loss(hidden_ND, rows, labels_N, factors_N / scale)
    torch.testing.assert_close(total, (loss_N * factors_N / scale).sum())
    return (loss_N, *torch.autograd.grad(total * scale, (hidden_ND, weight_VD)))


def side_by_side(crossing):
    """How a rank's (C, K) become all ranks' (C, P K)."""
    return lambda x_CK: torch.cat(crossing.gather(x_CK)().unbind(), -1)


def assert_all_close(found, expected, **tolerances):
    for name, one, other in zip(("losses", "grad_hidden", "grad_weight"), found, expected, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}", **tolerances)


@pytest.mark.parametrize("scale", [1.0, 1e-6], ids=["as-it-is", "scaled-later"])
def test_losses_and_gradients_are_those_of_all_logits(chunks, scale):
    drawn = draw()
    assert_all_close(in_chunks(*drawn, scale=scale), whole(*drawn), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1.0, 5.0, 1e4], ids=["plain", "sure", "overflowing-exponentials"])
def test_fp32_is_as_exact_as_all_logits(chunks, size):
    drawn = draw(dtype=torch.float32, scale=size**0.5)
    loss_N, *gradients = in_chunks(*drawn)
    expected_N, *expected = whole(*drawn)
    torch.testing.assert_close(loss_N, expected_N, rtol=1e-6, atol=1e-6 * size)
    for found, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def test_a_small_loss_of_large_logits_keeps_its_digits():
    """The logits 1000 and 990: logsumexp itself would round the loss, log(1 + e^-10), to a multiple of 6e-5."""
    hidden_ND, weight_VD = torch.ones(1, 1), torch.tensor([[1000.0], [990.0]])
    loss_N, _, gradient_VD = in_chunks(hidden_ND, weight_VD, torch.tensor([0]), torch.ones(1))
    exact = torch.tensor(-10.0, dtype=torch.float64).exp()
    assert loss_N.item() == pytest.approx(torch.log1p(exact).item(), rel=2e-3)
    assert gradient_VD[1].item() == pytest.approx((exact / (1 + exact)).item(), rel=1e-5)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_divided_vocabulary_changes_nothing(chunks, ranks, ops):
    """Ranks as threads: each has its rows, and meets the others to gather."""
    hidden_ND, weight_VD, labels_N, factors_N = draw()
    parts = weight_VD.chunk(ranks)

    def run(rank, crossing):
        first = rank * len(parts[rank])
        return in_chunks(hidden_ND, parts[rank], labels_N, factors_N, first, side_by_side(crossing))

    found = ops.on_ranks(ranks, run)
    losses, of_hidden, of_weight = zip(*found, strict=True)
    together = (losses[0], sum(of_hidden), torch.cat(of_weight))
    assert all(torch.equal(loss_N, losses[0]) for loss_N in losses)
    assert_all_close(together, whole(hidden_ND, weight_VD, labels_N, factors_N), rtol=1e-12, atol=1e-12)


def test_16_bit_gradients_are_summed_in_fp32(monkeypatch):
    """Over 512 chunks the weight's gradient is as near to float64 as in one; a bf16 sum would be 20 times as far."""
    drawn = draw(2048, torch.bfloat16)
    exact = whole(*(x.double() if x.is_floating_point() else x for x in drawn))[2]
    errors = {}
    for tokens in (4, 2048):
        monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4)
        monkeypatch.setattr(chunked_loss, "LEAST_TOKENS", tokens)
        loss_N, grad_hidden_ND, grad_weight_VD = in_chunks(*drawn)
        assert (loss_N.dtype, grad_hidden_ND.dtype, grad_weight_VD.dtype) == (torch.float32, *[torch.bfloat16] * 2)
        errors[tokens] = ((grad_weight_VD - exact).norm() / exact.norm()).item()
    assert errors[4] < 1.2 * errors[2048] < 0.02


def test_a_chunk_is_of_constant_size_until_it_has_few_tokens():
    assert chunk_tokens(4096) * 4096 * 4 == 64 * 2**20
    assert chunk_tokens(8192) == chunk_tokens(128 * 1024) == 2048


def test_no_tokens_have_no_losses():
    assert token_losses(torch.empty(0, D), Rows(torch.empty(V, D)), torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_backward_runs_once():
    hidden_ND, weight_VD, labels_N, factors_N = draw()
    total = weighted_loss(hidden_ND.requires_grad_(), Rows(weight_VD), labels_N, factors_N)
    total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="backward runs once"):
        total.backward()
