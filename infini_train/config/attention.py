"""`model.attention`: the variants of attention. A class here says all of its variant that needs no tensors.

That is: the fields, what they have to satisfy, which layouts the variant allows, what an export loses, what a resumed
or continued run may change, and the arithmetic of parameters, memory and FLOPs. Its tensors are those of its
`SequenceMixer` (model/variants.py names both).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from infini_train.config.errors import ConfigError, require
from infini_train.config.parallel import ParallelConfig
from infini_train.config.union import one_of
from infini_train.config.values import Deviation, Few, GateInit, Layers, Many, Tokens
from infini_train.config.variant import AttentionVariant, LayerShape, TokenFlops, attention_flops

FP32_BYTES = 4
GATED_CHUNK_TOKENS = 64  # of ops/gated_delta.py, for FLOPs
INITIAL = "an initial value; the checkpoint's weights are used"
ANY_VIEW = "the same weights whatever they see"


def _check_segment(segment_tokens: int, name: str, seen_tokens: int, least: int = 0) -> None:
    """A segment, and the field of this name: tokens before it, or before a token, that are seen as well."""
    require(segment_tokens > 0, "model.attention.segment_tokens", "must be positive")
    require(
        least <= seen_tokens <= segment_tokens,
        f"model.attention.{name}",
        f"must lie between {least} and segment_tokens ({segment_tokens})",
    )


@dataclass(frozen=True, kw_only=True)
class InfiniConfig(AttentionVariant):
    """Segment-local attention plus a compressive memory (arXiv 2404.07143)."""

    kind: Literal["infini"] = "infini"  # chooses this attention
    segment_tokens: Tokens = 256  # inside a segment attention is exact; what is older is read from the memory
    # how the memory is written: linear, delta: the paper's Eq. 8 or Eq. 9, a segment at once; gated_delta: ours, token
    # by token, with keys of unit length and a write strength and a decay that each token chooses
    update: Literal["linear", "delta", "gated_delta"] = "linear"
    # feature map of keys and queries in the memory: elu: the paper's sigma; sharp: a steeper one
    features: Literal["elu", "sharp"] = "elu"
    # what a token reads of the memory: segment: all before its segment, as in the paper; token (gated_delta only): all
    # before itself, also in its segment
    read: Literal["segment", "token"] = "segment"
    read_norm: bool = False  # RMS norm of what is read (false: the paper's form)
    gate: Literal["head", "query"] = "head"  # a gate a head, as in the paper; query: each query also has a say
    gate_init: GateInit = 0.0  # initial beta of the gates; sigmoid(beta) is the share of the memory
    overlap_tokens: Tokens = 0  # local attention also sees the previous segment's last tokens (0: the paper's form)
    sink_tokens: Few = 0  # local attention also sees the document's first tokens, as many as this (0: the paper's form)
    conv_tokens: Many = 0  # queries and keys also take in this many tokens before theirs (0: the paper's form)
    # standard deviation of those weights at first; null: 1/sqrt(conv_tokens), or 0 when added to a trained model
    conv_std: Deviation | None = None
    # gated_delta: what the decay's sigmoid is taken of at first; from 8.3 on nothing fades
    decay_init: GateInit = 8.0

    has_gates: ClassVar[bool] = True
    crosses_ranks: ClassVar[bool] = True
    same_weights: ClassVar[Mapping[str, str]] = {
        "update": "the updates share all weights, but those by which gated_delta writes, which begin anew",
        "features": "both features share all weights",
        "read": ANY_VIEW,
        "overlap_tokens": ANY_VIEW,
        "sink_tokens": ANY_VIEW,
        "segment_tokens": ANY_VIEW,
    }
    initial: ClassVar[Mapping[str, str]] = {"gate_init": INITIAL, "conv_std": INITIAL, "decay_init": INITIAL}
    adds_parameters: ClassVar[Mapping[str, object]] = {"conv_tokens": 0, "gate": "head", "read_norm": False}

    def __post_init__(self) -> None:
        _check_segment(self.segment_tokens, "overlap_tokens", self.overlap_tokens)
        _check_segment(self.segment_tokens, "conv_tokens", self.conv_tokens)
        require(self.sink_tokens >= 0, "model.attention.sink_tokens", "must not be negative")
        require(self.conv_std is None or self.conv_std >= 0, "model.attention.conv_std", "must be at least 0, or null")
        require(
            self.read == "segment" or self.update == "gated_delta",
            "model.attention.read",
            f"token needs update gated_delta: {self.update} is written a segment at once; use segment",
        )
        require(
            self.features == "elu" or self.update != "gated_delta",
            "model.attention.features",
            "update gated_delta has keys of unit length and no feature map; leave it out",
        )

    @property
    def seen_tokens(self) -> int:
        return self.overlap_tokens

    def check_export(self) -> str | None:
        """See `AttentionVariant.check_export`."""
        if self.conv_tokens:
            raise ConfigError(
                f"model.attention.conv_tokens: {self.conv_tokens}: queries and keys are made of several tokens, which"
                " no model type there does; its weights alone are another model"
            )
        return "has no memory: it attends to the whole text, not to segments, and the gates are left out"

    def extra_parameters(self, shape: LayerShape) -> int:
        """The gates, a convolution's weights, a norm's, and those of write strength and decay."""
        gates = shape.num_heads * (1 + shape.key_dim * (self.gate == "query"))
        writing = 2 * shape.kv_heads * (shape.hidden_size + 1) * (self.update == "gated_delta")
        return gates + writing + self.conv_tokens * shape.hidden_size + shape.value_dim * self.read_norm

    def memory_numbers(self, shape: LayerShape) -> int:
        """d_k (d_v + 1) for each key-value head: M and z. A gated M has no z; read by segments there are two."""
        if self.update == "gated_delta":
            return shape.key_dim * shape.value_dim * shape.kv_heads * (2 if self.read == "segment" else 1)
        return shape.key_dim * (shape.value_dim + 1) * shape.kv_heads

    def least_carried_bytes(self, shape: LayerShape, weight_bytes: int) -> int:
        """The memory is kept in fp32."""
        return self.memory_numbers(shape) * FP32_BYTES

    def mixing_flops(self, shape: LayerShape, window_tokens: int) -> TokenFlops:
        """Local attention, and the memory's reads and writes."""
        key, value = shape.key_dim, shape.value_dim
        if self.update == "gated_delta":
            seen = min(self.segment_tokens, GATED_CHUNK_TOKENS)  # half of a chunk's squares is useful
            inside = shape.num_heads * (self.read == "token")
            return TokenFlops(
                attention=attention_flops(shape, self.segment_tokens),
                memory_read=2 * shape.num_heads * key * value + inside * seen * (key + value),
                memory_write=2 * shape.kv_heads * key * value,
                delta=shape.kv_heads * (2 * key * value + seen * (2 * key + value)),
            )
        delta = 2 * shape.kv_heads * key * key * (1 + value / self.segment_tokens)
        return TokenFlops(
            attention=attention_flops(shape, self.segment_tokens),
            memory_read=2 * shape.num_heads * key * (value + 1),
            memory_write=2 * shape.kv_heads * key * (value + 1),
            delta=delta if self.update == "delta" else 0.0,
        )


