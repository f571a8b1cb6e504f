"""A cost of writing to a gated delta memory, added to the gradient where the write strength is chosen.

Short texts hold too little other text to teach that nothing of it may be written over what matters. The cost says so
directly: every write has to be worth it. As the balancing loss of a mixture of experts is, it is no part of the loss
that is passed from layer to layer and reported: the backward pass adds its derivative, on whatever rank the layer is.
"""

from typing import Any

import torch
from torch import Tensor


def charge(logits: Tensor, cost: Tensor) -> Tensor:
    """The same logits x; the gradient of `cost * softplus(x).sum()` is added to theirs. `cost` is a single number.

    softplus(x) = -log(1 - sigmoid(x)) grows with the write strength, and its slope is the sigmoid: a strong write costs
    what it costs, however strong it gets, and one that is hardly any costs nothing.
    """
    return _Charge.apply(logits, cost)  # type: ignore[no-untyped-call]


class _Charge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, cost: Tensor) -> Tensor:
        ctx.save_for_backward(logits, cost)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, cost = ctx.saved_tensors
        return grad + cost * torch.sigmoid(logits), None
