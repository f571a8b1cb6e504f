"""Infini-attention as a layer: shared projections, a gate a head, and the compressive memory as its state."""

from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from infini_train.config.attention import InfiniConfig
from infini_train.model.layers import sum_gradient_over_tensor_ranks
from infini_train.model.mixer import Figure, LayerSpec, SequenceMixer, head_gates
from infini_train.model.parameters import Initial, declare
from infini_train.ops.attention import InfiniState, infini_attention, write_memory
from infini_train.ops.convolution import convolve
from infini_train.ops.grid import Grid, Recent, no_recent
from infini_train.ops.memory import Form, Memory, empty_memory
from infini_train.ops.state import Stored


class ConvolvedState(NamedTuple):
    """An `InfiniState`, and the last J layer inputs (normed) that the convolution needs, zeros for other documents."""

    memory: Annotated[Memory, Stored("memory")]
    recent: Annotated[Recent, Stored("recent")]
    before_BJD: Annotated[Tensor, Stored("before_BJD", "lanes tokens hidden")]


LayerState = InfiniState | ConvolvedState


class InfiniAttention(SequenceMixer):
    """Local attention and compressive memory, mixed by sigmoid(gate) (arXiv 2404.07143)."""

    figures: ClassVar[tuple[Figure, ...]] = (
        Figure("norm", "norm of M, by layer"),
        Figure("normaliser", "norm of z, by layer"),
        Figure("written_tokens", per_layer=False),
    )

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        attention, dtype = spec.attention, spec.parallel.params_dtype
        assert isinstance(attention, InfiniConfig)
        self.form = Form(attention.update, attention.features)
        self.gate = head_gates(spec.model, spec.parallel, attention.gate_init)  # the paper's beta
        self.conv: nn.Parameter | None = None
        self.conv_shape = (attention.conv_tokens, spec.model.hidden_size)  # ZeRO-3 empties the parameter
        if attention.conv_tokens:
            self.conv = nn.Parameter(torch.empty(self.conv_shape, dtype=dtype))
            # Zeros change no query or key of a trained model.
            chosen = attention.conv_std
            std, added = (attention.conv_tokens**-0.5, 0.0) if chosen is None else (chosen, chosen)
            initial = Initial(std=std, follows_config=False, std_if_added=added)
            declare(self.conv, initial, field="conv_tokens")
            sum_gradient_over_tensor_ranks(self.conv)  # each rank sees it through its own heads

    def initial_state(self, lanes: int, like: Tensor) -> LayerState:
        """An empty memory, and nothing seen yet."""
        shape, value_dim = self.projections.kv_shape(lanes), self.projections.value_dim
        memory = empty_memory(*shape, value_dim, like)
        recent = no_recent(shape, value_dim, self.layout.overlap_tokens, like)
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

    def prefill(self, hidden_TBD: Tensor, state: LayerState | None, grid: Grid) -> LayerState:
        """See `SequenceMixer.prefill`: keys and values only, no attention. ZeRO-3 gathers for `forward` alone."""
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

    def measure(self, state: LayerState) -> tuple[float, ...]:
        """Mean norms of M and z over lanes and heads, and the mean of the tokens written since documents began."""
        memory = state.memory
        return (
            memory.memory_BKDE.float().norm(dim=(-2, -1)).mean().item(),
            memory.normaliser_BKD.float().norm(dim=-1).mean().item(),
            memory.written_B.float().mean().item(),
        )


def _without_convolution(state: LayerState | None) -> InfiniState | None:
    return None if state is None else InfiniState(state.memory, state.recent)


def _with_convolution(state: InfiniState, before_BJD: Tensor | None) -> LayerState:
    return state if before_BJD is None else ConvolvedState(*state, before_BJD)