@dataclass(frozen=True, kw_only=True)
class LocalConfig(AttentionVariant):
    """Causal attention inside the segment only: Infini-attention without its memory."""

    kind: Literal["local"] = "local"  # chooses this attention
    segment_tokens: Tokens = 256  # a token sees its own segment only
    overlap_tokens: Tokens = 0  # a token also sees this many last tokens of the previous segment
    sink_tokens: Few = 0  # a token also sees the document's first tokens, as many as this

    crosses_ranks: ClassVar[bool] = True
    same_weights: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("overlap_tokens", "sink_tokens", "segment_tokens"), ANY_VIEW
    )

    def __post_init__(self) -> None:
        _check_segment(self.segment_tokens, "overlap_tokens", self.overlap_tokens)
        require(self.sink_tokens >= 0, "model.attention.sink_tokens", "must not be negative")

    @property
    def seen_tokens(self) -> int:
        return self.overlap_tokens

    def check_export(self) -> str | None:
        """See `AttentionVariant.check_export`."""
        return "attends to the whole text, not to segments"


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig(AttentionVariant):
    """A baseline: attention inside the segment and to a cache of tokens before it, without gradient into the cache."""

    kind: Literal["transformer_xl"] = "transformer_xl"  # chooses this attention
    segment_tokens: Tokens = 256  # a token sees its own segment
    cache_tokens: Tokens = 256  # a token also sees this many last tokens of the previous segment

    same_weights: ClassVar[Mapping[str, str]] = {"cache_tokens": ANY_VIEW, "segment_tokens": ANY_VIEW}

    def __post_init__(self) -> None:
        _check_segment(self.segment_tokens, "cache_tokens", self.cache_tokens, least=1)

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
    same_weights: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("cache_tokens", "stored_tokens", "top_k", "segment_tokens"), ANY_VIEW
    )
    initial: ClassVar[Mapping[str, str]] = {"gate_init": INITIAL}

    def __post_init__(self) -> None:
        _check_segment(self.segment_tokens, "cache_tokens", self.cache_tokens)
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


