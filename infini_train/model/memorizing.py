"""Memorizing Transformers (arXiv 2203.08913) as a layer: Transformer-XL attention, and retrieval from a store."""

from torch import Tensor

from infini_train.config.attention import MemorizingConfig
from infini_train.model.local import TransformerXLAttention
from infini_train.model.mixer import LayerSpec, head_gates
from infini_train.ops.attention import fold_queries, mix_by_gate, unfold_queries
from infini_train.ops.grid import Grid, Recent, no_recent
from infini_train.ops.knn import MemorizingState, empty_store, retrieve


class MemorizingAttention(TransformerXLAttention):
    """The layer of a memorizing model that stores and retrieves; the others are `TransformerXLAttention`.

    Local attention and retrieval are mixed by sigmoid(gate), as in the paper. Three things differ from it: positions of
    the local attention are rotary; keys and queries are normalised if `model.qk_norm` says so, there always; and what
    one training window stores is seen by its own later segments already.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        attention = spec.attention
        assert isinstance(attention, MemorizingConfig)
        self.stored_tokens, self.top_k = attention.stored_tokens, attention.top_k
        self.gate = head_gates(spec.model, spec.parallel, attention.gate_init)

    def recent(self, state: MemorizingState) -> Recent:
        """The open segment and the cache."""
        return state.recent

    def initial_state(self, lanes: int, like: Tensor) -> MemorizingState:
        """An empty store, and nothing seen yet."""
        shape, value_dim = self.projections.kv_shape(lanes), self.projections.value_dim
        store = empty_store(lanes, shape[1], (shape[2], value_dim), self.stored_tokens, like)
        return MemorizingState(store, no_recent(shape, value_dim, self.layout.overlap_tokens, like))

    def forward(self, hidden_TBD: Tensor, state: MemorizingState | None, grid: Grid) -> tuple[Tensor, MemorizingState]:
        """See `SequenceMixer.forward`."""
        q_BHTD, k_BKTD, v_BKTE = self.projections.split(hidden_TBD)
        state = self.initial_state(q_BHTD.shape[0], q_BHTD) if state is None else state
        local_BHTE, recent = self.attend(hidden_TBD, (q_BHTD, k_BKTD, v_BKTE), state.recent, grid)
        found = retrieve(q_BHTD, k_BKTD, v_BKTE, state, grid, self.top_k)
        mixed_BSHQE = mix_by_gate(
            fold_queries(local_BHTE, grid), found.memory_BSHQE, self.gate[:, None], found.visible_BSQ
        )
        return self.projections.join(unfold_queries(mixed_BSHQE, grid)), MemorizingState(found.store, recent)
