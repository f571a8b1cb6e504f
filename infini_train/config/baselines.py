"""The baselines of the paper's Table 2: what needs no tensors (attention.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from infini_train.config.errors import ConfigError, require
from infini_train.config.parallel import ParallelConfig
from infini_train.config.segment_attention import ANY_VIEW, INITIAL, LocalConfig, check_segment
from infini_train.config.values import GateInit, Layers, Many, Tokens
from infini_train.config.variant import AttentionVariant, LayerShape, TokenFlops, attention_flops


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig(AttentionVariant):
    """A baseline: attention inside the segment and to a cache of tokens before it, without gradient into the cache."""

    kind: Literal["transformer_xl"] = "transformer_xl"  # chooses this attention
    segment_tokens: Tokens = 256  # a token sees its own segment
    cache_tokens: Tokens = 256  # a token also sees this many last tokens of the previous segment

    segments_may_vary: ClassVar[bool] = True
    same_weights: ClassVar[Mapping[str, str]] = {"cache_tokens": ANY_VIEW, "segment_tokens": ANY_VIEW}

    def __post_init__(self) -> None:
        check_segment(self.segment_tokens, "cache_tokens", self.cache_tokens, least=1)

    @property
    def seen_tokens(self) -> int:
        return self.cache_tokens

    def check_layout(self, parallel: ParallelConfig) -> None:
        """Its cache lies on one rank."""
        self.check_context(parallel, "the cache")

    def check_export(self) -> str | None:
        """See `AttentionVariant.check_export`."""
        return "attends to the whole text, not to a segment and its cache"

    def memory_numbers(self, shape: LayerShape) -> int:
        """Keys and values of the cache."""
        return shape.token_numbers * self.cache_tokens

    def mixing_flops(self, shape: LayerShape, window_tokens: int) -> TokenFlops:
        """Half of the segment's square, and all of the cache's."""
        return TokenFlops(attention=_cached_attention_flops(shape, self.segment_tokens, self.cache_tokens))


def _cached_attention_flops(shape: LayerShape, segment_tokens: int, cache_tokens: int) -> float:
    flops = attention_flops(shape, segment_tokens)
    if cache_tokens:  # seen whole; its keys and values are projected once more
        flops += 2 * shape.num_heads * cache_tokens * (shape.key_dim + shape.value_dim)
        flops += 2 * shape.hidden_size * shape.token_numbers
    return flops


@dataclass(frozen=True, kw_only=True)
class MemorizingConfig(AttentionVariant):
    """A baseline: Transformer-XL whose one layer also retrieves from stored keys and values (arXiv 2203.08913)."""

    kind: Literal["memorizing"] = "memorizing"  # chooses this attention
    segment_tokens: Tokens = 256  # a token sees its own segment
    cache_tokens: Tokens = 256  # a token also sees this many last tokens of the previous segment; 0: none
    stored_tokens: Tokens = 65_536  # keys and values of this many last tokens are stored, without gradient
    top_k: Many = 32  # each query attends to this many of them, those with the highest scores
    # the layer that stores and retrieves, the first is 0; null: after three quarters of them
    layer: Layers | None = None
    gate_init: GateInit = 0.0  # initial beta of its gates; sigmoid(beta) is the share of what was retrieved

    has_gates: ClassVar[bool] = True
    fits_any_layer: ClassVar[bool] = False
    segments_may_vary: ClassVar[bool] = True
    same_weights: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("cache_tokens", "stored_tokens", "top_k", "segment_tokens"), ANY_VIEW
    )
    initial: ClassVar[Mapping[str, str]] = {"gate_init": INITIAL}

    def __post_init__(self) -> None:
        check_segment(self.segment_tokens, "cache_tokens", self.cache_tokens)
        for name in ("stored_tokens", "top_k"):
            require(getattr(self, name) > 0, f"model.attention.{name}", "must be positive")
        require(
            self.top_k <= self.stored_tokens,
            "model.attention.top_k",
            f"can't be more than stored_tokens ({self.stored_tokens})",
        )

    def retrieval_layer(self, num_layers: int) -> int:
        """The layer that stores and retrieves, counted from 0."""
        return 3 * num_layers // 4 if self.layer is None else self.layer

    @property
    def seen_tokens(self) -> int:
        return self.cache_tokens

    def at(self, layer: int, num_layers: int) -> AttentionVariant:
        """All layers but one are Transformer-XL's, or local without a cache."""
        if layer == self.retrieval_layer(num_layers):
            return self
        if not self.cache_tokens:
            return LocalConfig(segment_tokens=self.segment_tokens)
        return TransformerXLConfig(segment_tokens=self.segment_tokens, cache_tokens=self.cache_tokens)

    def check_model(self, num_layers: int) -> None:
        """The chosen layer must be there."""
        require(
            0 <= self.retrieval_layer(num_layers) < num_layers,
            "model.attention.layer",
            f"{self.layer} is none of the {num_layers} layers; choose one from 0 to {num_layers - 1}",
        )

    def check_layout(self, parallel: ParallelConfig) -> None:
        """Its store lies on one rank, and its gates in one layer."""
        self.check_context(parallel, "the store")
        require(
            parallel.pipeline_size == 1,
            "parallel.pipeline_size",
            "the gates of model.attention.kind memorizing lie in one layer, so the stages' optimizers would not match;"
            " use parallel.tensor_size or data_size instead, and pipeline_size 1",
        )

    def check_export(self) -> str | None:
        """See `AttentionVariant.check_export`."""
        return "has no store: it attends to the whole text, and the gates are left out"

    def extra_parameters(self, shape: LayerShape) -> int:
        """The gates."""
        return shape.num_heads

    def memory_numbers(self, shape: LayerShape) -> int:
        """Keys and values of the store and the cache."""
        return shape.token_numbers * (self.stored_tokens + self.cache_tokens)

    def mixing_flops(self, shape: LayerShape, window_tokens: int) -> TokenFlops:
        """The cached attention, and the search, which has no backward pass."""
        found = self.stored_tokens * shape.key_dim / 3 + self.top_k * (shape.key_dim + shape.value_dim)
        cached = _cached_attention_flops(shape, self.segment_tokens, self.cache_tokens)
        return TokenFlops(attention=cached + 2 * shape.num_heads * found)


