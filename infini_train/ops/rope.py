"""Rotary position embedding, applied to the local attention only; the memory's queries and keys carry no position.

Legend: ... leading dimensions, T positions, D head size (even).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Rope(NamedTuple):
    """Frequencies of the embedding: ``theta ** (-2 i / D)``, of long waves less, as Llama 3.1 has it.

    A wave that is longer than ``original_tokens / low_freq_factor`` becomes longer by `factor`; one shorter than
    ``original_tokens / high_freq_factor`` stays, and between the two frequencies are mixed.
    """

    theta: float = 10_000.0
    factor: float = 1.0  # 1: all waves stay
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_tokens: int = 8192  # the context before waves were stretched

    def frequencies(self, half: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Radians a position of each of the D / 2 pairs."""
        plain = self.theta ** -(torch.arange(half, device=device, dtype=dtype) / half)
        if self.factor == 1.0:
            return plain
        waves = self.original_tokens * plain / (2 * math.pi)  # that fit into the original context
        kept = (waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(plain / self.factor, plain, kept.clamp(0, 1))


def rotate(x_TD: Tensor, first_position: int, rope: Rope) -> Tensor:
    """Rotates the halves of the last dimension by position (arXiv 2104.09864).

    Args:
        x_TD: (..., T, D), D even; row t stands at position ``first_position + t``.
        first_position: position of the first row.
        rope: the frequencies.

    Returns:
        Same shape and dtype. Angles are computed in fp32 (fp64 for fp64 input): 16-bit frequencies lose far positions.
    """
    length, half = x_TD.shape[-2], x_TD.shape[-1] // 2
    precise = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    position = torch.arange(first_position, first_position + length, device=x_TD.device, dtype=precise)
    angle_TD = position[:, None] * rope.frequencies(half, x_TD.device, precise)
    cos_TD, sin_TD = angle_TD.cos().to(x_TD.dtype), angle_TD.sin().to(x_TD.dtype)
    first, second = x_TD.chunk(2, dim=-1)
    return torch.cat((first * cos_TD - second * sin_TD, second * cos_TD + first * sin_TD), dim=-1)
