"""`model`: the sizes of the decoder."""

import math
from dataclasses import dataclass, field

from infini_train.config.attention import AttentionConfig, InfiniConfig
from infini_train.config.errors import require
from infini_train.config.values import (
    Deviation,
    Epsilon,
    Factor,
    Heads,
    Layers,
    Theta,
    TokenIds,
    Total,
    WideWidth,
    Width,
)
from infini_train.config.variant import AttentionVariant, LayerShape


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Long waves of the rotary embedding made longer, as Llama 3.1 and 3.2 have them; null: all waves as they are."""

    factor: Factor  # factor by which the longest waves grow
    low_freq_factor: Factor = 1.0  # waves longer than original_tokens / low_freq_factor grow by the whole factor
    high_freq_factor: Factor = 4.0  # waves shorter than original_tokens / high_freq_factor stay
    original_tokens: Total = 8192  # context length before scaling

    def __post_init__(self) -> None:
        require(self.factor >= 1, "model.rope_scaling.factor", "must be at least 1")
        require(
            0 < self.low_freq_factor < self.high_freq_factor,
            "model.rope_scaling.low_freq_factor",
            f"must lie between 0 and high_freq_factor ({self.high_freq_factor})",
        )
        require(self.original_tokens > 0, "model.rope_scaling.original_tokens", "must be positive")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-shaped decoder. `num_kv_heads`, `head_dim` and `value_head_dim` have the usual defaults when null."""

    vocab_size: TokenIds  # number of token ids; at least those of the tokenizer
    hidden_size: Width  # size of a token's vector between the layers
    num_layers: Layers  # number of layers, each with attention and feed-forward
    num_heads: Heads  # query heads per layer; with infini, each has a gate
    ffn_size: WideWidth  # inner size of the feed-forward (SwiGLU)
    # key-value heads per layer, each with a memory; divides num_heads; null: num_heads
    num_kv_heads: Heads | None = None
    head_dim: Width | None = None  # size of queries and keys per head; null: hidden_size / num_heads
    value_head_dim: Width | None = None  # size of values per head; null: head_dim
    attention: AttentionConfig = field(default_factory=InfiniConfig)  # its variant; some differ from layer to layer
    rope_theta: Theta = 10_000.0  # base of the rotary embedding, which counts inside the segment
    rope_scaling: RopeScaling | None = None
    norm_eps: Epsilon = 1e-5  # epsilon of the RMS norms
    tied_embeddings: bool = False  # one matrix embeds tokens and gives the logits
    qk_norm: bool = False  # RMS norm of queries and keys, per head
    qkv_bias: bool = False  # biases in the query, key and value projections
    init_std: Deviation | None = None  # standard deviation of initial matrices; null: 1/sqrt(fan in), embeddings 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "ffn_size"):
            require(getattr(self, name) > 0, f"model.{name}", "must be positive")
        for name in ("num_kv_heads", "head_dim", "value_head_dim"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name}", "must be positive, or null for its default")
        require(
            self.num_heads % self.kv_heads == 0,
            "model.num_kv_heads",
            f"{self.kv_heads} key-value heads can't share {self.num_heads} query heads evenly; choose a divisor",
        )
        require(
            self.head_dim is not None or self.hidden_size % self.num_heads == 0,
            "model.num_heads",
            f"{self.num_heads} heads don't divide hidden_size {self.hidden_size}; change one or set model.head_dim",
        )
        for name in ("rope_theta", "norm_eps"):
            require(getattr(self, name) > 0, f"model.{name}", "must be positive")
        require(self.init_std is None or self.init_std > 0, "model.init_std", "must be positive, or null")
        require(self.key_dim % 2 == 0, "model.head_dim", f"rotary embedding needs an even size, not {self.key_dim}")
        self.attention.check_model(self.num_layers)

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def key_dim(self) -> int:
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def value_dim(self) -> int:
        return self.key_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def shape(self) -> LayerShape:
        """The sizes that an attention variant's arithmetic needs."""
        return LayerShape(self.hidden_size, self.num_heads, self.kv_heads, self.key_dim, self.value_dim)

    @property
    def layers(self) -> tuple[AttentionVariant, ...]:
        """The attention variant of each layer."""
        return tuple(self.attention.at(layer, self.num_layers) for layer in range(self.num_layers))

    @property
    def gate_layers(self) -> tuple[int, ...]:
        """The layers whose heads have gates, counted from 0."""
        return tuple(number for number, attention in enumerate(self.layers) if attention.has_gates)

    @property
    def segment_tokens(self) -> int | None:
        """Tokens in a segment, whose edges a window must keep; None if no layer has segments."""
        sizes = {size for attention in self.layers if (size := attention.segment_tokens) is not None}
        return math.lcm(*sizes) if sizes else None
