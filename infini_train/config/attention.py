"""`model.attention`: the variants of attention, each with its own fields."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pydantic
from pydantic import FiniteFloat

from infini_train.config.errors import require


def _check_segment(segment_tokens: int, name: str, seen_tokens: int, least: int = 0) -> None:
    """A segment, and the field of this name: tokens before it, or before a token, that are seen as well."""
    require(segment_tokens > 0, "model.attention.segment_tokens", "must be positive")
    require(
        least <= seen_tokens <= segment_tokens,
        f"model.attention.{name}",
        f"must lie between {least} and segment_tokens ({segment_tokens})",
    )


@dataclass(frozen=True, kw_only=True)
class InfiniConfig:
    """Segment-local attention plus a compressive memory (arXiv 2404.07143)."""

    kind: Literal["infini"] = "infini"  # chooses this attention
    segment_tokens: int = 256  # inside a segment attention is exact; what is older is read from the memory
    update: Literal["linear", "delta"] = "linear"  # how a segment is written: the paper's Eq. 8 or Eq. 9
    features: Literal["elu", "sharp"] = "elu"  # of keys and queries in the memory: the paper's sigma, or a sharper one
    gate_init: FiniteFloat = 0.0  # beta at the start; sigmoid(beta) is the share of the memory
    overlap_tokens: int = 0  # local attention also sees the previous segment's last tokens (0: the paper's form)
    conv_tokens: int = 0  # queries and keys also take in so many tokens before theirs (0: the paper's form)
    conv_std: FiniteFloat | None = None  # of those weights at first; null: 1/sqrt(conv_tokens), in a trained model 0

    def __post_init__(self) -> None:
        _check_segment(self.segment_tokens, "overlap_tokens", self.overlap_tokens)
        _check_segment(self.segment_tokens, "conv_tokens", self.conv_tokens)
        require(self.conv_std is None or self.conv_std >= 0, "model.attention.conv_std", "must be at least 0, or null")


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """Causal attention inside the segment only: Infini-attention without its memory."""

    kind: Literal["local"] = "local"  # chooses this attention
    segment_tokens: int = 256  # a token sees its own segment only
    overlap_tokens: int = 0  # and this many last tokens of the previous segment

    def __post_init__(self) -> None:
        _check_segment(self.segment_tokens, "overlap_tokens", self.overlap_tokens)


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig:
    """A baseline: attention inside the segment and to a cache of tokens before it, without gradient into the cache."""

    kind: Literal["transformer_xl"] = "transformer_xl"  # chooses this attention
    segment_tokens: int = 256  # a token sees its own segment
    cache_tokens: int = 256  # and this many last tokens of the previous segment

    def __post_init__(self) -> None:
        _check_segment(self.segment_tokens, "cache_tokens", self.cache_tokens, least=1)


@dataclass(frozen=True, kw_only=True)
class MemorizingConfig:
    """A baseline: Transformer-XL whose one layer also retrieves from stored keys and values (arXiv 2203.08913)."""

    kind: Literal["memorizing"] = "memorizing"  # chooses this attention
    segment_tokens: int = 256  # a token sees its own segment
    cache_tokens: int = 256  # and this many last tokens of the previous segment; 0: none
    stored_tokens: int = 65_536  # keys and values of so many last tokens are stored, without gradient
    top_k: int = 32  # a query attends to so many of them, those with the highest scores
    layer: int | None = None  # the layer that stores and retrieves, the first is 0; null: behind three quarters
    gate_init: FiniteFloat = 0.0  # of its gates; sigmoid(gate) is the share of what was retrieved

    def __post_init__(self) -> None:
        _check_segment(self.segment_tokens, "cache_tokens", self.cache_tokens)
        for name in ("stored_tokens", "top_k"):
            require(getattr(self, name) > 0, f"model.attention.{name}", "must be positive")
        require(
            self.top_k <= self.stored_tokens,
            "model.attention.top_k",
            f"can't be more than stored_tokens ({self.stored_tokens})",
        )


@dataclass(frozen=True, kw_only=True)
class RmtConfig:
    """A baseline: memory tokens that a segment hands to the next one (Recurrent Memory Transformer, 2207.06881)."""

    kind: Literal["rmt"] = "rmt"  # chooses this attention
    segment_tokens: int = 256  # a token sees its own segment, and the memory tokens
    memory_tokens: int = 10  # read before a segment, and written behind it

    def __post_init__(self) -> None:
        for name in ("segment_tokens", "memory_tokens"):
            require(getattr(self, name) > 0, f"model.attention.{name}", "must be positive")


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Causal attention over the whole window; its cost grows with the square of the length."""

    kind: Literal["full"] = "full"  # chooses this attention


AttentionConfig = Annotated[
    InfiniConfig | LocalConfig | TransformerXLConfig | MemorizingConfig | RmtConfig | FullConfig,
    pydantic.Field(discriminator="kind"),
]
KINDS = {
    "infini": InfiniConfig,
    "local": LocalConfig,
    "transformer_xl": TransformerXLConfig,
    "memorizing": MemorizingConfig,
    "rmt": RmtConfig,
    "full": FullConfig,
}
