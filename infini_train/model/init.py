"""Initial values as a function of (seed, global parameter name), so that every layout starts equal."""

import hashlib
import math
from collections.abc import Collection

import torch
from torch import Tensor

from infini_train.config.model import ModelConfig
from infini_train.model.parameters import Initial, traits_of
from infini_train.model.slices import find_slice
from infini_train.model.transformer import Transformer


@torch.no_grad()
def initialise(model: Transformer, config: ModelConfig, seed: int, added: Collection[str] | None = None) -> None:
    """Fills all parameters in place as each was declared (`Initial`), or only those `added` to a trained model.

    Args:
        model: the whole, or this rank's part of it.
        config: of the whole model.
        seed: of the random values.
        added: names of the parameters that the trained model lacks; None for a new model.
    """
    for name, parameter in model.named_parameters():
        if added is not None and name not in added:
            continue
        traits = traits_of(parameter)
        assert traits is not None, f"{name}: declare its initial values (model.parameters.declare)"
        initial = traits.initial
        if added is not None and initial.std_if_added is not None:
            initial = initial._replace(std=initial.std_if_added)
        place = find_slice(parameter)
        value = _initial_value(name, place.global_shape, initial, config, seed)
        parameter.copy_(value[tuple(slice(a, a + n) for a, n in zip(place.start, place.shape, strict=True))])


def _initial_value(name: str, shape: tuple[int, ...], initial: Initial, config: ModelConfig, seed: int) -> Tensor:
    std = initial.std
    if initial.follows_config and config.init_std is not None:
        std = config.init_std
    elif std is None:
        assert len(shape) > 1, f"{name}: declare its standard deviation; a fan-in needs two dimensions"
        std = shape[1] ** -0.5
    if std == 0:
        return torch.full(shape, initial.mean)
    if initial.into_residual:
        std /= math.sqrt(2 * config.num_layers)
    value = _draw(name, shape, seed) * std
    return value + initial.mean if initial.mean else value


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)
