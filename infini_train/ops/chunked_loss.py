"""Cross-entropy of the output projection, a chunk of tokens at a time: logits of all tokens never exist together.

The factor of each loss in the sum that is minimised is known before the forward pass, so the gradients of a chunk are
formed while its logits are there, and backward has nothing to compute again. Losses with any gradient would need the
logits a second time there: a fourth product beside the three of every linear layer, and all of a chunk's bytes moved
twice.

The vocabulary may be divided over ranks. Then a chunk needs one exchange, of three numbers a token and rank.

Legend: N tokens, C tokens of a chunk, D hidden size, V rows of the vocabulary on this rank, P ranks that divide it.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 * 2**20  # of a chunk's fp32 logits
# ... but never fewer tokens: each chunk reads the whole weight and adds to a sum as large, 12 V D bytes in bf16 beside
# 6 C V D operations. At 300 operations a byte that is 29 % of the products' time with 2048 tokens, 59 % with 1024.
LEAST_TOKENS = 2048


class Rows(NamedTuple):
    """The output projection on this rank: its weight, its first row, and how (C, K) becomes (C, P K), of all ranks."""

    weight_VD: Tensor
    first: int = 0
    gather: Callable[[Tensor], Tensor] = lambda x_CK: x_CK


def chunk_tokens(rows: int) -> int:
    """Tokens whose logits of so many rows exist at a time."""
    return max(LEAST_TOKENS, CHUNK_BYTES // (4 * rows))


@torch.no_grad()
def token_losses(hidden_ND: Tensor, rows: Rows, labels_N: Tensor) -> Tensor:
    """Loss of each token in nats: logsumexp of its logits minus the logit of its label. Without gradient.

    Args:
        hidden_ND: of any floating dtype; the logits are computed in it, and the rest in fp32 or wider.
        rows: of the same dtype.
        labels_N: int64, of the whole vocabulary; negative: no label, and a loss of 0.

    Returns:
        loss_N in fp32 or wider.
    """
    losses = [torch.empty(0, dtype=wide(hidden_ND), device=hidden_ND.device)]
    losses += [_score(hidden_ND[piece], rows, labels_N[piece]).loss_C for piece in pieces(hidden_ND, rows)]
    return torch.cat(losses)


def weighted_loss(hidden_ND: Tensor, rows: Rows, labels_N: Tensor, factors_N: Tensor) -> Tensor:
    """The sum of `factors_N * token_losses(...)`, with gradients for hidden states and weight; backward runs once.

    The gradient of the hidden states is that of this rank's rows: the caller sums it over the ranks.

    Args:
        hidden_ND: as of `token_losses`; at least one token.
        rows: as there.
        labels_N: as there.
        factors_N: of any floating dtype; without gradient.

    Returns:
        A scalar in fp32 or wider.
    """
    factors_N = factors_N.to(wide(hidden_ND)).masked_fill(labels_N < 0, 0.0)
    return _WeightedLoss.apply(hidden_ND, rows.weight_VD, rows, labels_N, factors_N)  # type: ignore[no-untyped-call]


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, rows: Rows, labels_N: Tensor, factors_N: Tensor
    ) -> Tensor:
        losses, grad_hidden_ND, grad_weight_VD = [], torch.empty_like(hidden_ND), None
        is_trained = ctx.needs_input_grad[1]
        for piece in pieces(hidden_ND, rows):
            scored = _score(hidden_ND[piece], rows, labels_N[piece])
            losses.append(scored.loss_C)
            grad_CV = _find_gradient(scored, factors_N[piece], hidden_ND.dtype)
            del scored  # a chunk's logits are gone before the next one's are there
            torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[piece])
            if not is_trained:
                continue
            product_VD = grad_CV.t() @ hidden_ND[piece]
            del grad_CV
            if grad_weight_VD is None:
                grad_weight_VD = product_VD.to(wide(product_VD))  # a 16-bit sum would be rounded with every chunk
            else:
                grad_weight_VD += product_VD
            del product_VD
        assert losses, "no tokens"
        ctx.gradients = grad_hidden_ND, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return (torch.cat(losses) * factors_N).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "backward runs once"
        grad_hidden_ND, grad_weight_VD = ctx.gradients
        ctx.gradients = None  # autograd takes a gradient without a copy if nobody else holds it
        return (
            grad_hidden_ND.mul_(grad),
            None if grad_weight_VD is None else grad_weight_VD.mul_(grad),
            None,
            None,
            None,
        )


class _Scored(NamedTuple):
    """A chunk. `exp_CV` times `share_C` are the probabilities; `row_C1` is the label's where it `is_here_C`, else 0."""

    loss_C: Tensor
    exp_CV: Tensor
    share_C: Tensor
    is_here_C: Tensor
    row_C1: Tensor


