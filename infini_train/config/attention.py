"""`model.attention`: the variants of attention, each with its own fields."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pydantic
from pydantic import FiniteFloat

from infini_train.config.errors import require


@dataclass(frozen=True, kw_only=True)
class InfiniConfig:
    """Segment-local attention plus a compressive memory (arXiv 2404.07143)."""

    kind: Literal["infini"] = "infini"  # chooses this attention
    segment_tokens: int = 256  # inside a segment attention is exact; what is older is read from the memory
    update: Literal["linear", "delta"] = "linear"  # how a segment is written: the paper's Eq. 8 or Eq. 9
    gate_init: FiniteFloat = 0.0  # beta at the start; sigmoid(beta) is the share of the memory
    overlap_tokens: int = 0  # local attention also sees the previous segment's last tokens (0: the paper's form)

    def __post_init__(self) -> None:
        require(self.segment_tokens > 0, "model.attention.segment_tokens", "must be positive")
        require(
            0 <= self.overlap_tokens <= self.segment_tokens,
            "model.attention.overlap_tokens",
            f"must lie between 0 and segment_tokens ({self.segment_tokens})",
        )


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """Causal attention inside the segment only: Infini-attention without its memory."""

    kind: Literal["local"] = "local"  # chooses this attention
    segment_tokens: int = 256  # a token sees its own segment only
    overlap_tokens: int = 0  # and this many last tokens of the previous segment

    def __post_init__(self) -> None:
        require(self.segment_tokens > 0, "model.attention.segment_tokens", "must be positive")
        require(
            0 <= self.overlap_tokens <= self.segment_tokens,
            "model.attention.overlap_tokens",
            f"must lie between 0 and segment_tokens ({self.segment_tokens})",
        )


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig:
    """A baseline: attention inside the segment and to a cache of tokens before it, without gradient into the cache."""

    kind: Literal["transformer_xl"] = "transformer_xl"  # chooses this attention
    segment_tokens: int = 256  # a token sees its own segment
    cache_tokens: int = 256  # and this many last tokens of the previous segment

    def __post_init__(self) -> None:
        require(self.segment_tokens > 0, "model.attention.segment_tokens", "must be positive")
        require(
            0 < self.cache_tokens <= self.segment_tokens,
            "model.attention.cache_tokens",
            f"must lie between 1 and segment_tokens ({self.segment_tokens})",
        )


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Causal attention over the whole window; its cost grows with the square of the length."""

    kind: Literal["full"] = "full"  # chooses this attention


AttentionConfig = Annotated[
    InfiniConfig | LocalConfig | TransformerXLConfig | FullConfig, pydantic.Field(discriminator="kind")
]
KINDS = {"infini": InfiniConfig, "local": LocalConfig, "transformer_xl": TransformerXLConfig, "full": FullConfig}
