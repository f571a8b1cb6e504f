"""Attention by segments, with and without the memory, and over everything: what needs no tensors (attention.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from infini_train.config.errors import ConfigError, require
from infini_train.config.values import Deviation, Few, GateInit, Many, Tokens
from infini_train.config.variant import AttentionVariant, LayerShape, TokenFlops, attention_flops

FP32_BYTES = 4
GATED_CHUNK_TOKENS = 64  # of ops/gated_delta.py, for FLOPs
INITIAL = "an initial value; the checkpoint's weights are used"
ANY_VIEW = "the same weights whatever they see"


def check_segment(segment_tokens: int, name: str, seen_tokens: int, least: int = 0) -> None:
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
    # the memory has its own maps of queries, keys and what is read, a matrix a head each that begins as the identity:
    # it can be taught while local attention stays as it is (false: the paper's form)
    maps: bool = False
    gate: Literal["head", "query"] = "head"  # a gate a head, as in the paper; query: each query also has a say
    gate_init: GateInit = 0.0  # initial beta of the gates; sigmoid(beta) is the share of the memory
    overlap_tokens: Tokens = 0  # local attention also sees the previous segment's last tokens (0: the paper's form)
    sink_tokens: Few = 0  # local attention also sees the document's first tokens, as many as this (0: the paper's form)
    conv_tokens: Many = 0  # queries and keys also take in this many tokens before theirs (0: the paper's form)
    # standard deviation of those weights at first; null: 1/sqrt(conv_tokens), or 0 when added to a trained model
    conv_std: Deviation | None = None
    # gated_delta: what the decay's sigmoid is taken of at first; from 8.3 on nothing fades, and it can't learn to
    decay_init: GateInit = 8.0

    has_gates: ClassVar[bool] = True
    crosses_ranks: ClassVar[bool] = True
    segments_may_vary: ClassVar[bool] = True
    same_weights: ClassVar[Mapping[str, str]] = {
        "update": "all weights but gated_delta's own are shared; those begin anew, or are left out",
        "features": "both features share all weights",
        "read": ANY_VIEW,
        "overlap_tokens": ANY_VIEW,
        "sink_tokens": ANY_VIEW,
        "segment_tokens": ANY_VIEW,
    }
    initial: ClassVar[Mapping[str, str]] = {"gate_init": INITIAL, "conv_std": INITIAL, "decay_init": INITIAL}
    adds_parameters: ClassVar[Mapping[str, object]] = {
        "conv_tokens": 0,
        "gate": "head",
        "read_norm": False,
        "maps": False,
    }

    def __post_init__(self) -> None:
        check_segment(self.segment_tokens, "overlap_tokens", self.overlap_tokens)
        check_segment(self.segment_tokens, "conv_tokens", self.conv_tokens)
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
    def chooses_writes(self) -> bool:
        """See `AttentionVariant.chooses_writes`."""
        return self.update == "gated_delta"

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
        """The gates, a convolution's weights, a norm's, those of write strength and decay, and the maps."""
        gates = shape.num_heads * (1 + shape.key_dim * (self.gate == "query"))
        writing = 2 * shape.kv_heads * (shape.hidden_size + 1) * (self.update == "gated_delta")
        of_queries = shape.num_heads * (shape.key_dim**2 + shape.value_dim**2)
        maps = (of_queries + shape.kv_heads * shape.key_dim**2) * self.maps
        return gates + writing + maps + self.conv_tokens * shape.hidden_size + shape.value_dim * self.read_norm

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
        of_queries, of_keys = (2 * shape.num_heads * (key**2 + value**2), 2 * shape.kv_heads * key**2)
        maps_read, maps_write = (of_queries, of_keys) if self.maps else (0, 0)
        if self.update == "gated_delta":
            seen = min(self.segment_tokens, GATED_CHUNK_TOKENS)  # half of a chunk's squares is useful
            inside = shape.num_heads * (self.read == "token")
            return TokenFlops(
                attention=attention_flops(shape, self.segment_tokens),
                memory_read=2 * shape.num_heads * key * value + inside * seen * (key + value) + maps_read,
                memory_write=2 * shape.kv_heads * key * value + maps_write,
                delta=shape.kv_heads * (2 * key * value + seen * (2 * key + value)),
            )
        delta = 2 * shape.kv_heads * key * key * (1 + value / self.segment_tokens)
        return TokenFlops(
            attention=attention_flops(shape, self.segment_tokens),
            memory_read=2 * shape.num_heads * key * (value + 1) + maps_read,
            memory_write=2 * shape.kv_heads * key * (value + 1) + maps_write,
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
    segments_may_vary: ClassVar[bool] = True
    same_weights: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("overlap_tokens", "sink_tokens", "segment_tokens"), ANY_VIEW
    )

    def __post_init__(self) -> None:
        check_segment(self.segment_tokens, "overlap_tokens", self.overlap_tokens)
        require(self.sink_tokens >= 0, "model.attention.sink_tokens", "must not be negative")

    @property
    def seen_tokens(self) -> int:
        return self.overlap_tokens

    def check_export(self) -> str | None:
        """See `AttentionVariant.check_export`."""
        return "attends to the whole text, not to segments"


@dataclass(frozen=True, kw_only=True)
class FullConfig(AttentionVariant):
    """Causal attention over the whole window; its cost grows with the square of the length."""

    kind: Literal["full"] = "full"  # chooses this attention

    crosses_ranks: ClassVar[bool] = True

    def check_export(self) -> None:
        """Nothing is lost: a plain model computes the same."""

    def cached_numbers(self, shape: LayerShape) -> int:
        """Keys and values of all tokens so far: the key-value cache."""
        return shape.token_numbers
