"""What Hugging Face's Llama, Mistral, Qwen2 and Qwen3 call what our model has. Imports no torch.

Legend: V vocabulary, D hidden size, F inner size of the feed-forward, H query heads, K key-value heads.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from infini_train.config.attention import FullConfig
from infini_train.config.errors import ConfigError
from infini_train.config.model import ModelConfig, RopeScaling

Tree = Mapping[str, Any]


class Family(NamedTuple):
    """A model type: a Llama with or without two options."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
}
SIZES = {  # theirs -> ours
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_size",
}
ORIGINAL = "original_max_position_embeddings"
SCALING = {  # of rope_type llama3: theirs -> ours
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    ORIGINAL: "original_tokens",
}
ONE_VALUE = {  # of fields that may be left out: the only value there is here, and what another one would ask for
    "hidden_act": ("silu", "another activation than SwiGLU's"),
    "attention_bias": (False, "biases in all four projections of the attention"),
    "mlp_bias": (False, "biases in the feed-forward"),
    "partial_rotary_factor": (1.0, "rotary embedding of a part of the head"),
    "quantization_config": (None, "quantised weights; take the model in bf16"),
}


class Weight(NamedTuple):
    """A tensor that both sides have, in the same layout."""

    theirs: str
    shape: tuple[int, ...]


def parse_model(tree: Tree, source: str) -> ModelConfig:
    """The model that a config.json describes, with full attention.

    Args:
        tree: the values of config.json.
        source: names the file in a message.

    Raises:
        ConfigError: a model that this one can't be made equal to; the message names the field.
    """

    def refuse(field: str, problem: str) -> ConfigError:
        return ConfigError(f"{source}: {field}: {problem}")

    kind = tree.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise refuse("model_type", f"{kind} can't be imported; those that can are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    for field, (value, other) in ONE_VALUE.items():
        if tree.get(field, value) != value:
            raise refuse(field, f"{tree[field]} asks for {other}, which this model doesn't have")
    _check_windows(tree, refuse)
    sizes = {}
    for theirs, ours in {**SIZES, "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim"}.items():
        value = tree.get(theirs)
        if value is None and theirs not in SIZES:
            continue
        if not isinstance(value, int) or value <= 0:
            raise refuse(theirs, f"must be a positive number, not {value}")
        sizes[ours] = value
    eps = tree.get("rms_norm_eps")
    if not isinstance(eps, float | int):
        raise refuse("rms_norm_eps", f"must be a number, not {eps}")
    theta, scaling = _parse_rope(tree, refuse)
    return ModelConfig(
        **sizes,
        attention=FullConfig(),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(eps),
        tied_embeddings=bool(tree.get("tie_word_embeddings", False)),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
    )


def _check_windows(tree: Tree, refuse: Any) -> None:
    """Sliding windows are off: none is given, or a switch says so, which Qwen's types alone have."""
    kind = tree["model_type"]
    window = tree.get("sliding_window", 4096 if kind == "mistral" else None)
    if window is not None and (not kind.startswith("qwen") or tree.get("use_sliding_window", False)):
        raise refuse("sliding_window", f"{window}: attention in a sliding window is not known here")
    other = [kind for kind in tree.get("layer_types") or () if kind != "full_attention"]
    if other:
        raise refuse("layer_types", f"{other[0]} is not known here; all layers must have full_attention")


def _parse_rope(tree: Tree, refuse: Any) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from the fields of transformers 5 or 4."""
    field = "rope_parameters" if tree.get("rope_parameters") else "rope_scaling"
    rope = tree.get(field) or {}
    if not isinstance(rope, Mapping):
        raise refuse(field, f"must be an object, not {rope}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise refuse(field, f"rotary embedding scaled in the way of {kind} is not known here; only that of llama3 is")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse(field, "rotary embedding of a part of the head is not known here")
    values = {"rope_theta": rope.get("rope_theta", tree.get("rope_theta", 10_000.0))}
    if kind == "llama3":
        values |= {name: rope.get(name) for name in SCALING}
    for name, value in values.items():
        if not isinstance(value, float | int):
            raise refuse(name if name == "rope_theta" else f"{field}.{name}", f"must be a number, not {value}")
    theta = float(values.pop("rope_theta"))
    if not values:
        return theta, None
    factors = {ours: float(values[theirs]) for theirs, ours in SCALING.items() if theirs != ORIGINAL}
    return theta, RopeScaling(**factors, original_tokens=int(values[ORIGINAL]))


def describe_model(model: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, whatever its attention; in the fields that transformers 4 and 5 read.

    Raises:
        ConfigError: no model type has what this model has.
    """
    if model.value_dim != model.key_dim:
        raise ConfigError(f"model.value_head_dim: {model.value_dim}: there, values have the size of keys")
    if model.qk_norm and model.qkv_bias:
        raise ConfigError("model.qk_norm: no model type there has it together with model.qkv_bias")
    wanted, scaling = (model.qkv_bias, model.qk_norm), model.rope_scaling
    kind = next(name for name, family in FAMILIES.items() if (family.qkv_bias, family.qk_norm) == wanted)
    return {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        **{theirs: getattr(model, ours) for theirs, ours in SIZES.items()},
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.key_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {"rope_type": "llama3", **{theirs: getattr(scaling, ours) for theirs, ours in SCALING.items()}},
        "tie_word_embeddings": model.tied_embeddings,
    }


def list_weights(model: ModelConfig) -> dict[str, Weight]:
    """Our names of the weights that both sides have, in the order of the layers; gates and memory tokens are ours."""
    hidden, ffn = model.hidden_size, model.ffn_size
    q, kv = model.num_heads * model.key_dim, model.kv_heads * model.key_dim
    outputs = {"q": q, "k": kv, "v": kv}
    layer = {"norm_attention.weight": Weight("input_layernorm.weight", (hidden,))}
    for name, size in outputs.items():
        layer[f"attention.projections.linear_{name}.weight"] = Weight(f"self_attn.{name}_proj.weight", (size, hidden))
        if model.qkv_bias:
            layer[f"attention.projections.linear_{name}.bias"] = Weight(f"self_attn.{name}_proj.bias", (size,))
    layer["attention.projections.linear_o.weight"] = Weight("self_attn.o_proj.weight", (hidden, q))
    if model.qk_norm:
        for name in ("q", "k"):
            weight = Weight(f"self_attn.{name}_norm.weight", (model.key_dim,))
            layer[f"attention.projections.norm_{name}.weight"] = weight
    layer["norm_feed_forward.weight"] = Weight("post_attention_layernorm.weight", (hidden,))
    for name in ("gate", "up"):
        layer[f"feed_forward.linear_{name}.weight"] = Weight(f"mlp.{name}_proj.weight", (ffn, hidden))
    layer["feed_forward.linear_down.weight"] = Weight("mlp.down_proj.weight", (hidden, ffn))
    table = {"embedding.weight": Weight("model.embed_tokens.weight", (model.vocab_size, hidden))}
    for number in range(model.num_layers):
        for ours, (theirs, shape) in layer.items():
            table[f"layers.{number}.{ours}"] = Weight(f"model.layers.{number}.{theirs}", shape)
    table["norm_final.weight"] = Weight("model.norm.weight", (hidden,))
    if not model.tied_embeddings:
        table["head.weight"] = Weight("lm_head.weight", (model.vocab_size, hidden))
    return table