@dataclass(frozen=True, kw_only=True)
class RmtConfig(AttentionVariant):
    """A baseline: memory tokens that a segment hands to the next one (Recurrent Memory Transformer, 2207.06881)."""

    kind: Literal["rmt"] = "rmt"  # chooses this attention
    segment_tokens: Tokens = 256  # a token sees its own segment, and the memory tokens
    memory_tokens: Many = 10  # number of memory tokens, read before a segment and written after it

    fits_any_layer: ClassVar[bool] = False
    segments_may_vary: ClassVar[bool] = True
    same_weights: ClassVar[Mapping[str, str]] = {"segment_tokens": ANY_VIEW}

    def __post_init__(self) -> None:
        for name in ("segment_tokens", "memory_tokens"):
            require(getattr(self, name) > 0, f"model.attention.{name}", "must be positive")

    def check_layout(self, parallel: ParallelConfig) -> None:
        """A segment waits for the whole stack's output of the one before."""
        self.check_context(parallel, "what a segment hands to the next one")
        require(
            parallel.pipeline_size == 1,
            "parallel.pipeline_size",
            "the first layer of model.attention.kind rmt reads what the last one wrote a segment before, so its stages"
            " would wait for one another; use parallel.tensor_size or data_size instead, and pipeline_size 1",
        )
        require(
            not parallel.sequence_parallel,
            "parallel.sequence_parallel",
            "the memory tokens of model.attention.kind rmt are not divided along the sequence; set it to false",
        )

    def check_export(self) -> str | None:
        """See `AttentionVariant.check_export`."""
        raise ConfigError(
            "model.attention.kind: rmt reads memory tokens between segments, which no model type there does; its"
            " weights alone are another model"
        )

    def stack_parameters(self, shape: LayerShape) -> int:
        """The memory of a document's first segment."""
        return shape.hidden_size * self.memory_tokens

    def memory_numbers(self, shape: LayerShape) -> int:
        """Keys and values of the memory tokens; of these RMT hands only d_model p on, once for all layers."""
        return shape.token_numbers * self.memory_tokens

    def least_carried_bytes(self, shape: LayerShape, weight_bytes: int) -> int:
        """Far less than Table 2 counts, and once for all layers: nothing is counted."""
        return 0

    @property
    def passes(self) -> float:
        """Memory tokens run through the layers before and after a segment."""
        return 1 + 2 * self.memory_tokens / self.segment_tokens

    def mixing_flops(self, shape: LayerShape, window_tokens: int) -> TokenFlops:
        """Attention over the segment and both copies of the memory tokens."""
        seen = self.segment_tokens + 2 * self.memory_tokens
        return TokenFlops(attention=self.passes * attention_flops(shape, seen))
