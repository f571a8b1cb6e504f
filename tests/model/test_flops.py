"""Sizes from the config alone are those of the real model."""

from pathlib import Path

import pytest
import torch

from infini_train.config.attention import InfiniConfig, TransformerXLConfig
from infini_train.config.files import load_model
from infini_train.model.flops import count_parameters, memory_numbers, training_flops_per_token
from infini_train.model.transformer import Transformer

MODELS = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "configs" / "model").glob("*.yaml"))


def numel(config) -> int:
    with torch.device("meta"):
        model = Transformer(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_every_shipped_model_has_the_counted_parameters(name, tools):
    config = load_model(name)
    assert numel(config) == count_parameters(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"tied_embeddings": True},
        {"qk_norm": True},
        {"qkv_bias": True},
        {"num_kv_heads": 1},
        {"num_kv_heads": None},
        {"head_dim": 6, "value_head_dim": 10, "qk_norm": True, "qkv_bias": True},
    ],
    ids=str,
)
def test_every_option_is_counted(changes, variant, tools):
    config = tools.tiny(variant, **changes)
    assert numel(config) == count_parameters(config)


def test_memory_numbers_are_those_of_the_state(tools):
    config = tools.tiny("delta", value_head_dim=12)
    state = tools.build(config).initial_state(1)
    held = sum(layer.memory.memory_BKDE.numel() + layer.memory.normaliser_BKD.numel() for layer in state)
    assert held == memory_numbers(config)
    cached = tools.tiny("transformer-xl", value_head_dim=12)
    state = tools.build(cached).initial_state(1)
    assert memory_numbers(cached) == sum(layer.k_BKRD.numel() + layer.v_BKRE.numel() for layer in state)
    assert memory_numbers(tools.tiny("local")) == memory_numbers(tools.tiny("full")) == 0


def test_memory_numbers_are_those_of_the_paper(tools):
    """Table 2: 12 layers, 8 heads of 128, segments of 2048 tokens."""
    shape = {"num_layers": 12, "num_heads": 8, "num_kv_heads": 8, "head_dim": 128}
    infini = tools.tiny(attention=InfiniConfig(segment_tokens=2048), **shape)
    cached = tools.tiny(attention=TransformerXLConfig(segment_tokens=2048, cache_tokens=2048), **shape)
    assert round(memory_numbers(infini) / 1e5) == 16
    assert round(memory_numbers(cached) / 1e6) == 50


def test_flops_of_the_matrices_and_of_attention(tools):
    """Six floating-point operations a parameter and token, and attention in proportion to what is attended."""
    full = tools.tiny("full")
    matrices = count_parameters(full) - full.vocab_size * full.hidden_size
    per_attended = 3 * full.num_layers * full.num_heads * (full.key_dim + full.value_dim)
    assert training_flops_per_token(full, 64) == 6 * matrices + 64 * per_attended
    assert training_flops_per_token(full, 128) - training_flops_per_token(full, 64) == 64 * per_attended
    local = tools.tiny("local")
    assert training_flops_per_token(local, 64) == training_flops_per_token(local, 4096)
    assert training_flops_per_token(local, 64) == training_flops_per_token(full, 8)
    linear, delta = tools.tiny("linear"), tools.tiny("delta")
    assert (
        training_flops_per_token(local, 64) < training_flops_per_token(linear, 64) < training_flops_per_token(delta, 64)
    )
    longer = tools.tiny(attention=InfiniConfig(segment_tokens=16))
    assert training_flops_per_token(longer, 64) - training_flops_per_token(linear, 64) == 8 * per_attended
