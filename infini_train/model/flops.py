"""Sizes and arithmetic of a model from its config alone: what all variants share, and the sums of what each adds."""

from infini_train.config.model import ModelConfig
from infini_train.config.variant import TokenFlops


def count_parameters(config: ModelConfig) -> int:
    """Parameters, tied embeddings counted once."""
    shape = config.shape
    projected = config.num_heads * config.key_dim + shape.token_numbers
    layer = config.hidden_size * (projected + config.num_heads * config.value_dim)
    layer += 3 * config.hidden_size * config.ffn_size + 2 * config.hidden_size
    layer += projected if config.qkv_bias else 0
    layer += 2 * config.key_dim if config.qk_norm else 0
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tied_embeddings else 2)
    extra = sum(attention.extra_parameters(shape) for attention in config.layers)
    extra += config.attention.stack_parameters(shape)
    return embeddings + config.num_layers * layer + config.hidden_size + extra


def memory_numbers(config: ModelConfig) -> int:
    """Numbers that a sequence's memories hold, as the paper's Table 2 counts them; T tokens, l layers, K heads.

    d_k (d_v + 1) K l of Infini-attention; (d_k + d_v) K T l of Transformer-XL's cache; (d_k + d_v) K (M + T l) with a
    store of M; (d_k + d_v) K p l of p memory tokens (there d_model p l 2).
    """
    return sum(attention.memory_numbers(config.shape) for attention in config.layers)


def forward_flops_per_token(config: ModelConfig, window_tokens: int) -> TokenFlops:
    """Useful operations of one forward pass, per token."""
    embeddings = config.vocab_size * config.hidden_size  # the look-up multiplies nothing
    matrices = 2 * (count_parameters(config) - (0 if config.tied_embeddings else embeddings))
    matrices += (config.attention.passes - 1) * (matrices - 2 * embeddings)
    flops = TokenFlops(matrices)
    for attention in config.layers:
        flops = flops.plus(attention.mixing_flops(config.shape, window_tokens))
    return flops


def training_flops_per_token(config: ModelConfig, window_tokens: int) -> float:
    """Useful operations of forward and backward (twice the forward) per token, without recomputation."""
    return 3 * forward_flops_per_token(config, window_tokens).total
