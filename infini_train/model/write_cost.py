"""Which layers writing costs something in, and what it costs each of their tokens."""

from collections.abc import Iterable

import torch

from infini_train.model.infini import GatedInfiniAttention
from infini_train.model.transformer import Transformer


def charge_writing(models: Iterable[Transformer], cost_per_token: float) -> None:
    """Sets what a token's writes cost in training: this times the mean over layers and heads of softplus(x).

    Args:
        models: this rank's stages.
        cost_per_token: in the units of the gradient that comes back from the loss.
    """
    for model in models:
        layers = sum(attention.chooses_writes for attention in model.config.layers)
        for layer in model.layers.values():
            attention = layer.attention
            if isinstance(attention, GatedInfiniAttention):
                here = attention.projections  # a head that several ranks have is charged on each
                heads = here.kv_heads * here.parallel.tensor_model_parallel_size
                cost = torch.full((), cost_per_token / layers / heads, device=attention.linear_strength.weight.device)
                attention.write_cost = cost if cost_per_token else None
