"""A short causal convolution along time, a weight a channel and token before: what came just before, in each token.

An option beside the paper. What a memory (or any attention) finds by its content is one token's; with the tokens just
before in its key, a value is found by the word that it belongs to, and one layer is enough for that. Related are the
convolutions of H3 (arXiv 2212.14052), Based (2402.18668) and DeltaNet (2406.06484); this one is of a layer's input, and
the weight of the token itself is 1.

Legend: B lanes, T tokens of the call, D channels, J tokens before that are taken in (row 0 of the weight: the last).
"""

import torch
from torch import Tensor

from infini_train.ops.grid import Grid
from infini_train.ops.ranks import Ranks


def convolve(
    x_TBD: Tensor, weight_JD: Tensor, before_BJD: Tensor | None, grid: Grid, ranks: Ranks | None = None
) -> tuple[Tensor, Tensor]:
    """Each token and a weighted sum of the J tokens of its document before it.

    Args:
        x_TBD: of this call, or of this rank's shard of it.
        weight_JD: of the token before, of the one before that, and so on; that of the token itself is 1.
        before_BJD: the last J tokens before the call, in their order, zeros for other documents and for none; None is
            the beginning.
        grid: of this call (`make_grid`).
        ranks: how the last tokens of a shard reach the next one; not asked on one rank.

    Returns:
        out_TBD, and before_BJD of the next call, the same on all ranks.
    """
    taps, tokens = weight_JD.shape[0], x_TBD.shape[0]
    rank, size = grid.shard
    earlier_JBD = x_TBD.new_zeros(taps, *x_TBD.shape[1:]) if before_BJD is None else before_BJD.transpose(0, 1)
    if size == 1:
        joined_TBD = torch.cat((earlier_JBD, x_TBD))
        last_JBD = joined_TBD[-taps:]
    else:
        assert ranks is not None and tokens >= taps
        left, last = ranks.from_left(x_TBD[-taps:]), ranks.from_last(x_TBD[-taps:].detach())
        left_JBD = left()  # zeros on rank 0; added to, so that backward meets from_left on this rank too
        joined_TBD = torch.cat((left_JBD + earlier_JBD if rank == 0 else left_JBD, x_TBD))
        last_JBD = last()
    age_TB1 = grid.age_BT.t()[..., None]
    out_TBD = x_TBD
    for back in range(1, taps + 1):
        seen_TBD = joined_TBD[taps - back : taps - back + tokens]
        # The product inside, so that autograd keeps views of one tensor, not a masked copy for each.
        out_TBD = out_TBD + torch.where(age_TB1 >= back, weight_JD[back - 1] * seen_TBD, 0)
    distance_J = torch.arange(taps - 1, -1, -1, device=x_TBD.device)
    is_kept_JB = distance_J[:, None] <= grid.last_age_B
    return out_TBD, torch.where(is_kept_JB[..., None], last_JBD, 0).transpose(0, 1)
