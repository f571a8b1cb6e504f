"""The interface of all attention variants, and the projections that they share.

A variant's state is a value: `forward` takes it and returns the next one; no tensor state hides on a module. States are
(nested) NamedTuples of tensors, which autograd checkpointing and ZeRO's hooks can see into.

Legend: T tokens, B lanes, D hidden size, H query heads, K key-value heads (of this tensor-parallel rank).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from infini_train.config.model import ModelConfig
from infini_train.config.variant import AttentionVariant
from infini_train.model.layers import (
    Norm,
    column_linear,
    enter_parallel,
    head_linear,
    own_head,
    row_linear,
    sum_gradient_over_tensor_ranks,
)
from infini_train.model.parameters import constant, declare
from infini_train.ops.attention import Maps, local_attention
from infini_train.ops.grid import Grid, Layout, Recent
from infini_train.ops.ranks import Ranks
from infini_train.ops.rope import Rope

State = Any  # a NamedTuple that declares its fields (ops.state); each variant has its own
Layers = Callable[[Tensor, Grid, Any], tuple[Tensor, tuple[Any, ...]]]  # (hidden_TBD, grid, states) -> the same after


def detach(state: State) -> State:
    """The same values cut from the graph: gradients end at the window's edge."""
    return pytree.tree_map_only(Tensor, Tensor.detach, state)


