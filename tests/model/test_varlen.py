"""Whole models whose local attention runs by runs, as on CUDA, against themselves with masks."""

import pytest
import torch

from infini_train.model import transformer
from tests.model.test_transformer import loss_and_gradients
from tests.ops.test_varlen import documented_kernel


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1}], ids=["plain", "one-kv-head"])
def test_losses_and_gradients_are_those_under_masks(variant, tools, monkeypatch, options):
    model = tools.build(tools.tiny(variant, **options))
    expected = loss_and_gradients(model, tools)
    monkeypatch.setattr(transformer, "find_kernel", lambda *_: documented_kernel)
    assert model.memory_tokens is not None or model.make_grids(*marks(), None).grids[0].runs is not None
    torch.testing.assert_close(loss_and_gradients(model, tools), expected, rtol=1e-4, atol=1e-5)


def marks():
    return torch.zeros(2, 16, dtype=torch.bool), torch.ones(2, 16)
