"""Tiny models of all variants."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from infini_train.config.model import ModelConfig
from infini_train.model.init import initialise
from infini_train.model.transformer import ModelState, Transformer


def build(config: ModelConfig, seed: int = 0, **options: bool) -> Transformer:
    """A model with embeddings and logits of size 1 or so, so that every part of it matters."""
    model = Transformer(config, **options)
    initialise(model, config, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ("embedding.weight", "head.weight"):
                parameter.mul_(20)
    return model


def run(
    model: Transformer, tokens_BT: Tensor, starts_BT: Tensor | None = None, state: ModelState | None = None
) -> tuple[Tensor, ModelState]:
    """logits_BTV and the whole state after a call (not what travels between training windows)."""
    starts_BT = torch.zeros(tokens_BT.shape, dtype=torch.bool) if starts_BT is None else starts_BT
    grid = model.make_grids(starts_BT, torch.ones(tokens_BT.shape), state)
    hidden_TBD, state = model.decode(tokens_BT, grid, state)
    return model.logits(hidden_TBD).transpose(0, 1), state


def draw(tokens: int, lanes: int = 2, seed: int = 0, vocab: int = 40) -> Tensor:
    return torch.randint(0, vocab, (lanes, tokens), generator=torch.Generator().manual_seed(seed))


class Tools(NamedTuple):
    """What tests of several files call."""

    tiny: Callable[..., ModelConfig]
    build: Callable[..., Transformer] = build
    run: Callable[..., tuple[Tensor, ModelState]] = run
    draw: Callable[..., Tensor] = draw


@pytest.fixture(scope="session")
def tools(tiny: Callable[..., ModelConfig], process_groups: None) -> Tools:
    return Tools(tiny)
