"""Infini-attention as a layer: shared projections, a gate a head, and the compressive memory as its state."""

from typing import Annotated, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infini_train.config.attention import InfiniConfig
from infini_train.config.variant import AttentionVariant
from infini_train.model.layers import Norm, head_linear, sum_gradient_over_tensor_ranks
from infini_train.model.mixer import Figure, LayerSpec, MemoryMaps, SequenceMixer, head_gates, query_gates
from infini_train.model.parameters import Initial, constant, declare, owe_to_field
from infini_train.ops.attention import Additions, InfiniState, infini_attention, write_memory
from infini_train.ops.convolution import convolve
from infini_train.ops.gated_delta import GatedMemory, Writing, empty_gated_memory
from infini_train.ops.grid import Grid, Recent, no_recent
from infini_train.ops.memory import Form, Memory, empty_memory
from infini_train.ops.state import Stored
from infini_train.ops.write_cost import charge


class ConvolvedState(NamedTuple):
    """An `InfiniState`, and the last J layer inputs (normed) that the convolution needs, zeros for other documents."""

    memory: Annotated[Memory | GatedMemory, Stored("memory")]
    recent: Annotated[Recent, Stored("recent")]
    before_BJD: Annotated[Tensor, Stored("before_BJD", "lanes tokens hidden")]


