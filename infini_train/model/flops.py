"""Sizes and arithmetic of a model from its config alone."""

from typing import NamedTuple

from infini_train.config.attention import FullConfig, InfiniConfig, MemorizingConfig, RmtConfig, TransformerXLConfig
from infini_train.config.model import ModelConfig


def count_parameters(config: ModelConfig) -> int:
    """Parameters, tied embeddings counted once."""
    hidden, heads, kv = config.hidden_size, config.num_heads, config.kv_heads
    projected = heads * config.key_dim + kv * (config.key_dim + config.value_dim)
    layer = hidden * projected + heads * config.value_dim * hidden + 3 * hidden * config.ffn_size + 2 * hidden
    layer += projected if config.qkv_bias else 0
    layer += 2 * config.key_dim if config.qk_norm else 0
    if isinstance(config.attention, InfiniConfig):
        layer += heads + config.conv_tokens * hidden
    embeddings = config.vocab_size * hidden * (1 if config.tied_embeddings else 2)
    once = heads if isinstance(config.attention, MemorizingConfig) else 0
    once += hidden * config.attention.memory_tokens if isinstance(config.attention, RmtConfig) else 0
    return embeddings + config.num_layers * layer + hidden + once


def memory_numbers(config: ModelConfig) -> int:
    """Numbers that a sequence's memories hold, as the paper's Table 2 counts them; T tokens, l layers, K heads.

    d_k (d_v + 1) K l of Infini-attention; (d_k + d_v) K T l of Transformer-XL's cache; (d_k + d_v) K (M + T l) with a
    store of M; (d_k + d_v) K p l of p memory tokens (there d_model p l 2), of which RMT hands only d_model p on.
    """
    attention, layers = config.attention, config.num_layers
    token = (config.key_dim + config.value_dim) * config.kv_heads
    match attention:
        case InfiniConfig():
            return config.key_dim * (config.value_dim + 1) * config.kv_heads * layers
        case TransformerXLConfig():
            return token * attention.cache_tokens * layers
        case MemorizingConfig():
            return token * (attention.stored_tokens + attention.cache_tokens * layers)
        case RmtConfig():
            return token * attention.memory_tokens * layers
    return 0


class TokenFlops(NamedTuple):
    """Floating-point operations of a token's forward, by what they are for."""

    matrices: float  # projections, feed-forward, head
    attention: float  # local: causal, so half of the square is useful
    memory_read: float = 0.0  # Eq. 7
    memory_write: float = 0.0  # Eq. 8
    delta: float = 0.0  # what Eq. 9 adds; its chain of D x D products is spread over the segment

    @property
    def total(self) -> float:
        return sum(self)


def forward_flops_per_token(config: ModelConfig, window_tokens: int) -> TokenFlops:
    """Useful operations of one forward, a token."""
    hidden, heads, layers = config.hidden_size, config.num_heads, config.num_layers
    key, value = config.key_dim, config.value_dim
    embeddings = config.vocab_size * hidden  # the look-up multiplies nothing
    matrices = 2 * (count_parameters(config) - (0 if config.tied_embeddings else embeddings))
    attended = window_tokens if isinstance(config.attention, FullConfig) else config.attention.segment_tokens
    mixing = heads * attended * (key + value)  # 2 flops x half of the square
    once = 0.0  # a token, of the layer that retrieves
    if isinstance(config.attention, TransformerXLConfig | MemorizingConfig):  # the cache is seen whole, projected again
        mixing += 2 * heads * config.attention.cache_tokens * (key + value)
        mixing += 2 * hidden * config.kv_heads * (key + value)
    if isinstance(config.attention, MemorizingConfig):  # the search has no backward
        once = 2 * heads * (config.attention.stored_tokens * key / 3 + config.attention.top_k * (key + value))
    if isinstance(config.attention, RmtConfig):  # memory tokens pass the layers before and behind a segment
        both = 2 * config.attention.memory_tokens
        longer = 1 + both / attended
        matrices += (longer - 1) * (matrices - 2 * embeddings)
        mixing = longer * heads * (attended + both) * (key + value)
    if not isinstance(config.attention, InfiniConfig):
        return TokenFlops(matrices, layers * mixing + once)
    delta = 2 * config.kv_heads * key * key * (1 + value / config.attention.segment_tokens)
    return TokenFlops(
        matrices,
        layers * mixing,
        memory_read=layers * 2 * heads * key * (value + 1),
        memory_write=layers * 2 * config.kv_heads * key * (value + 1),
        delta=layers * delta if config.attention.update == "delta" else 0.0,
    )


def training_flops_per_token(config: ModelConfig, window_tokens: int) -> float:
    """Useful operations of forward and backward (twice the forward) a token, without recomputation."""
    return 3 * forward_flops_per_token(config, window_tokens).total
