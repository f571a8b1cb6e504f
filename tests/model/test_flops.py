"""Sizes from the config alone are those of the real model."""

from pathlib import Path

import pytest
import torch

from infini_train.config.attention import InfiniConfig, MemorizingConfig, RmtConfig, TransformerXLConfig
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
        {"attention": InfiniConfig(segment_tokens=8, conv_tokens=3)},
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


def test_memory_numbers_of_a_store_are_those_of_the_state(tools):
    config = tools.tiny("memorizing", value_head_dim=12)
    *cached, retrieving = tools.build(config).initial_state(1)
    held = [*cached, retrieving.recent]
    numbers = sum(layer.k_BKRD.numel() + layer.v_BKRE.numel() for layer in held)
    assert numbers + retrieving.store.k_BKMD.numel() + retrieving.store.v_BKME.numel() == memory_numbers(config)


def test_memory_numbers_of_memory_tokens_are_their_keys_and_values(tools):
    """Those of all layers, in the state of an open segment; a closed one hands on the tokens alone."""
    config = tools.tiny("rmt", value_head_dim=12)
    model = tools.build(config)
    first, *others = tools.run(model, tools.draw(8 + 3, 1))[1]
    numbers = sum(layer.k_BKRD.numel() + layer.v_BKRE.numel() for layer in (first.recent, *others))
    open_tokens = 3 * (config.key_dim + config.value_dim) * config.kv_heads * config.num_layers
    assert numbers - open_tokens == memory_numbers(config)
    assert first.memory_BMD.numel() == 3 * config.hidden_size


def test_memory_numbers_are_those_of_the_paper(tools):
    """Table 2: 12 layers, 8 heads of 128, segments of 2048 tokens."""
    shape = {"num_layers": 12, "num_heads": 8, "num_kv_heads": 8, "head_dim": 128}
    infini = tools.tiny(attention=InfiniConfig(segment_tokens=2048), **shape)
    cached = tools.tiny(attention=TransformerXLConfig(segment_tokens=2048, cache_tokens=2048), **shape)
    assert round(memory_numbers(infini) / 1e5) == 16
    assert round(memory_numbers(cached) / 1e6) == 50
    store = MemorizingConfig(segment_tokens=2048, cache_tokens=2048, stored_tokens=65_000)
    assert round(memory_numbers(tools.tiny(attention=store, **shape)) / 1e6) == 183
    tokens = RmtConfig(segment_tokens=2048, memory_tokens=100)
    assert round(memory_numbers(tools.tiny(attention=tokens, **shape)) / 1e5) == 25


def test_flops_of_the_baselines(tools):
    """A search costs a third of an attention that also goes backward; memory tokens make a segment longer."""
    local, cached = tools.tiny("local"), tools.tiny("transformer-xl")
    store = MemorizingConfig(segment_tokens=8, cache_tokens=5, stored_tokens=20, top_k=3)
    more = MemorizingConfig(segment_tokens=8, cache_tokens=5, stored_tokens=60, top_k=3)
    one, three = (training_flops_per_token(tools.tiny(attention=each), 64) for each in (store, more))
    assert three - one == pytest.approx(2 * local.num_heads * local.key_dim * 40)
    assert training_flops_per_token(cached, 64) < one
    few, many = (tools.tiny(attention=RmtConfig(segment_tokens=8, memory_tokens=n)) for n in (1, 4))
    assert training_flops_per_token(local, 64) < training_flops_per_token(few, 64)
    inside = count_parameters(local) - 2 * local.vocab_size * local.hidden_size
    assert training_flops_per_token(many, 64) > training_flops_per_token(local, 64) + 6 * inside


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
