"""Parts of the attention left out: equal to what the part's absence means, in all layers or in one."""

import pytest
import torch

from infini_train.config.errors import ConfigError
from infini_train.model.ablation import Part, leave_out, leaving_out, parse_parts

TOKENS = 24


def decode(model):
    tokens_BT = torch.arange(2 * TOKENS).view(2, TOKENS) % 40
    starts_BT, weights_BT = torch.zeros(2, TOKENS, dtype=torch.bool), torch.ones(2, TOKENS)
    starts_BT[:, 0] = True
    with torch.no_grad():
        return model.decode(tokens_BT, model.make_grids(starts_BT, weights_BT, None), None)


@pytest.mark.parametrize("variant", ["linear", "delta-overlap-conv", "gated", "gated-token", "mixed"])
def test_without_memory_a_model_is_one_whose_gates_are_shut(tools, variant):
    model, twin = tools.build(tools.tiny(variant)), tools.build(tools.tiny(variant))
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith("attention.gate"):
                parameter.fill_(-200.0)
            if name.endswith("gate_query"):
                parameter.zero_()
    plain, state = decode(model)
    with leaving_out([model], [Part("memory")]):
        found, found_state = decode(model)
    torch.testing.assert_close(found, decode(twin)[0], rtol=1e-5, atol=1e-5)
    assert (found - plain).abs().max() > 1e-2
    # it is still written; only the first layer's input is the same
    torch.testing.assert_close(found_state[0].memory.memory_BKDE, state[0].memory.memory_BKDE)
    assert torch.equal(decode(model)[0], plain), "after the block all is as before"


def test_without_local_a_model_is_one_whose_gates_are_open_where_there_is_a_memory(tools):
    model, twin = tools.build(tools.tiny("linear")), tools.build(tools.tiny("linear"))
    with torch.no_grad():
        for m in (model, twin):
            for name, parameter in m.named_parameters():
                if name.endswith("attention.gate"):
                    parameter.fill_(200.0)
    (plain, _), segment = decode(twin), 8
    leave_out(model, [Part("local")])
    found, _ = decode(model)
    assert (found[:segment] - plain[:segment]).abs().max() > 1e-2, (
        "the first segment has nothing but its local attention"
    )
    leave_out(model, [Part("memory")])
    nothing, _ = decode(model)
    assert not torch.allclose(nothing[segment:], found[segment:])


def test_without_convolution_its_weights_are_zero(tools):
    model, twin = tools.build(tools.tiny("linear-conv")), tools.build(tools.tiny("linear-conv"))
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith("attention.conv"):
                parameter.zero_()
    leave_out(model, [Part("convolution")])
    assert torch.equal(decode(model)[0], decode(twin)[0])


def test_one_layer_alone(tools):
    model = tools.build(tools.tiny("linear"))
    leave_out(model, parse_parts(["memory:1"]))
    assert [sorted(layer.attention.left_out) for layer in model.layers.values()] == [[], ["memory"]]


@pytest.mark.parametrize(
    ("variant", "part", "message"),
    [
        ("full", "memory", "memory: the model has no such part; what can be left out: nothing"),
        ("linear", "convolution", "convolution: the model has no such part; what can be left out: memory, local"),
        ("linear", "memory:7", "memory:7: the model has layers 0 to 1"),
        ("mixed", "memory:1", "memory: layer 1 has no such part; what can be left out: nothing"),
        ("linear", "memory:x", "memory:x: write a part, or a part and a layer, as in memory:3"),
    ],
)
def test_what_is_not_there_can_not_be_left_out(tools, variant, part, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        leave_out(tools.build(tools.tiny(variant)), parse_parts([part]))
