"""Initial values as a function of (seed, global parameter name), so that every layout starts equal."""

import hashlib
import math

import torch
from megatron.core import parallel_state
from torch import Tensor

from infini_train.config import InfiniConfig, ModelConfig
from infini_train.model.transformer import Transformer

EMBEDDING_STD = 0.02


@torch.no_grad()
def initialise(model: Transformer, config: ModelConfig, seed: int) -> None:
    """Fills all parameters in place.

    Matrices are normal with std 1/sqrt(fan in) (or ``config.init_std``), those that write into the residual stream
    smaller by 1/sqrt(2 layers); embedding and head normal with std 0.02; norms 1, biases 0, gates ``gate_init``.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(_local_slice(_initial_value(name, _global_shape(parameter), config, seed), parameter))


def _initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    owner, kind = name.split(".")[-2:]
    if kind == "gate":
        assert isinstance(config.attention, InfiniConfig)
        return torch.full(shape, config.attention.gate_init)
    if kind == "bias":
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = config.init_std
    if owner in ("embedding", "head"):
        std = EMBEDDING_STD if std is None else std
    else:
        std = shape[1] ** -0.5 if std is None else std
    if owner in ("linear_o", "linear_down"):
        std /= math.sqrt(2 * config.num_layers)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * std


def _global_shape(parameter: Tensor) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= parallel_state.get_tensor_model_parallel_world_size()
    return tuple(shape)


def _local_slice(value: Tensor, parameter: Tensor) -> Tensor:
    if not getattr(parameter, "tensor_model_parallel", False):
        return value
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    return value.chunk(ranks, parameter.partition_dim)[parallel_state.get_tensor_model_parallel_rank()]
