"""Rotary position embedding, applied to the local attention only; the memory's queries and keys carry no position.

Legend: ... leading dimensions, T positions, D head size (even).
"""

import torch
from torch import Tensor


def rotate(x_TD: Tensor, first_position: int, theta: float) -> Tensor:
    """Rotates the halves of the last dimension by position (arXiv 2104.09864).

    Args:
        x_TD: (..., T, D), D even; row t stands at position ``first_position + t``.
        first_position: position of the first row.
        theta: base of the frequencies ``theta ** (-2 i / D)``.

    Returns:
        Same shape and dtype. Angles are computed in fp32 (fp64 for fp64 input): 16-bit frequencies lose far positions.
    """
    length, half = x_TD.shape[-2], x_TD.shape[-1] // 2
    precise = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    exponent = torch.arange(half, device=x_TD.device, dtype=precise) / half
    position = torch.arange(first_position, first_position + length, device=x_TD.device, dtype=precise)
    angle_TD = position[:, None] * theta**-exponent
    cos_TD, sin_TD = angle_TD.cos().to(x_TD.dtype), angle_TD.sin().to(x_TD.dtype)
    first, second = x_TD.chunk(2, dim=-1)
    return torch.cat((first * cos_TD - second * sin_TD, second * cos_TD + first * sin_TD), dim=-1)
