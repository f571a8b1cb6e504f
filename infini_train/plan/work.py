"""What a piece of the model computes, moves and exchanges: sums that `tracing.py` counts and `timing.py` prices."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Exchange(NamedTuple):
    """Calls of one kind of collective, and the bytes of their whole buffers together."""

    calls: float
    buffer_bytes: float


@dataclass(frozen=True)
class Work:
    """Operations of one rank.

    Attributes:
        matmul_flops: of matrix products.
        attention_flops: of the attention kernel, by the number of keys that a query sees.
        moved_bytes: read and written by everything else.
        launches: operations started.
        exchanges: by (group of ranks, kind of collective).
    """

    matmul_flops: float = 0.0
    attention_flops: Mapping[int, float] = field(default_factory=dict)
    moved_bytes: float = 0.0
    launches: float = 0.0
    exchanges: Mapping[tuple[str, str], Exchange] = field(default_factory=dict)

    def __add__(self, other: "Work") -> "Work":
        attention, exchanges = dict(self.attention_flops), dict(self.exchanges)
        for keys, flops in other.attention_flops.items():
            attention[keys] = attention.get(keys, 0.0) + flops
        for kind, (calls, buffer_bytes) in other.exchanges.items():
            before = exchanges.get(kind, Exchange(0.0, 0.0))
            exchanges[kind] = Exchange(before.calls + calls, before.buffer_bytes + buffer_bytes)
        return Work(
            self.matmul_flops + other.matmul_flops,
            attention,
            self.moved_bytes + other.moved_bytes,
            self.launches + other.launches,
            exchanges,
        )

    def times(self, factor: float) -> "Work":
        """As often, or a share of it."""
        return Work(
            self.matmul_flops * factor,
            {keys: flops * factor for keys, flops in self.attention_flops.items()},
            self.moved_bytes * factor,
            self.launches * factor,
            {kind: Exchange(factor * calls, factor * size) for kind, (calls, size) in self.exchanges.items()},
        )
