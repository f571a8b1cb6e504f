"""Attention without a compressive memory.

`local` stays inside segments, `transformer_xl` keeps a cache of the segment before, `full` sees everything so far.
"""

from typing import Any

from torch import Tensor

from infini_train.model.mixer import SequenceMixer
from infini_train.ops.attention import local_attention
from infini_train.ops.grid import Grid, Recent, no_recent


class LocalAttention(SequenceMixer):
    """Causal attention inside the segment. Its state is the open segment (and overlap), so it is bounded."""

    def initial_state(self, lanes: int, like: Tensor) -> Any:
        """Nothing seen yet: the overlap's invisible places."""
        layout, shape = self.layout, self.projections.kv_shape(lanes)
        return no_recent(shape, self.projections.value_dim, layout.overlap_tokens, like, layout.sink_tokens)

    def recent(self, state: Recent) -> Recent:
        """The whole state."""
        return state

    def forward(self, hidden_TBD: Tensor, state: Recent | None, grid: Grid) -> tuple[Tensor, Recent]:
        """See `SequenceMixer.forward`."""
        q_BHTD, k_BKTD, v_BKTE = self.projections.split(hidden_TBD)
        out_BHTE, state = local_attention(q_BHTD, k_BKTD, v_BKTE, state, grid, rope=self.rope, ranks=self.ranks)
        return self.projections.join(out_BHTE), state


class TransformerXLAttention(LocalAttention):
    """Transformer-XL (arXiv 1901.02860, 3.2): the segment before is seen through hidden values without gradient.

    Two things differ from that paper. Relative positions are rotary, as in all variants here, instead of learned. And
    between windows keys and values are kept, not hidden values: those of the cache are a step of the optimizer old.
    """

    def forward(self, hidden_TBD: Tensor, state: Recent | None, grid: Grid) -> tuple[Tensor, Recent]:
        """See `SequenceMixer.forward`."""
        out_BHTE, state = self.attend(hidden_TBD, self.projections.split(hidden_TBD), state, grid)
        return self.projections.join(out_BHTE), state

    def attend(
        self, hidden_TBD: Tensor, projected: tuple[Tensor, Tensor, Tensor], state: Recent | None, grid: Grid
    ) -> tuple[Tensor, Recent]:
        """out_BHTE of queries, keys and values that are `split` from these hidden values, and what to carry."""
        has_cache = grid.segments > 1 and self.layout.overlap_tokens
        cached = self.projections.split_cached(hidden_TBD) if has_cache else None
        return local_attention(*projected, state, grid, rope=self.rope, overlapping=cached)


class FullAttention(LocalAttention):
    """Causal attention over the document so far, one endless segment. Its key-value cache grows with the length."""

    def initial_state(self, lanes: int, like: Tensor) -> None:
        """None: training windows stand alone."""
        return None

    def carry_over(self, state: Recent) -> None:
        """Nothing: training windows stand alone, or the cache would grow without bound."""
        return None
