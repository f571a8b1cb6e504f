"""Any field of a config.json: what transformers computes with it, or refused by its name, or told. Never in silence."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infini_train.config.errors import ConfigError
from infini_train.convert.family import FAMILIES, list_weights, parse_model
from infini_train.convert.fields import ONE_VALUE, note_fields
from infini_train.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

BASE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "sliding_window": None,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 100.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CHANGED = {  # a value for every field of transformers' configs; `test_every_field_has_a_value` asks for new ones
    "vocab_size": 44,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "hidden_act": "gelu",
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "rms_norm_eps": 0.5,
    "use_cache": False,
    "pad_token_id": 3,
    "bos_token_id": 4,
    "eos_token_id": [1, 5],
    "pretraining_tp": 2,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    "attention_bias": True,
    "attention_dropout": 0.5,
    "mlp_bias": True,
    "sliding_window": 3,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"],
    "transformers_version": "4.40.0",
    "architectures": ["LlamaForSequenceClassification"],
    "output_hidden_states": True,
    "return_dict": True,  # false ends transformers itself with an error
    "dtype": "float16",
    "chunk_size_feed_forward": 4,
    "is_encoder_decoder": True,
    "id2label": {"0": "a", "1": "b"},
    "label2id": {"a": 0, "b": 1},
    "problem_type": "regression",
}
OTHERS = [  # fields together, and what transformers takes from outside of its classes
    {"per_layer_config": {"1": {"intermediate_size": 40}}},
    {"is_causal": False},
    {"tie_word_embeddings": "false"},
    {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": None},
    {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["full_attention"] * 2},
    {"sliding_window": 3, "use_sliding_window": False},
    {"hidden_act": "swish"},
    {"quantization_config": {"quant_method": "fp8"}},
    {"attn_logit_softcapping": 1.0},
    {"final_logit_softcapping": 2.0},
    {"logit_scale": 0.1},
    {"num_experts": 4},
    {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}},
]
ROPES = [
    {"rope_theta": 50.0},
    {"rope_theta": None},
    {"rope_theta": 50.0, "rope_parameters": {"rope_type": "default"}},
    {"rope_theta": 50.0, "rope_parameters": {"rope_type": "default", "rope_theta": 70.0}},
    {"rope_theta": 50.0, "rope_scaling": None, "rope_parameters": LLAMA3},
    {"rope_theta": 50.0, "rope_scaling": {}, "rope_parameters": LLAMA3},
    {"rope_parameters": LLAMA3},
    {"rope_parameters": {**LLAMA3, "type": "llama3"}},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3},
    {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
    {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 70.0}},
    {"rope_scaling": {"rope_type": "default"}, "rope_parameters": LLAMA3},
    {"rope_scaling": {**LLAMA3, "rope_theta": None}, "rope_theta": 50.0},
    {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}, "rope_theta": 50.0},
    {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}, "rope_parameters": {"rope_theta": 70.0}},
    {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32.5}},
    {"rope_scaling": {**LLAMA3, "factor": "8"}},
    {"rope_scaling": {**LLAMA3, "attention_factor": 2.0}},
    {"rope_scaling": YARN},
    {"rope_scaling": {**YARN, "attention_factor": 0.5}},
    {"rope_parameters": {**YARN, "rope_theta": 50.0}},
    {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 70.0}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "longrope", "short_factor": [2.0] * 4, "long_factor": [3.0] * 4}},
    {"rope_scaling": {"rope_type": "proportional", "partial_rotary_factor": 0.5}},
    {"rope_scaling": {"factor": 2.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5}},
    {"partial_rotary_factor": 0.5},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 50.0}}},
    {"layer_types": ["full_attention"] * 2, "rope_parameters": {"full_attention": {**LLAMA3}}},
    {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}},
]
TOKENS_BT = torch.randint(0, 40, (1, 24), generator=torch.Generator().manual_seed(1))


def fields_of(kind):
    return [field.name for field in dataclasses.fields(type(transformers.AutoConfig.for_model(kind)))]


def config_of(kind, changes):
    return {**BASE, "model_type": kind, "architectures": [FAMILIES[kind].architecture], **changes}


def build_theirs(tree):
    """A random model as transformers makes it of the values of a config.json."""
    torch.manual_seed(0)
    config = type(transformers.AutoConfig.for_model(tree["model_type"])).from_dict({**tree, "dtype": "float32"})
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def logits_with_our_code(model, theirs):
    weights = theirs.state_dict()
    built = Transformer(model)
    built.load_state_dict({ours: weights[weight.theirs] for ours, weight in list_weights(model).items()})
    grid = built.make_grids(torch.zeros(TOKENS_BT.shape, dtype=torch.bool), torch.ones(TOKENS_BT.shape), None)
    with torch.no_grad():
        return built.eval().logits(built.decode(TOKENS_BT, grid, None)[0]).transpose(0, 1)


def check_refused_or_equal(kind, changes):
    """Whether it was refused; if not, the logits are those of transformers."""
    tree = config_of(kind, changes)
    try:
        model = parse_model(tree, "config.json")
    except ConfigError as refused:
        assert any(field in str(refused) for field in (*changes, "rope_theta", "num_kv_heads")), refused
        return True
    theirs = build_theirs(tree)
    with torch.no_grad():
        expected = theirs(TOKENS_BT, return_dict=True).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(logits_with_our_code(model, theirs), expected, rtol=1e-4, atol=1e-4)
    return False


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_field_has_a_value(kind):
    """A new version of transformers may bring a field; then this program must learn what it means."""
    assert set(fields_of(kind)) <= set(CHANGED)


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_field_of_transformers_is_refused_or_computed(kind, process_groups):
    refused = {field for field in fields_of(kind) if check_refused_or_equal(kind, {field: CHANGED[field]})}
    always = {"hidden_act", "architectures", "is_encoder_decoder"}
    of_kind = {"llama": {"attention_bias", "mlp_bias"}, "mistral": {"sliding_window"}, "qwen2": {"layer_types"}}
    of_kind["qwen3"] = {"attention_bias", "layer_types"}
    assert refused == always | of_kind[kind]


@pytest.mark.parametrize("kind", FAMILIES)
def test_fields_together_and_from_elsewhere(kind, process_groups):
    for changes in OTHERS:
        check_refused_or_equal(kind, changes)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_every_spelling_of_a_rotary_embedding_is_refused_or_computed(kind, process_groups):
    taken = [number for number, changes in enumerate(ROPES) if not check_refused_or_equal(kind, changes)]
    assert taken == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 14, 18]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_scaling: rotary embedding scaled in the way of yarn is not known here; only that of llama3 is",
        ),
        (
            {
                "rope_scaling": {**LLAMA3, "rope_theta": 10_000.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            },
            "rope_scaling: replaces the whole of rope_parameters, and with it rope_theta 1000000.0; write all into one",
        ),
        (
            {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}},
            "rope_scaling: rope_type is default, but type linear; remove one",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters.full_attention: {'rope_type': 'default'} is not known here for rope_type default",
        ),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: must be a number, not nan"),
        ({"rope_theta": 10**400}, "rope_theta: must be a number, not 10000000000000000000000000000000"),
        ({"num_hidden_layers": True}, "num_hidden_layers: must be a positive number, not True"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: must be true or false, not no"),
        ({"layer_types": 5}, "layer_types: must name the kind of each of the 2 layers, not 5"),
        ({"is_causal": False}, "is_causal: False asks for attention to later tokens; it can't be imported"),
        ({"architectures": ["LlamaModel"]}, "architectures: ['LlamaModel'] can't be imported; those that can are"),
        ({"num_key_value_heads": 3}, "model.num_kv_heads: 3 key-value heads can't share 4 query heads evenly"),
    ],
)
def test_what_is_refused_is_named(changes, line):
    with pytest.raises(ConfigError) as refused:
        parse_model(config_of("llama", changes), "config.json")
    assert str(refused.value).startswith(f"config.json: {line}")


def test_nothing_is_told_of_smollm2_as_it_is_published():
    """HuggingFaceTB/SmolLM2-135M-Instruct."""
    tree = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "transformers_version": "4.42.3",
        "vocab_size": 49152,
    }  # fmt: skip
    assert parse_model(tree, "config.json").key_dim == 64
    assert note_fields(tree) == []


def test_what_is_not_known_is_told():
    tree = config_of("llama", {"my_switch": 3, "a_list": [], "off": False, "attention_dropout": 0.1, "head_dim": 8})
    assert note_fields(tree) == [
        "my_switch: 3: this field is not known here; if it changes what the model computes, that is lost",
        "attention_dropout: 0.1: training here has no dropout",
    ]


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([LLAMA3, YARN])
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*LLAMA3, "a"]), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, derandomize=True)
@given(
    kind=st.sampled_from(list(FAMILIES)),
    changes=st.dictionaries(st.sampled_from([*CHANGED, *ONE_VALUE, "rope_theta", "rope_scaling"]), VALUES, max_size=3),
)
def test_any_values_make_a_model_or_one_line(kind, changes):
    tree = config_of(kind, changes)
    try:
        parse_model(tree, "config.json")
        lines = note_fields(tree)
    except ConfigError as refused:
        lines = [str(refused).removeprefix("config.json: ")]
    assert all(len(line) < 400 and "\n" not in line for line in lines)
