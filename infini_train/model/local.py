"""Attention without a compressive memory: inside segments (`local`), or over everything so far (`full`)."""

from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor

from infini_train.config import LocalConfig, ModelConfig
from infini_train.model.mixer import Projections, SequenceMixer, detach
from infini_train.ops.attention import local_attention
from infini_train.ops.grid import Grid, Recent, no_recent
from infini_train.ops.memory import Ranks


class LocalAttention(SequenceMixer):
    """Causal attention inside the segment. Its state is the open segment (and overlap), so it is bounded."""

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig, ranks: Ranks | None = None) -> None:
        super().__init__()
        assert isinstance(config.attention, LocalConfig)
        self.ranks = ranks
        self.segment_tokens: int | None = config.attention.segment_tokens
        self.overlap_tokens = config.attention.overlap_tokens
        self.rope_theta = config.rope_theta
        self.projections = Projections(config, parallel)

    def initial_state(self, lanes: int, like: Tensor) -> Recent | None:
        """Nothing seen yet: the overlap's invisible places."""
        return no_recent(self.projections.kv_shape(lanes), self.projections.value_dim, self.overlap_tokens, like)

    def forward(self, hidden_TBD: Tensor, state: Recent | None, grid: Grid) -> tuple[Tensor, Recent]:
        """See `SequenceMixer.forward`."""
        q_BHTD, k_BKTD, v_BKTE = self.projections.split(hidden_TBD)
        out_BHTE, state = local_attention(
            q_BHTD, k_BKTD, v_BKTE, state, grid, rope_theta=self.rope_theta, ranks=self.ranks
        )
        return self.projections.join(out_BHTE), state

    def between_windows(self, state: Recent) -> Recent | None:
        """The open segment and the overlap."""
        return detach(state)


class FullAttention(SequenceMixer):
    """Causal attention over the document so far. Its state, the whole key-value cache, grows with the length."""

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig, ranks: Ranks | None = None) -> None:
        super().__init__()
        assert ranks is None, "keys and values of the whole window would have to cross ranks"
        self.ranks = ranks
        self.segment_tokens: int | None = None
        self.overlap_tokens = 0
        self.rope_theta = config.rope_theta
        self.projections = Projections(config, parallel)

    forward = LocalAttention.forward

    def initial_state(self, lanes: int, like: Tensor) -> Recent | None:
        """None: windows stand alone."""
        return None

    def between_windows(self, state: Recent) -> Recent | None:
        """Nothing: windows stand alone, or the cache would grow without bound."""
        return None
