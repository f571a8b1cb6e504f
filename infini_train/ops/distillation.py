"""Loss against the text and against a teacher's distribution of each next token, a chunk of tokens at a time.

The teacher's logits come of its own hidden states and the same output projection, so neither exists for more than a
chunk. As in chunked_loss.py gradients are formed in the forward pass, the vocabulary may be divided over ranks, and the
same legend holds.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_train.ops.chunked_loss import Rows, find_rows, join_sums, pieces, wide


def taught_loss(
    hidden_ND: Tensor, teacher_ND: Tensor, rows: Rows, labels_N: Tensor, factors_N: Tensor, share: float
) -> Tensor:
    """Sums over tokens times `factors_N`: the objective, cross-entropy, and divergence from the teacher.

    The objective is ``(1 - share)`` of the cross-entropy and ``share`` of KL(teacher || model) (arXiv 1503.02531); it
    alone has gradients, for hidden states and weight, and backward runs once. The teacher has none. The gradient of
    the hidden states is that of this rank's rows: the caller sums it over the ranks.

    Args:
        hidden_ND: as of `chunked_loss.token_losses`; at least one token.
        teacher_ND: the teacher's, of the same shape and dtype.
        rows: of both.
        labels_N: as there; without a label a token counts for nothing, not even beside the teacher.
        factors_N: of any floating dtype; without gradient.
        share: of the teacher, from 0 to 1.

    Returns:
        Three numbers in nats, fp32 or wider.
    """
    factors_N = factors_N.to(wide(hidden_ND)).masked_fill(labels_N < 0, 0.0)
    found: Tensor = _TaughtLoss.apply(hidden_ND, rows.weight_VD, teacher_ND, rows, labels_N, factors_N, share)  # type: ignore[no-untyped-call]
    return found


class _TaughtLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        teacher_ND: Tensor,
        rows: Rows,
        labels_N: Tensor,
        factors_N: Tensor,
        share: float,
    ) -> Tensor:
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide(weight_VD)) if ctx.needs_input_grad[1] else None
        sums_2 = factors_N.new_zeros(2)
        for piece in pieces(hidden_ND, rows):
            mine, taught = (_score(x_ND[piece], rows) for x_ND in (hidden_ND, teacher_ND))
            factors_C = factors_N[piece]
            is_here_C, row_C1 = find_rows(labels_N[piece], rows)
            label_C = mine.log_p_CV.gather(1, row_C1)[:, 0].masked_fill(~is_here_C, 0.0)
            divergence_C = (taught.p_CV * (taught.log_p_CV - mine.log_p_CV)).sum(-1)
            by_rank_C2P = rows.gather(torch.stack((-label_C, divergence_C), -1)).unflatten(-1, (-1, 2)).transpose(1, 2)
            sums_2 += factors_C @ by_rank_C2P.sum(-1)
            at_label_C = is_here_C.to(mine.p_CV.dtype) * (1 - share)
            grad_CV = mine.p_CV.sub_(taught.p_CV, alpha=share).scatter_add_(1, row_C1, -at_label_C[:, None])
            grad_CV = grad_CV.mul_(factors_C[:, None]).to(hidden_ND.dtype)
            torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[piece])
            if grad_weight_VD is not None:
                grad_weight_VD += grad_CV.t() @ hidden_ND[piece]
        ctx.gradients = grad_hidden_ND, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        objective = (1 - share) * sums_2[0] + share * sums_2[1]
        return torch.cat((objective[None], sums_2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_3: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "backward runs once"
        grad_hidden_ND, grad_weight_VD = ctx.gradients
        ctx.gradients = None
        factor = grad_3[0]
        return grad_hidden_ND.mul_(factor), None if grad_weight_VD is None else grad_weight_VD.mul_(factor), *[None] * 5


class _Distribution(NamedTuple):
    """Of the rows on this rank: probabilities of the whole vocabulary's, and their logarithms."""

    p_CV: Tensor
    log_p_CV: Tensor


def _score(hidden_CD: Tensor, rows: Rows) -> _Distribution:
    logits_CV = (hidden_CD @ rows.weight_VD.t()).to(wide(hidden_CD))
    largest_C = logits_CV.amax(-1)
    numbers_C2 = torch.stack((largest_C, (logits_CV - largest_C[:, None]).exp().sum(-1)), -1)
    largest_CP, sum_CP = rows.gather(numbers_C2).unflatten(-1, (-1, 2)).unbind(-1)
    most_C, total_C = join_sums(largest_CP, sum_CP)
    log_p_CV = logits_CV.sub_((most_C + total_C.log())[:, None])
    return _Distribution(log_p_CV.exp(), log_p_CV)
