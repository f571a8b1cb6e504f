"""Tiny models of all variants."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from infini_train.config import FullConfig, InfiniConfig, LocalConfig, ModelConfig
from infini_train.model.init import initialise
from infini_train.model.transformer import ModelState, Transformer
from infini_train.parallel import device, mesh

torch.set_num_threads(1)

SEGMENT = 8
VARIANTS = {
    "linear": InfiniConfig(segment_tokens=SEGMENT),
    "delta": InfiniConfig(segment_tokens=SEGMENT, update="delta"),
    "linear-overlap": InfiniConfig(segment_tokens=SEGMENT, overlap_tokens=3),
    "delta-overlap": InfiniConfig(segment_tokens=SEGMENT, update="delta", overlap_tokens=8),
    "local": LocalConfig(segment_tokens=SEGMENT),
    "local-overlap": LocalConfig(segment_tokens=SEGMENT, overlap_tokens=3),
    "full": FullConfig(),
}


def tiny(variant: str = "linear", **changes: object) -> ModelConfig:
    """Config of a tiny model; `changes` are fields of ModelConfig."""
    shape = {"vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 48}
    return ModelConfig(**{**shape, "attention": VARIANTS[variant], **changes})


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
    grid = model.make_grid(starts_BT, torch.ones(tokens_BT.shape), state)
    hidden_TBD, state = model.decode(tokens_BT, grid, state)
    return model.logits(hidden_TBD).transpose(0, 1), state


def draw(tokens: int, lanes: int = 2, seed: int = 0, vocab: int = 40) -> Tensor:
    return torch.randint(0, vocab, (lanes, tokens), generator=torch.Generator().manual_seed(seed))


class Tools(NamedTuple):
    """What tests of several files call."""

    tiny: Callable[..., ModelConfig] = tiny
    build: Callable[..., Transformer] = build
    run: Callable[..., tuple[Tensor, ModelState]] = run
    draw: Callable[..., Tensor] = draw
    segment: int = SEGMENT


@pytest.fixture(scope="session")
def tools() -> Tools:
    device.prepare()
    mesh.start()
    return Tools()


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param