@dataclass(frozen=True, kw_only=True)
class FullConfig(AttentionVariant):
    """Causal attention over the whole window; its cost grows with the square of the length."""

    kind: Literal["full"] = "full"  # chooses this attention

    crosses_ranks: ClassVar[bool] = True

    def check_export(self) -> None:
        """Nothing is lost: a plain model computes the same."""


KINDS: dict[str, type[AttentionVariant]] = {
    "infini": InfiniConfig,
    "local": LocalConfig,
    "transformer_xl": TransformerXLConfig,
    "memorizing": MemorizingConfig,
    "rmt": RmtConfig,
    "full": FullConfig,
}


# One of KINDS, chosen by `kind`; a layer's can't be mixed again.
AttentionConfig = Annotated[AttentionVariant, one_of(KINDS)]
LayerAttentionConfig = Annotated[AttentionVariant, one_of(KINDS, without="mixed")]


@dataclass(frozen=True, kw_only=True)
class MixedConfig(AttentionVariant):
    """Layers of several kinds, in a pattern: memory in most and full attention in a few, say."""

    kind: Literal["mixed"] = "mixed"  # chooses this attention
    # name -> attention of the layers of that name: the fields of any other kind, as in
    # {memory: {kind: infini, update: gated_delta}, whole: {kind: full}}
    variants: Mapping[str, LayerAttentionConfig]
    # a name for each layer, from the first one on; repeated if there are more layers, as in [memory, memory, whole]
    pattern: tuple[str, ...]

    def __post_init__(self) -> None:
        require(bool(self.pattern), "model.attention.pattern", "give at least one name of model.attention.variants")
        for name in self.pattern:
            known = ", ".join(self.variants) or "none"
            require(name in self.variants, "model.attention.pattern", f"{name} is none of the variants; known: {known}")
        for name, variant in self.variants.items():
            field = f"model.attention.variants.{name}"
            require(
                name in self.pattern, field, "no layer has it; put it into model.attention.pattern, or leave it out"
            )
            require(
                variant.fits_any_layer, f"{field}.kind", f"{variant.kind} concerns all layers of a model; use another"
            )

    def at(self, layer: int, num_layers: int) -> AttentionVariant:
        """The pattern, again and again."""
        return self.variants[self.pattern[layer % len(self.pattern)]]

    def check_model(self, num_layers: int) -> None:
        """The pattern must fit."""
        require(
            len(self.pattern) <= num_layers,
            "model.attention.pattern",
            f"has {len(self.pattern)} names for {num_layers} layers; shorten it, or raise model.num_layers",
        )


KINDS["mixed"] = MixedConfig
