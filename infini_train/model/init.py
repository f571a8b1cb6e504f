"""Initial values as a function of (seed, global parameter name), so that every layout starts equal."""

import hashlib
import math
from collections.abc import Collection

import torch
from torch import Tensor

from infini_train.config.attention import InfiniConfig, MemorizingConfig
from infini_train.config.model import ModelConfig
from infini_train.model.slices import find_slice
from infini_train.model.transformer import Transformer

EMBEDDING_STD = 0.02


@torch.no_grad()
def initialise(model: Transformer, config: ModelConfig, seed: int, only: Collection[str] | None = None) -> None:
    """Fills all parameters in place, or `only` those of these names.

    Matrices are normal with std 1/sqrt(fan in) (or ``config.init_std``), those that write into the residual stream
    smaller by 1/sqrt(2 layers); embedding, memory tokens and head normal with std 0.02; norms 1, biases
    0, gates ``gate_init``, convolutions ``conv_std``.
    """
    for name, parameter in model.named_parameters():
        if only is not None and name not in only:
            continue
        place = find_slice(parameter)
        value = _initial_value(name, place.global_shape, config, seed)
        parameter.copy_(value[tuple(slice(a, a + n) for a, n in zip(place.start, place.shape, strict=True))])


def _initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    owner, kind = name.split(".")[-2:]
    if kind == "gate":
        assert isinstance(config.attention, InfiniConfig | MemorizingConfig)
        return torch.full(shape, config.attention.gate_init)
    if kind == "conv":
        assert isinstance(config.attention, InfiniConfig)
        std = shape[0] ** -0.5 if config.attention.conv_std is None else config.attention.conv_std
        return _draw(name, shape, seed) * std
    if kind == "bias":
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = config.init_std
    if owner in ("embedding", "head", "memory_tokens"):
        std = EMBEDDING_STD if std is None else std
    else:
        std = shape[1] ** -0.5 if std is None else std
    if owner in ("linear_o", "linear_down"):
        std /= math.sqrt(2 * config.num_layers)
    return _draw(name, shape, seed) * std


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)