LayerState = InfiniState | ConvolvedState
# Large, so that what is hardly there, such as one old token under an unrelated query, is not blown up to full size: its
# direction hangs on rounding, and so would all that follows.
READ_NORM_EPS = 1e-2
# What fades more slowly does not fade at all. Short texts can't tell such decays from none, a million tokens can: so
# what was learned on short texts holds on long ones.
SLOWEST_DECAY = 1 / 4096
# A write that would keep more than exp(-1/16) of what its key finds, 94 %, is left out. A million tokens of other text
# that each write a little leave nothing of what was there before; tokens that write nothing leave all of it.
WEAKEST_WRITE = 1 / 16


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
        self.form = Form(attention.update, attention.features, attention.read)
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
        self.parts = ("memory", "local", *["convolution"] * (self.conv is not None))
        self.gate_query = query_gates(spec.model, spec.parallel) if attention.gate == "query" else None
        self.maps = MemoryMaps(spec.model, spec.parallel) if attention.maps else None
        self.norm_read: Norm | None = None
        if attention.read_norm:
            self.norm_read = Norm(spec.model.value_dim, READ_NORM_EPS, dtype, divided=True)
            owe_to_field(self.norm_read, "read_norm")

    @classmethod
    def chosen_by(cls, attention: AttentionVariant) -> type[SequenceMixer]:
        """See `SequenceMixer.chosen_by`."""
        return GatedInfiniAttention if attention.chooses_writes else cls

    def initial_state(self, lanes: int, like: Tensor) -> LayerState:
        """An empty memory, and nothing seen yet."""
        shape, value_dim = self.projections.kv_shape(lanes), self.projections.value_dim
        memory = self._empty_memory(shape, value_dim, like)
        recent = no_recent(shape, value_dim, self.layout.overlap_tokens, like, self.layout.sink_tokens)
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
            additions=self._additions(near_TBD),
        )
        return self.projections.join(out_BHTE), _with_convolution(following, before_BJD)

    def prefill(self, hidden_TBD: Tensor, state: LayerState | None, grid: Grid) -> LayerState:
        """See `SequenceMixer.prefill`: keys and values only, no attention. ZeRO-3 gathers for `forward` alone."""
        entered_TBD = self.projections.enter(hidden_TBD)
        near_TBD, before_BJD = self._look_back(entered_TBD, state, grid)
        k_BKTD, v_BKTE = self.projections.keys(near_TBD), self.projections.values(entered_TBD)
        following = write_memory(
            k_BKTD,
            v_BKTE,
            _without_convolution(state),
            grid,
            form=self.form,
            ranks=self.ranks,
            additions=self._additions(near_TBD),
        )
        return _with_convolution(following, before_BJD)

    def _additions(self, near_TBD: Tensor) -> Additions:
        """What is beside the paper's form, for keys and queries that are made of this."""
        return Additions(
            self._choose_writing(near_TBD),
            self.gate_query,
            self.norm_read,
            None if self.maps is None else self.maps(),
            has_memory="memory" not in self.left_out,
            has_local="local" not in self.left_out,
        )

    def _empty_memory(self, kv_shape: tuple[int, int, int], value_dim: int, like: Tensor) -> Memory | GatedMemory:
        return empty_memory(*kv_shape, value_dim, like)

    def _choose_writing(self, x_TBD: Tensor) -> Writing | None:
        """How each token writes a gated memory, from what its key is made of."""
        return None

    def _look_back(self, x_TBD: Tensor, state: LayerState | None, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """What queries and keys are made of, and what the next call needs; the input itself without convolution."""
        if self.conv is None:
            return x_TBD, None
        before_BJD = state.before_BJD if isinstance(state, ConvolvedState) else None
        weight_JD = torch.zeros_like(self.conv) if "convolution" in self.left_out else self.conv
        return convolve(x_TBD, weight_JD, before_BJD, grid, self.ranks)

    def measure(self, state: LayerState) -> tuple[float, ...]:
        """Mean norms of M and z over lanes and heads, and the mean of the tokens written since documents began."""
        memory = state.memory
        return (
            memory.memory_BKDE.float().norm(dim=(-2, -1)).mean().item(),
            memory.normaliser_BKD.float().norm(dim=-1).mean().item(),
            memory.written_B.float().mean().item(),
        )


class GatedInfiniAttention(InfiniAttention):
    """With the gated delta memory (ops/gated_delta.py): what a key is made of also says how its token writes.

    Write strength b = 1 - exp(-max(0, softplus(x) - 1/16)), decay a = exp(-max(0, softplus(-y) - 1/4096)), a number
    each a key-value head: sigmoids, but for what is nearly no write and nearly no decay, which is none.
    """

    figures: ClassVar[tuple[Figure, ...]] = (
        Figure("norm", "norm of M, by layer"),
        Figure("written_tokens", per_layer=False),
    )

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        attention, kv_heads = spec.attention, spec.model.kv_heads
        assert isinstance(attention, InfiniConfig)
        # In training, see `charge_writing`. A tensor, since compiled code would be compiled again for each number.
        self.write_cost: Tensor | None = None
        self.linear_strength = head_linear(spec.model.hidden_size, kv_heads, 1, spec.parallel, bias=True)
        self.linear_decay = head_linear(spec.model.hidden_size, kv_heads, 1, spec.parallel, bias=True)
        for linear, at_first in ((self.linear_strength, 0.0), (self.linear_decay, attention.decay_init)):
            declare(linear.weight, constant(0.0), field="update")
            declare(linear.bias, constant(at_first), field="update")

    def _empty_memory(self, kv_shape: tuple[int, int, int], value_dim: int, like: Tensor) -> GatedMemory:
        return empty_gated_memory(*kv_shape, value_dim, like, self.form.read)

    def _choose_writing(self, x_TBD: Tensor) -> Writing:
        strength_BKT, decay_BKT = (
            linear(x_TBD)[0].permute(1, 2, 0).to(torch.promote_types(x_TBD.dtype, torch.float32))
            for linear in (self.linear_strength, self.linear_decay)
        )
        if self.write_cost is not None:
            strength_BKT = charge(strength_BKT, self.write_cost)
        return Writing(
            -(F.softplus(strength_BKT) - WEAKEST_WRITE).clamp_min(0),
            -(F.softplus(-decay_BKT) - SLOWEST_DECAY).clamp_min(0),
        )

    def measure(self, state: LayerState) -> tuple[float, ...]:
        """Mean norm of M over lanes and heads, and the mean of the tokens written since documents began."""
        memory = state.memory
        return memory.memory_BKDE.float().norm(dim=(-2, -1)).mean().item(), memory.written_B.float().mean().item()


def _without_convolution(state: LayerState | None) -> InfiniState | None:
    return None if state is None else InfiniState(state.memory, state.recent)


def _with_convolution(state: InfiniState, before_BJD: Tensor | None) -> LayerState:
    return state if before_BJD is None else ConvolvedState(*state, before_BJD)
