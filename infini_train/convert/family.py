"""What Hugging Face's Llama, Mistral, Qwen2 and Qwen3 call what our model has. Imports no torch.

Legend: V vocabulary, D hidden size, F inner size of the feed-forward, H query heads, K key-value heads.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from infini_train.config.attention import FullConfig
from infini_train.config.errors import ConfigError, naming
from infini_train.config.model import ModelConfig, RopeScaling
from infini_train.convert.fields import check_fields, show
from infini_train.convert.names import SIZES, Weight

Tree = Mapping[str, Any]


class Family(NamedTuple):
    """A model type: a Llama with or without two options."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: Mapping[str, int] = {}  # sizes, where config.json leaves them out


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", defaults={"num_key_value_heads": 8}),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, defaults={"num_key_value_heads": 32}),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, defaults={"num_key_value_heads": 32, "head_dim": 128}),
}
ORIGINAL = "original_max_position_embeddings"
SCALING = {  # of rope_type llama3: theirs -> ours
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    ORIGINAL: "original_tokens",
}
ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
SLIDING_WINDOW = 4096  # of Mistral's and Qwen's types, where sliding_window is left out


def parse_model(tree: Tree, source: str) -> ModelConfig:
    """The model that a config.json describes, with full attention.

    Args:
        tree: the values of config.json.
        source: names the file in a message.

    Raises:
        ConfigError: a model that this one can't be made equal to; the message names the field.
    """
    with naming(source):
        kind = tree.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise _refuse("model_type", f"{show(kind)} can't be imported; those that can are {', '.join(FAMILIES)}")
        family = FAMILIES[kind]
        check_fields(tree)
        _check_architecture(tree.get("architectures"))
        tied = tree.get("tie_word_embeddings")
        tied = False if tied is None else tied  # as transformers reads null
        if not isinstance(tied, bool):
            raise _refuse("tie_word_embeddings", f"must be true or false, not {show(tied)}")
        sizes = {ours: _positive(theirs, tree.get(theirs)) for theirs, ours in SIZES.items()}
        _check_windows(tree, sizes["num_layers"])
        for theirs, ours in {"num_key_value_heads": "num_kv_heads", "head_dim": "head_dim"}.items():
            value = tree.get(theirs, family.defaults.get(theirs))
            if value is not None:
                sizes[ours] = _positive(theirs, value)
        eps = _number("rms_norm_eps", tree.get("rms_norm_eps", 1e-6))
        theta, scaling = _parse_rope(tree)
        return ModelConfig(
            **sizes,
            attention=FullConfig(),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=eps,
            tied_embeddings=tied,
            qk_norm=family.qk_norm,
            qkv_bias=family.qkv_bias,
        )


def _refuse(field: str, problem: str) -> ConfigError:
    return ConfigError(f"{field}: {problem}")


def _positive(field: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise _refuse(field, f"must be a positive number, not {show(value)}")
    return value


def _number(field: str, value: Any) -> float:
    if type(value) not in (float, int) or not abs(value) < 1e300:
        raise _refuse(field, f"must be a number, not {show(value)}")
    return float(value)


def _check_architecture(named: Any) -> None:
    """That it is a language model, without code of its own; which one, transformers too takes from model_type."""
    names = named if isinstance(named, list) else [named]
    known = [family.architecture for family in FAMILIES.values()]
    if named is not None and not {str(name).lower() for name in names} & {name.lower() for name in known}:
        raise _refuse("architectures", f"{show(named)} can't be imported; those that can are {', '.join(known)}")


def _check_windows(tree: Tree, num_layers: int) -> None:
    """Sliding windows are off: none is given, or a switch says so, which Qwen's types alone have."""
    kind = tree["model_type"]
    window = tree.get("sliding_window", None if kind == "llama" else SLIDING_WINDOW)
    layers = tree.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or len(layers) != num_layers):
        raise _refuse("layer_types", f"must name the kind of each of the {num_layers} layers, not {show(layers)}")
    other = [kind for kind in layers or () if kind != "full_attention"]
    if other:
        raise _refuse("layer_types", f"{show(other[0])} is not known here; all layers must have full_attention")
    if window is None:
        return
    if kind.startswith("qwen"):
        switch, full = tree.get("use_sliding_window", False), tree.get("max_window_layers", 0)
        if type(switch) is not bool or type(full) is not int:
            field = "max_window_layers" if type(switch) is bool else "use_sliding_window"
            raise _refuse(field, f"{show(tree.get(field))} can't be understood")
        if not switch or layers is not None or full >= num_layers:
            return
    raise _refuse("sliding_window", f"{show(window)}: attention in a sliding window is not known here")


