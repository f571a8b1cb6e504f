"""Attention without a compressive memory.

`local` stays inside segments, `transformer_xl` keeps a cache of the segment before, `full` sees everything so far.
"""

from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor

from infini_train.config.attention import LocalConfig, MemorizingConfig, RmtConfig, TransformerXLConfig
from infini_train.config.model import ModelConfig
from infini_train.model.mixer import Projections, SequenceMixer, detach, rope_of
from infini_train.ops.attention import local_attention
from infini_train.ops.grid import Grid, Recent, no_recent
from infini_train.ops.memory import Ranks


class LocalAttention(SequenceMixer):
    """Causal attention inside the segment. Its state is the open segment (and overlap), so it is bounded."""

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig, ranks: Ranks | None = None) -> None:
        super().__init__()
        assert isinstance(config.attention, LocalConfig | RmtConfig)
        self.ranks = ranks
        self.segment_tokens: int | None = config.attention.segment_tokens
        self.overlap_tokens = getattr(config.attention, "overlap_tokens", 0)
        self.rope = rope_of(config)
        self.projections = Projections(config, parallel)

    def initial_state(self, lanes: int, like: Tensor) -> Recent | None:
        """Nothing seen yet: the overlap's invisible places."""
        return no_recent(self.projections.kv_shape(lanes), self.projections.value_dim, self.overlap_tokens, like)

    def forward(self, hidden_TBD: Tensor, state: Recent | None, grid: Grid) -> tuple[Tensor, Recent]:
        """See `SequenceMixer.forward`."""
        q_BHTD, k_BKTD, v_BKTE = self.projections.split(hidden_TBD)
        out_BHTE, state = local_attention(q_BHTD, k_BKTD, v_BKTE, state, grid, rope=self.rope, ranks=self.ranks)
        return self.projections.join(out_BHTE), state

    def between_windows(self, state: Recent) -> Recent | None:
        """The open segment and the overlap."""
        return detach(state)


class TransformerXLAttention(SequenceMixer):
    """Transformer-XL (arXiv 1901.02860, 3.2): the segment before is seen through hidden values without gradient.

    Two things differ from that paper. Relative positions are rotary, as in all variants here, instead of learned. And
    between windows keys and values are kept, not hidden values: those of the cache are a step of the optimizer old.
    """

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig, ranks: Ranks | None = None) -> None:
        super().__init__()
        assert isinstance(config.attention, TransformerXLConfig | MemorizingConfig)
        assert ranks is None, "the cache would have to cross ranks in each layer, and its hidden values with it"
        self.segment_tokens: int | None = config.attention.segment_tokens
        self.overlap_tokens = config.attention.cache_tokens
        self.rope = rope_of(config)
        self.projections = Projections(config, parallel)

    initial_state = LocalAttention.initial_state
    between_windows = LocalAttention.between_windows

    def forward(self, hidden_TBD: Tensor, state: Recent | None, grid: Grid) -> tuple[Tensor, Recent]:
        """See `SequenceMixer.forward`."""
        out_BHTE, state = self.attend(hidden_TBD, self.projections.split(hidden_TBD), state, grid)
        return self.projections.join(out_BHTE), state

    def attend(
        self, hidden_TBD: Tensor, projected: tuple[Tensor, Tensor, Tensor], state: Recent | None, grid: Grid
    ) -> tuple[Tensor, Recent]:
        """out_BHTE of queries, keys and values that are `split` from these hidden values, and what to carry."""
        cached = self.projections.split_cached(hidden_TBD) if grid.segments > 1 and self.overlap_tokens else None
        return local_attention(*projected, state, grid, rope=self.rope, overlapping=cached)


class FullAttention(SequenceMixer):
    """Causal attention over the document so far. Its state, the whole key-value cache, grows with the length."""

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig, ranks: Ranks | None = None) -> None:
        super().__init__()
        assert ranks is None, "keys and values of the whole window would have to cross ranks"
        self.ranks = ranks
        self.segment_tokens: int | None = None
        self.overlap_tokens = 0
        self.rope = rope_of(config)
        self.projections = Projections(config, parallel)

    forward = LocalAttention.forward

    def initial_state(self, lanes: int, like: Tensor) -> Recent | None:
        """None: windows stand alone."""
        return None

    def between_windows(self, state: Recent) -> Recent | None:
        """Nothing: windows stand alone, or the cache would grow without bound."""
        return None
