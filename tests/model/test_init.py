"""Initial values are a function of (seed, name)."""

import pytest
import torch

from infini_train.config.attention import InfiniConfig
from infini_train.model.init import initialise
from infini_train.model.transformer import Transformer


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def initialised(config, seed=0):
    model = Transformer(config)
    initialise(model, config, seed)
    return values(model)


def test_the_same_seed_gives_the_same_values_whatever_happened_before(tools):
    config = tools.tiny()
    torch.manual_seed(1)
    first = initialised(config)
    torch.manual_seed(2)
    torch.rand(17)
    second = initialised(config)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_values_do_not_depend_on_the_order_of_construction_or_on_other_parameters(tools):
    """A deeper model, a model with biases, and a model filled parameter by parameter in reverse agree by name."""
    config = tools.tiny()
    plain = initialised(config)
    biased = initialised(tools.tiny(qkv_bias=True, qk_norm=True))
    assert all(torch.equal(plain[name], biased[name]) for name in plain) and len(biased) > len(plain)
    local = initialised(tools.tiny("local"))
    assert all(torch.equal(plain[name], value) for name, value in local.items())

    reverse = Transformer(config)
    for module in reverse.modules():
        module._modules = dict(reversed(module._modules.items()))
    names = [name for name, _ in reverse.named_parameters()]
    assert sorted(names) == sorted(plain) and names[0] == "head.weight"
    initialise(reverse, config, 0)
    assert all(torch.equal(plain[name], value) for name, value in values(reverse).items())


def test_another_seed_or_name_gives_other_values(tools):
    first, second = initialised(tools.tiny(), 0), initialised(tools.tiny(), 1)
    matrices = [name for name, value in first.items() if value.dim() > 1]
    assert not any(torch.equal(first[name], second[name]) for name in matrices)
    assert not torch.equal(
        first["layers.0.attention.projections.linear_q.weight"], first["layers.1.attention.projections.linear_q.weight"]
    )
    assert not torch.equal(
        first["layers.0.attention.projections.linear_k.weight"], first["layers.0.attention.projections.linear_v.weight"]
    )


def test_kinds_of_values(tools):
    config = tools.tiny(
        hidden_size=128,
        ffn_size=256,
        num_heads=4,
        vocab_size=512,
        qkv_bias=True,
        qk_norm=True,
        attention=InfiniConfig(segment_tokens=8, gate_init=-1.5, conv_tokens=4),
    )
    found = initialised(config)
    for name, value in found.items():
        owner, kind = name.split(".")[-2:]
        if kind == "gate":
            assert (value == -1.5).all()
        elif kind == "bias":
            assert not value.any()
        elif kind == "conv":
            assert value.shape == (4, 128) and value.std().item() == pytest.approx(0.5, rel=0.08)
        elif value.dim() == 1:
            assert (value == 1).all(), name
        else:
            expected = 0.02 if owner in ("embedding", "head") else value.shape[1] ** -0.5
            expected /= 2 if owner in ("linear_o", "linear_down") else 1  # sqrt(2 layers x 2)
            assert value.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(value.mean().item()) < 0.01, name


def test_init_std_sets_all_matrices(tools):
    found = initialised(tools.tiny(hidden_size=128, ffn_size=256, vocab_size=512, init_std=0.3))
    assert found["embedding.weight"].std().item() == pytest.approx(0.3, rel=0.03)
    assert found["layers.0.attention.projections.linear_q.weight"].std().item() == pytest.approx(0.3, rel=0.03)
    assert found["layers.1.feed_forward.linear_down.weight"].std().item() == pytest.approx(0.15, rel=0.03)
