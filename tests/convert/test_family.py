"""config.json against our model: names of all weights, fields of transformers 4 and 5, and what is refused by name."""

import pytest

from infini_train.config.errors import ConfigError
from infini_train.config.model import RopeScaling
from infini_train.convert.family import FAMILIES, describe_model, list_weights, parse_model
from infini_train.model.transformer import Transformer

LLAMA2 = {  # as older folders have it: no rope_theta, no key-value heads, a null scaling
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "pretraining_tp": 1,
}


def parse(**changes):
    return parse_model({**LLAMA2, **changes}, "config.json")


def test_what_is_left_out_has_their_defaults():
    model = parse()
    assert (model.kv_heads, model.key_dim, model.rope_theta, model.norm_eps) == (4, 8, 10_000.0, 1e-5)
    assert not model.tied_embeddings and not model.qk_norm and not model.qkv_bias and model.attention.kind == "full"


def test_the_base_of_the_rotary_embedding_is_found_in_both_places():
    assert parse(rope_theta=500_000.0).rope_theta == 500_000.0
    assert parse(rope_parameters={"rope_type": "default", "rope_theta": 1e6}).rope_theta == 1e6


def test_the_scaling_of_llama_3_1():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    model = parse(rope_theta=500_000.0, rope_scaling=scaling, num_key_value_heads=2, head_dim=8)
    assert model.rope_scaling == RopeScaling(factor=8.0) and model.rope_theta == 500_000.0
    assert describe_model(model)["rope_scaling"] == scaling
    assert parse_model(describe_model(model), "again") == model


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_table_names_every_weight(kind, tied, process_groups):
    model = parse(model_type=kind, tie_word_embeddings=tied, num_key_value_heads=2, head_dim=6, sliding_window=None)
    ours = {name: tuple(weight.shape) for name, weight in Transformer(model).named_parameters()}
    assert ours == {name: weight.shape for name, weight in list_weights(model).items()}
    described = describe_model(model)
    assert parse_model(described, "again") == model
    assert described["model_type"] == ("llama" if kind == "mistral" else kind)  # without windows they are one


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model_type": "gemma"},
            "model_type: gemma can't be imported; those that can are llama, mistral, qwen2, ",
        ),
        ({"model_type": ["llama"]}, "model_type: ['llama'] can't be imported"),
        ({"rope_scaling": "llama3"}, "rope_scaling: must be an object, not llama3"),
        ({"attention_bias": True}, "attention_bias: True asks for biases in all four projections of the attention"),
        ({"mlp_bias": True}, "mlp_bias: True asks for biases in the feed-forward"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu asks for another activation than SwiGLU's"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: {'bits': 4} asks for quantised weights"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: rotary embedding scaled in the way of"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling.low_freq_factor: must be a number",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: rotary embedding scaled in the way of yarn"),
        ({"model_type": "mistral"}, "sliding_window: 4096: attention in a sliding window is not known here"),
        ({"model_type": "mistral", "use_sliding_window": False}, "sliding_window: 4096: attention in a sliding window"),
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True}, "sliding_window: 32: attention in"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: sliding_attention is not known here"),
        ({"hidden_size": None}, "hidden_size: must be a positive number, not None"),
        ({"rms_norm_eps": None}, "rms_norm_eps: must be a number, not None"),
    ],
)
def test_what_can_not_be_represented_is_refused(changes, line):
    with pytest.raises(ConfigError) as refused:
        parse(**changes)
    assert str(refused.value).startswith(f"config.json: {line}")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"value_head_dim": 12}, "model.value_head_dim: 12: there, values have the size of keys"),
        ({"qk_norm": True, "qkv_bias": True}, "model.qk_norm: no model type there has it together with model.qkv_bias"),
    ],
)
def test_what_they_can_not_represent_is_refused(changes, line, tiny):
    with pytest.raises(ConfigError) as refused:
        describe_model(tiny(**changes))
    assert str(refused.value) == line