def _parse_rope(tree: Tree) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from the fields of transformers 5 or 4.

    As in transformers 5, rope_scaling replaces the whole of rope_parameters, and a rope_theta outside counts where
    there is none inside.
    """
    for field in ("rope_parameters", "rope_scaling"):
        if not isinstance(tree.get(field) or {}, Mapping):
            raise _refuse(field, f"must be an object, not {show(tree[field])}")
    parameters, scaling = tree.get("rope_parameters") or {}, tree.get("rope_scaling") or {}
    field, rope = ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters)
    theta = rope.get("rope_theta", tree.get("rope_theta", 10_000.0))
    kind = _rope_kind(field, rope)
    if scaling:
        _check_replaced(parameters, {**rope, "rope_theta": theta}, kind)
    known = {*ROPE_KEYS, *(SCALING if kind == "llama3" else ())}
    for name, value in rope.items():
        if name not in known and value is not None:
            raise _refuse(f"{field}.{name}", f"{show(value)} is not known here for rope_type {kind}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refuse(field, "rotary embedding of a part of the head is not known here")
    base = _number("rope_theta", theta)
    if kind == "default":
        return base, None
    values = {ours: _number(f"{field}.{theirs}", rope.get(theirs)) for theirs, ours in SCALING.items()}
    original, outside = values["original_tokens"], tree.get(ORIGINAL)
    if not original.is_integer() or outside not in (None, original):
        raise _refuse(f"{field}.{ORIGINAL}", f"must be a whole number, and the same as outside, not {show(original)}")
    return base, RopeScaling(**{**values, "original_tokens": int(original)})


def _check_replaced(parameters: Tree, rope: Tree, kind: str) -> None:
    """That nothing is lost where rope_scaling replaces the whole of rope_parameters."""
    lost = [name for name, value in parameters.items() if name not in ("rope_type", "type") and rope.get(name) != value]
    if _rope_kind("rope_parameters", parameters) not in ("default", kind):
        lost.append("rope_type")
    if lost:
        raise _refuse(
            "rope_scaling",
            f"replaces the whole of rope_parameters, and with it {lost[0]} {show(parameters.get(lost[0]))};"
            " write all into one of the two, and remove the other",
        )


def _rope_kind(field: str, rope: Tree) -> str:
    """Its rope_type, in either spelling: default or llama3."""
    kinds = [rope[name] for name in ("rope_type", "type") if name in rope]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise _refuse(field, f"rope_type is {show(kinds[0])}, but type {show(kinds[1])}; remove one")
    kind = kinds[0] if kinds else "default"
    if kind not in ("default", "llama3"):
        problem = f"rotary embedding scaled in the way of {show(kind)} is not known here; only that of llama3 is"
        raise _refuse(field, problem)
    return str(kind)


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
    """Our names of the weights that a plain model has too, in the order of the layers; gates and the like are ours."""
    hidden, ffn = model.hidden_size, model.ffn_size
    outputs = {"q": model.num_heads * model.key_dim, "k": model.kv_heads * model.key_dim}
    outputs["v"] = model.kv_heads * model.value_dim
    layer = {"norm_attention.weight": Weight("input_layernorm.weight", (hidden,))}
    for name, size in outputs.items():
        layer[f"attention.projections.linear_{name}.weight"] = Weight(f"self_attn.{name}_proj.weight", (size, hidden))
        if model.qkv_bias:
            layer[f"attention.projections.linear_{name}.bias"] = Weight(f"self_attn.{name}_proj.bias", (size,))
    layer["attention.projections.linear_o.weight"] = Weight(
        "self_attn.o_proj.weight", (hidden, model.num_heads * model.value_dim)
    )
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