class StackMemory(nn.Module, ABC):
    """A module around all layers, for a memory that the whole stack writes. It needs a grid that all layers share."""

    @abstractmethod
    def forward(
        self, layers: Layers, norm: nn.Module, hidden_TBD: Tensor, grid: Grid, state: tuple[State, ...] | None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Runs a call through the layers.

        Args:
            layers: the stack.
            norm: its final norm.
            hidden_TBD: embedded tokens.
            grid: of the call.
            state: of all layers; None before the first token.
        """


def rope_of(config: ModelConfig) -> Rope:
    """The rotary frequencies of a model."""
    scaling = config.rope_scaling
    return Rope(config.rope_theta) if scaling is None else Rope(config.rope_theta, **asdict(scaling))


class Figure(NamedTuple):
    """A number measured in a layer's state during training, shown as memory/NAME/layer N.

    title: of its chart in TensorBoard, with a line for each layer; None for no chart. per_layer: False where one layer
    says it all; the last that has it is shown, as memory/NAME.
    """

    name: str
    title: str | None = None
    per_layer: bool = True


class LayerSpec(NamedTuple):
    """All that the attention of a layer is built from.

    `attention` is the variant of this layer (the first is 0), `parallel` megatron-core's layer settings, `ranks` how a
    state crosses the ranks that hold one window (None on one rank).
    """

    model: ModelConfig
    attention: AttentionVariant
    parallel: ModelParallelConfig
    ranks: Ranks | None = None
    layer: int = 0


class SequenceMixer(nn.Module, ABC):
    """Attention along time in one layer: what a decoder layer asks of its variant."""

    figures: ClassVar[tuple[Figure, ...]] = ()  # of a state, watched in training; `measure` gives their values
    parts: tuple[str, ...] = ()  # what may be left out, to see what it is worth
    left_out: frozenset[str] = frozenset()  # of `parts`; set by `model.ablation`

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        assert spec.ranks is None or spec.attention.crosses_ranks, (
            f"{type(self).__name__}: a window must lie on one rank"
        )
        attention = spec.attention
        self.layout = Layout(attention.segment_tokens, attention.seen_tokens, attention.sink_tokens)
        self.ranks = spec.ranks
        self.rope = rope_of(spec.model)
        self.projections = Projections(spec.model, spec.parallel)

    @abstractmethod
    def initial_state(self, lanes: int, like: Tensor) -> State | None:
        """The state before the first token, in the shapes that `carry_over` keeps; None if nothing is carried.

        `like` gives the device, and the dtype of activations.
        """

    @abstractmethod
    def forward(self, hidden_TBD: Tensor, state: State | None, grid: Grid) -> tuple[Tensor, State]:
        """Mixes along time; pure in the state. None is the state before the first token."""

    def prefill(self, hidden_TBD: Tensor, state: State | None, grid: Grid) -> State:
        """The state that `forward` leaves, for whoever needs no output, such as a prompt's last layer."""
        return self(hidden_TBD, state, grid)[1]

    def attend_fully(self, hidden_TBD: Tensor, grid: Grid) -> Tensor:
        """What full causal attention with this layer's projections gives; `grid` is of one endless segment."""
        q_BHTD, k_BKTD, v_BKTE = self.projections.split(hidden_TBD)
        out_BHTE, _ = local_attention(q_BHTD, k_BKTD, v_BKTE, None, grid, rope=self.rope, ranks=self.ranks)
        return self.projections.join(out_BHTE)

    def carry_over(self, state: State) -> State | None:
        """What is carried from one training window to the next, detached and of bounded size."""
        return detach(state)

    def recent(self, state: State) -> Recent | None:
        """The tokens of the open segment and the overlap in a state; None for a variant that keeps none."""
        return getattr(state, "recent", None)

    def measure(self, state: State) -> tuple[float, ...]:
        """The values of `figures` for a state of this rank's lanes and heads; the mean over ranks is shown."""
        return ()

    @classmethod
    def chosen_by(cls, attention: AttentionVariant) -> "type[SequenceMixer]":
        """The class that is built, for a variant whose fields choose among several."""
        return cls

    @classmethod
    def around_stack(cls, config: ModelConfig, parallel: ModelParallelConfig) -> StackMemory | None:
        """A module that runs all layers segment by segment, for a variant that needs their output in between."""
        return None


class Projections(nn.Module):
    """Queries, keys and values of a layer, and its output projection. Optional biases and per-head norms (QK-norm)."""

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig) -> None:
        super().__init__()
        key_dim, value_dim, bias = config.key_dim, config.value_dim, config.qkv_bias
        self.parallel = parallel
        self.key_dim, self.value_dim = key_dim, value_dim
        ranks = parallel.tensor_model_parallel_size
        self.kv_heads = max(1, config.kv_heads // ranks)  # of this rank
        self.linear_q = column_linear(config.hidden_size, config.num_heads * key_dim, parallel, bias=bias)
        self.linear_k = head_linear(config.hidden_size, config.kv_heads, key_dim, parallel, bias=bias)
        self.linear_v = head_linear(config.hidden_size, config.kv_heads, value_dim, parallel, bias=bias)
        self.linear_o = row_linear(config.num_heads * value_dim, config.hidden_size, parallel)

        def head_norm() -> nn.Module:
            if not config.qk_norm:
                return nn.Identity()
            return Norm(key_dim, config.norm_eps, parallel.params_dtype, divided=True)

        self.norm_q, self.norm_k = head_norm(), head_norm()

    def split(self, hidden_TBD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q_BHTD, k_BKTD, v_BKTE of this rank's heads and, under sequence parallelism too, of all tokens."""
        hidden_TBD = self.enter(hidden_TBD)
        return self.queries(hidden_TBD), self.keys(hidden_TBD), self.values(hidden_TBD)

    def split_cached(self, hidden_TBD: Tensor) -> tuple[Tensor, Tensor]:
        """k_BKTD and v_BKTE as in `split`, from hidden values without gradient; these weights get theirs."""
        hidden_TBD = self.enter(hidden_TBD.detach())
        return self.keys(hidden_TBD), self.values(hidden_TBD)

    def enter(self, hidden_TBD: Tensor) -> Tensor:
        """What `queries`, `keys` and `values` take: all tokens, on each tensor-parallel rank."""
        return enter_parallel(hidden_TBD, self.parallel)

    def queries(self, x_TBD: Tensor) -> Tensor:
        """q_BHTD."""
        return self.norm_q(self._heads(self.linear_q(x_TBD)[0], self.key_dim))

    def keys(self, x_TBD: Tensor) -> Tensor:
        """k_BKTD."""
        return self.norm_k(self._heads(self.linear_k(x_TBD)[0], self.key_dim))

    def values(self, x_TBD: Tensor) -> Tensor:
        """v_BKTE."""
        return self._heads(self.linear_v(x_TBD)[0], self.value_dim)

    @staticmethod
    def _heads(projected: Tensor, size: int) -> Tensor:
        return projected.unflatten(-1, (-1, size)).permute(1, 2, 0, 3)

    def kv_shape(self, lanes: int) -> tuple[int, int, int]:
        """(lanes, K, D) of this rank's keys."""
        return lanes, self.kv_heads, self.key_dim

    def join(self, out_BHTE: Tensor) -> Tensor:
        """Heads back to hidden_TBD."""
        return self.linear_o(out_BHTE.permute(2, 0, 1, 3).flatten(2).contiguous())[0]


def head_gates(config: ModelConfig, parallel: ModelParallelConfig, initial: float) -> nn.Parameter:
    """A gate per query head, before its sigmoid; divided over the tensor-parallel ranks like the heads."""
    local_heads = config.num_heads // parallel.tensor_model_parallel_size
    gates = nn.Parameter(torch.empty(local_heads, dtype=parallel.params_dtype))
    set_tensor_model_parallel_attributes(gates, True, 0, 1)
    declare(gates, constant(initial), is_gate=True, field="kind")
    return gates


class MemoryMaps(nn.Module):
    """The memory's maps of queries, keys and what is read, less the identity (`ops.attention.Maps`); zeros at first.

    Divided like the heads; where there are fewer key-value heads than tensor-parallel ranks each rank holds all of
    their maps, and uses its own.
    """

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig) -> None:
        super().__init__()
        ranks = parallel.tensor_model_parallel_size
        is_divided = config.kv_heads % ranks == 0
        kv_heads = config.kv_heads // ranks if is_divided else config.kv_heads
        first = 0 if is_divided else own_head(config.kv_heads, parallel)
        self.rows = slice(first, first + max(1, config.kv_heads // ranks))

        def matrices(heads: int, size: int) -> nn.Parameter:
            made = nn.Parameter(torch.empty(heads, size, size, dtype=parallel.params_dtype))
            declare(made, constant(0.0), field="maps")
            return made

        self.query = matrices(config.num_heads // ranks, config.key_dim)
        self.key = matrices(kv_heads, config.key_dim)
        self.read = matrices(config.num_heads // ranks, config.value_dim)
        for parameter in (self.query, self.read, *([self.key] if is_divided else [])):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        if not is_divided:
            sum_gradient_over_tensor_ranks(self.key)

    def forward(self) -> Maps:
        """This rank's."""
        return Maps(self.query, self.key[self.rows], self.read)


def query_gates(config: ModelConfig, parallel: ModelParallelConfig) -> nn.Parameter:
    """What a query adds to its head's gate, a vector a head; zeros at first. Divided like the heads."""
    local_heads = config.num_heads // parallel.tensor_model_parallel_size
    gates = nn.Parameter(torch.empty(local_heads, config.key_dim, dtype=parallel.params_dtype))
    set_tensor_model_parallel_attributes(gates, True, 0, 1)
    declare(gates, constant(0.0), field="gate")
    return gates
