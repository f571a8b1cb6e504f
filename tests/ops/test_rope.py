"""Rotary embedding at once against the loop of one vector, with plain and with stretched waves."""

import pytest
import torch

from infini_train.ops import reference
from infini_train.ops.rope import Rope, rotate

ROPES = {
    "plain": Rope(),
    "llama 3": Rope(500_000.0),
    "llama 3.1": Rope(500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_tokens=8192),
    "short": Rope(100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=3.0, original_tokens=60),
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("first", [0, 7])
def test_rows_are_turned_as_one_by_one(name, first):
    x_TD = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = rotate(x_TD, first, ROPES[name])
    for lane, t in ((0, 0), (1, 4)):
        expected = reference.rotate(x_TD[lane, t], first + t, ROPES[name])
        torch.testing.assert_close(found[lane, t], expected, rtol=1e-12, atol=1e-12)


def test_only_long_waves_are_stretched():
    rope = ROPES["llama 3.1"]
    plain = Rope(rope.theta).frequencies(64, torch.device("cpu"), torch.float64)
    share = rope.frequencies(64, torch.device("cpu"), torch.float64) / plain
    waves = 2 * torch.pi / plain
    assert torch.equal(share[waves < 2048], torch.ones_like(share[waves < 2048]))
    torch.testing.assert_close(share[waves > 8192], torch.full_like(share[waves > 8192], 1 / 8))
    between = share[(waves >= 2048) & (waves <= 8192)]
    assert len(between) > 2 and (between.diff() < 0).all() and (between > 1 / 8).all() and (between <= 1).all()
