"""Infini-attention as a layer: shared projections, a gate a head, and the compressive memory as its state."""

from typing import NamedTuple

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from infini_train.config.attention import InfiniConfig
from infini_train.config.model import ModelConfig
from infini_train.model.layers import sum_gradient_over_tensor_ranks
from infini_train.model.mixer import Projections, SequenceMixer, detach, head_parameter, rope_of
from infini_train.ops.attention import InfiniState, infini_attention, write_memory
from infini_train.ops.convolution import convolve
from infini_train.ops.grid import Grid, Recent, no_recent
from infini_train.ops.memory import Form, Memory, Ranks, empty_memory


class ConvolvedState(NamedTuple):
    """An `InfiniState`, and the last J layer inputs (normed) that the convolution needs, zeros for other documents."""

    memory: Memory
    recent: Recent
    before_BJD: Tensor


LayerState = InfiniState | ConvolvedState


class InfiniAttention(SequenceMixer):
    """Local attention and compressive memory, mixed by sigmoid(gate) (arXiv 2404.07143)."""

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig, ranks: Ranks | None = None) -> None:
        super().__init__()
        assert isinstance(config.attention, InfiniConfig)
        self.segment_tokens: int | None = config.attention.segment_tokens
        self.overlap_tokens = config.attention.overlap_tokens
        self.form = Form(config.attention.update, config.attention.features)
        self.rope = rope_of(config)
        self.ranks = ranks
        self.projections = Projections(config, parallel)
        local_heads = self.projections.linear_q.output_size_per_partition // config.key_dim
        self.gate = head_parameter(local_heads, parallel.params_dtype)  # the paper's beta
        set_tensor_model_parallel_attributes(self.gate, True, 0, 1)
        self.conv: nn.Parameter | None = None
        self.conv_shape = (config.conv_tokens, config.hidden_size)  # ZeRO-3 empties the parameter
        if config.conv_tokens:
            self.conv = nn.Parameter(torch.empty(self.conv_shape, dtype=parallel.params_dtype))
            sum_gradient_over_tensor_ranks(self.conv)  # each rank sees it through its own heads

    def initial_state(self, lanes: int, like: Tensor) -> LayerState:
        """An empty memory, and nothing seen yet."""
        shape, value_dim = self.projections.kv_shape(lanes), self.projections.value_dim
        memory = empty_memory(*shape, value_dim, like)
        recent = no_recent(shape, value_dim, self.overlap_tokens, like)
        if self.conv is None:
            return InfiniState(memory, recent)
        return ConvolvedState(memory, recent, like.new_zeros(lanes, *self.conv_shape))

    def forward(self, hidden_TBD: Tensor, state: LayerState | None, grid: Grid) -> tuple[Tensor, LayerState]:
        """See `SequenceMixer.forward`."""
        entered_TBD = self.projections.enter(hidden_TBD)
        near_TBD, before_BJD = self._look_back(entered_TBD, state, grid)
        out_BHTE, following = infini_attention(
            self.projections.queries(near_TBD),
            self.projections.keys(near_TBD),
            self.projections.values(entered_TBD),
            self.gate,
            _without_convolution(state),
            grid,
            form=self.form,
            rope=self.rope,
            ranks=self.ranks,
        )
        return self.projections.join(out_BHTE), _with_convolution(following, before_BJD)

    def remember(self, hidden_TBD: Tensor, state: LayerState | None, grid: Grid) -> LayerState:
        """See `SequenceMixer.remember`: keys and values only, no attention. ZeRO-3 gathers for `forward` alone."""
        entered_TBD = self.projections.enter(hidden_TBD)
        near_TBD, before_BJD = self._look_back(entered_TBD, state, grid)
        k_BKTD, v_BKTE = self.projections.keys(near_TBD), self.projections.values(entered_TBD)
        following = write_memory(k_BKTD, v_BKTE, _without_convolution(state), grid, form=self.form, ranks=self.ranks)
        return _with_convolution(following, before_BJD)

    def _look_back(self, x_TBD: Tensor, state: LayerState | None, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """What queries and keys are made of, and what the next call needs; the input itself without convolution."""
        if self.conv is None:
            return x_TBD, None
        before_BJD = state.before_BJD if isinstance(state, ConvolvedState) else None
        return convolve(x_TBD, self.conv, before_BJD, grid, self.ranks)

    def between_windows(self, state: LayerState) -> LayerState:
        """The memory, the open segment, the overlap, and the convolution's last tokens."""
        return detach(state)


def _without_convolution(state: LayerState | None) -> InfiniState | None:
    return None if state is None else InfiniState(state.memory, state.recent)


def _with_convolution(state: InfiniState, before_BJD: Tensor | None) -> LayerState:
    return state if before_BJD is None else ConvolvedState(*state, before_BJD)
