"""Which part of a global tensor lies on this tensor-parallel rank."""

from typing import NamedTuple

from megatron.core import parallel_state
from torch import Tensor


class Slice(NamedTuple):
    """`shape` elements from `start` of a tensor of `global_shape`; `owned`: this rank is the one that writes it."""

    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    owned: bool


def find_slice(parameter: Tensor) -> Slice:
    """The slice of a parameter: divided along one dimension, or whole on every rank (then rank 0 writes it)."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor in the parameter
    dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
    return divide(shape, dim)


def divide(shape: tuple[int, ...], dim: int | None, copies: int = 1) -> Slice:
    """A tensor of this rank's shape that is divided along `dim`, each part held by `copies` neighbouring ranks."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    start, whole = [0] * len(shape), list(shape)
    if dim is None:
        return Slice(shape, tuple(start), shape, rank == 0)
    start[dim] = rank // copies * shape[dim]
    whole[dim] *= ranks // copies
    return Slice(tuple(whole), tuple(start), shape, rank % copies == 0)
