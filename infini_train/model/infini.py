"""Infini-attention as a layer: shared projections, a gate a head, and the compressive memory as its state."""

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from infini_train.config.attention import InfiniConfig
from infini_train.config.model import ModelConfig
from infini_train.model.mixer import Projections, SequenceMixer, detach, head_parameter, rope_of
from infini_train.ops.attention import InfiniState, infini_attention, write_memory
from infini_train.ops.grid import Grid, no_recent
from infini_train.ops.memory import Form, Ranks, empty_memory


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

    def initial_state(self, lanes: int, like: Tensor) -> InfiniState:
        """An empty memory, and nothing seen yet."""
        shape, value_dim = self.projections.kv_shape(lanes), self.projections.value_dim
        return InfiniState(
            empty_memory(*shape, value_dim, like), no_recent(shape, value_dim, self.overlap_tokens, like)
        )

    def forward(self, hidden_TBD: Tensor, state: InfiniState | None, grid: Grid) -> tuple[Tensor, InfiniState]:
        """See `SequenceMixer.forward`."""
        q_BHTD, k_BKTD, v_BKTE = self.projections.split(hidden_TBD)
        out_BHTE, state = infini_attention(
            q_BHTD,
            k_BKTD,
            v_BKTE,
            self.gate,
            state,
            grid,
            form=self.form,
            rope=self.rope,
            ranks=self.ranks,
        )
        return self.projections.join(out_BHTE), state

    def remember(self, hidden_TBD: Tensor, state: InfiniState | None, grid: Grid) -> InfiniState:
        """See `SequenceMixer.remember`: keys and values only, no attention."""
        k_BKTD, v_BKTE = self.projections.split_keys(hidden_TBD)
        return write_memory(k_BKTD, v_BKTE, state, grid, form=self.form, ranks=self.ranks)

    def between_windows(self, state: InfiniState) -> InfiniState:
        """The memory, the open segment and the overlap."""
        return detach(state)
