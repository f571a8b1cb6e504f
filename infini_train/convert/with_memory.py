"""A model with its memory in Hugging Face's layout, beside a file of the code that runs it. Imports no torch.

config.json has the fields of this project's own config for the attention of each layer, by the names that
modeling_infini.py reads.
"""

import dataclasses
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

from infini_train.config.attention import InfiniConfig, MixedConfig
from infini_train.config.errors import ConfigError, naming
from infini_train.config.files import to_tree, validate_model
from infini_train.config.model import ModelConfig
from infini_train.config.variant import AttentionVariant
from infini_train.convert.family import list_weights
from infini_train.convert.names import SIZES, Weight

MODEL_TYPE = "infini"
CODE = "modeling_infini.py"
KINDS = ("infini", "local", "transformer_xl", "full")  # that the code there has
SAME_NAMES = ("head_dim", "value_head_dim", "qkv_bias", "qk_norm")  # fields that both sides call the same


def read_code() -> str:
    """The file of code that stands beside the weights."""
    return (resources.files("infini_train.convert") / CODE).read_text(encoding="utf-8")


def describe_with_memory(model: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, its memory included.

    Raises:
        ConfigError: the code there has not this kind of attention.
    """
    attention = model.attention
    variants = attention.variants if isinstance(attention, MixedConfig) else {attention.kind: attention}
    pattern = attention.pattern if isinstance(attention, MixedConfig) else (attention.kind,)
    for variant in variants.values():
        if variant.kind not in KINDS:
            raise ConfigError(
                f"model.attention.kind: {variant.kind} is no attention that the exported code has: {', '.join(KINDS)}"
            )
    rope = {"theta": model.rope_theta}
    if model.rope_scaling is not None:
        rope |= dataclasses.asdict(model.rope_scaling)
    return {
        "architectures": ["InfiniForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "modeling_infini.InfiniConfig",
            "AutoModel": "modeling_infini.InfiniModel",
            "AutoModelForCausalLM": "modeling_infini.InfiniForCausalLM",
        },
        **{theirs: getattr(model, ours) for theirs, ours in SIZES.items()},
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.key_dim,
        "value_head_dim": model.value_dim,
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        "rms_norm_eps": model.norm_eps,
        "rope": rope,
        "attentions": {name: _fields(variant) for name, variant in variants.items()},
        "pattern": list(pattern),
        "tie_word_embeddings": model.tied_embeddings,
    }


def _fields(variant: AttentionVariant) -> dict[str, Any]:
    """What an attention computes; not how its parameters began."""
    return {name: value for name, value in to_tree(variant).items() if name not in variant.initial}


def parse_with_memory(tree: Mapping[str, Any], source: str) -> ModelConfig:
    """The model that such a config.json describes.

    Raises:
        ConfigError: it can't be read; the message names the file.
    """
    with naming(source):
        for field in (*SIZES, "num_key_value_heads", *SAME_NAMES, "rms_norm_eps", "rope", "attentions", "pattern"):
            if field not in tree:
                raise ConfigError(f"{field}: is missing")
        rope, attentions, pattern = tree["rope"], tree["attentions"], tree["pattern"]
        if not isinstance(rope, Mapping) or not isinstance(attentions, Mapping) or not isinstance(pattern, list):
            raise ConfigError("rope and attentions must be objects, pattern a list")
        if not pattern or not all(isinstance(name, str) and name in attentions for name in pattern):
            raise ConfigError("pattern: must name attentions, at least one")
        for name, each in attentions.items():
            kind = each.get("kind") if isinstance(each, Mapping) else None
            if kind not in KINDS:
                raise ConfigError(f"attentions: {name!r} must have a kind of {', '.join(KINDS)}, not {kind!r}")
        if "theta" not in rope:
            raise ConfigError("rope: theta is missing")
        scaling = {name: value for name, value in rope.items() if name != "theta"}
        if len(attentions) == 1:
            attention = next(iter(attentions.values()))
        else:
            attention = {"kind": "mixed", "variants": dict(attentions), "pattern": pattern}
        model = {
            **{ours: tree[theirs] for theirs, ours in SIZES.items()},
            "num_kv_heads": tree["num_key_value_heads"],
            **{name: tree[name] for name in SAME_NAMES},
            "attention": attention,
            "rope_theta": rope["theta"],
            "rope_scaling": scaling or None,
            "norm_eps": tree["rms_norm_eps"],
            "tied_embeddings": tree.get("tie_word_embeddings", False),
        }
        sizes = [each.get("segment_tokens") for each in attentions.values()]
        window = math.lcm(*(size for size in sizes if isinstance(size, int) and size > 0))
        return validate_model({"model": model}, window)


def whole_segments(model: ModelConfig) -> int:
    """The shortest window that all layers cut into whole segments; 0 where none has segments."""
    sizes = {layer.segment_tokens for layer in model.layers} - {None}
    return math.lcm(*sizes) if sizes else 0


def list_all_weights(model: ModelConfig) -> dict[str, Weight]:
    """Our names of all weights of a model that `describe_with_memory` can describe."""
    return {**list_weights(model), **list_memory_weights(model)}


def list_memory_weights(model: ModelConfig) -> dict[str, Weight]:
    """Our names of the weights that a model has beside Llama's, layer by layer."""
    table = {}
    for number, attention in enumerate(model.layers):
        if isinstance(attention, InfiniConfig):
            for name, shape in _weights_of(attention, model).items():
                ours, theirs = f"layers.{number}.attention.{name}", f"model.layers.{number}.self_attn.{name}"
                table[ours] = Weight(theirs, shape)
    return table


def _weights_of(attention: InfiniConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    heads, kv_heads, key, value = model.num_heads, model.kv_heads, model.key_dim, model.value_dim
    weights: dict[str, tuple[int, ...]] = {"gate": (heads,)}
    if attention.gate == "query":
        weights["gate_query"] = (heads, key)
    if attention.conv_tokens:
        weights["conv"] = (attention.conv_tokens, model.hidden_size)
    if attention.maps:
        weights |= {"maps.query": (heads, key, key), "maps.key": (kv_heads, key, key)}
        weights["maps.read"] = (heads, value, value)
    if attention.read_norm:
        weights["norm_read.weight"] = (value,)
    if attention.update == "gated_delta":
        for name in ("linear_strength", "linear_decay"):
            weights |= {f"{name}.weight": (kv_heads, model.hidden_size), f"{name}.bias": (kv_heads,)}
    return weights