def _score(hidden_CD: Tensor, rows: Rows, labels_C: Tensor) -> _Scored:
    logits_CV = hidden_CD @ rows.weight_VD.t()
    precise = wide(logits_CV)
    is_here_C, row_C1 = find_rows(labels_C, rows)
    label_C = logits_CV.gather(1, row_C1)[:, 0].to(precise).masked_fill(~is_here_C, -torch.inf)
    largest_C = logits_CV.amax(-1).to(precise)
    # In place where it is wide already; else widened by the subtraction, not in a pass of its own.
    exp_CV = torch.sub(logits_CV, largest_C[:, None], out=logits_CV if logits_CV.dtype == precise else None).exp_()
    numbers_C3 = torch.stack((largest_C, exp_CV.sum(-1), label_C), -1)
    largest_CP, sum_CP, label_CP = rows.gather(numbers_C3).unflatten(-1, (-1, 3)).unbind(-1)
    most_C, total_C = join_sums(largest_CP, sum_CP)
    loss_C = total_C.log() - (label_CP.amax(-1) - most_C)  # in this order a small loss keeps its digits
    share_C = (largest_C - most_C).exp() / total_C
    return _Scored(loss_C.masked_fill(labels_C < 0, 0.0), exp_CV, share_C, is_here_C, row_C1)


def _find_gradient(scored: _Scored, factors_C: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the losses times the factors by the logits: probability, minus 1 at the label. `exp_CV` may be overwritten."""
    exp_CV = scored.exp_CV
    grad_CV = exp_CV if exp_CV.dtype == dtype else torch.empty_like(exp_CV, dtype=dtype)
    torch.mul(exp_CV, (scored.share_C * factors_C)[:, None], out=grad_CV)  # and narrowed in the same pass
    at_label_C = (torch.expm1(-scored.loss_C) * factors_C).to(dtype)  # not p - 1, where p is narrow already
    elsewhere_C = grad_CV.gather(1, scored.row_C1)[:, 0]
    return grad_CV.scatter_(1, scored.row_C1, at_label_C.where(scored.is_here_C, elsewhere_C)[:, None])


def find_rows(labels_C: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Whether each label's row is on this rank, and which it is there (C, 1); 0 where it is not."""
    row_C = labels_C - rows.first
    is_here_C = (labels_C >= 0) & (row_C >= 0) & (row_C < len(rows.weight_VD))
    return is_here_C, row_C.where(is_here_C, 0)[:, None]


def join_sums(largest_CP: Tensor, sum_CP: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of all ranks, and the sum of all exponentials beside it, of those of each rank."""
    most_C = largest_CP.amax(-1)
    return most_C, (sum_CP * (largest_CP - most_C[:, None]).exp()).sum(-1)


def pieces(hidden_ND: Tensor, rows: Rows) -> Iterator[slice]:
    """The chunks of these tokens."""
    tokens, size = len(hidden_ND), chunk_tokens(len(rows.weight_VD))
    return (slice(first, first + size) for first in range(0, tokens, size))


def wide(x: Tensor) -> torch.dtype:
    """In which losses and sums are computed: fp32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)
