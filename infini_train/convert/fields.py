"""Fields of a config.json: those that are read, refused unless they say nothing, or without effect. Imports no torch.

A model is imported only if this program computes what transformers computes with it. So no field is passed over in
silence: one that neither side knows is told.
"""

from collections.abc import Mapping
from typing import Any

from infini_train.config.errors import ConfigError

READ = frozenset({  # by `family.parse_model`, or by the import
    "model_type", "architectures", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "intermediate_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "rope_theta",
    "rope_scaling", "rope_parameters", "original_max_position_embeddings", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "max_position_embeddings", "eos_token_id",
})  # fmt: skip
NOTHING: tuple[Any, ...] = (None, False)
_BIASES, _EXPERTS = "biases that this model doesn't have", "experts, which this model doesn't have"
_SCALES, _CUT = (
    "numbers scaled on the way, which this model doesn't do",
    "capped numbers, which this model doesn't have",
)
ONE_VALUE: dict[str, tuple[tuple[Any, ...], str]] = {  # the values that mean nothing, and what any other one asks for
    "hidden_act": (("silu", "swish"), "another activation than SwiGLU's"),
    "attention_bias": ((False,), "biases in all four projections of the attention"),
    "mlp_bias": ((False,), "biases in the feed-forward"),
    "partial_rotary_factor": ((1.0,), "rotary embedding of a part of the head"),
    "quantization_config": ((None,), "quantised weights; take the model in bf16"),
    "compression_config": ((None,), "quantised weights; take the model in bf16"),
    "auto_map": ((None, {}), "code of the model's own, which is never run"),
    "per_layer_config": ((None, {}), "layers that differ from each other"),
    "is_causal": ((True,), "attention to later tokens"),
    "is_encoder_decoder": ((False, None), "an encoder"),
    "add_cross_attention": ((False, None), "attention to an encoder"),
    "pruned_heads": ((None, {}), "layers without some of their heads"),
    "attention_chunk_size": (NOTHING, "attention in chunks"),
    "no_rope_layers": ((None, []), "layers without rotary embedding"),
    "no_rope_layer_interval": (NOTHING, "layers without rotary embedding"),
    "attn_logit_softcapping": (NOTHING, _CUT),
    "final_logit_softcapping": (NOTHING, _CUT),
    "clip_qkv": (NOTHING, _CUT),
    "qkv_clip": (NOTHING, _CUT),
    "logit_scale": ((None, False, 1.0), _SCALES),
    "logits_scaling": ((None, False, 1.0), _SCALES),
    "embedding_multiplier": ((None, False, 1.0), _SCALES),
    "residual_multiplier": ((None, False, 1.0), _SCALES),
    "attention_multiplier": (NOTHING, _SCALES),
    "query_pre_attn_scalar": (NOTHING, _SCALES),
    "scale_emb": ((None, False, 1.0), _SCALES),
    "scale_depth": (NOTHING, _SCALES),
    "use_parallel_residual": (NOTHING, "attention beside the feed-forward"),
    "attention_out_bias": (NOTHING, _BIASES),
    "o_bias": (NOTHING, _BIASES),
    "lm_head_bias": (NOTHING, _BIASES),
    "num_experts": ((None, False, 0), _EXPERTS),
    "num_local_experts": ((None, False, 0), _EXPERTS),
    "n_routed_experts": ((None, False, 0), _EXPERTS),
    "num_experts_per_tok": ((None, False, 0), _EXPERTS),
}
WITHOUT_EFFECT = frozenset({  # on what a model computes for a text
    "_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "initializer_range", "pretraining_tp", "attention_dropout", "bos_token_id", "pad_token_id", "unk_token_id",
    "sep_token_id", "decoder_start_token_id", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "task_specific_params", "output_attentions", "output_hidden_states", "return_dict",
    "use_return_dict", "chunk_size_feed_forward", "is_decoder", "cross_attention_hidden_size",
    "tie_encoder_decoder", "tie_last_hidden_states", "torchscript", "use_bfloat16", "tokenizer_class", "prefix",
    "tf_legacy_loss", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "experts_implementation", "_commit_hash", "_flash_attn_2_enabled", "classifier_dropout", "hidden_dropout",
    "unsloth_version", "unsloth_fixed", "model_name", "max_sequence_length",
    "is_llama_config", "transformers.js_config",  # of SmolLM2
    # settings of generation that older folders have here
    "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens",
    "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "target_lookbehind",
    "temperature", "top_k", "top_p", "typical_p",
})  # fmt: skip


def check_fields(tree: Mapping[str, Any]) -> None:
    """Refuses fields of a config.json that ask for what our model doesn't have.

    Raises:
        ConfigError: one asks for another model; the message begins with its name.
    """
    for field, (values, other) in ONE_VALUE.items():
        if field in tree and tree[field] not in values:
            raise ConfigError(f"{field}: {show(tree[field])} asks for {other}; it can't be imported")


def note_fields(tree: Mapping[str, Any]) -> list[str]:
    """Lines about fields of a config.json that are not known, or that matter to training alone."""
    known = READ | ONE_VALUE.keys() | WITHOUT_EFFECT
    notes = [
        f"{field}: {show(value)}: this field is not known here; if it changes what the model computes, that is lost"
        for field, value in tree.items()
        if field not in known and value not in (None, False, [], {})
    ]
    if tree.get("attention_dropout"):
        notes.append(f"attention_dropout: {show(tree['attention_dropout'])}: training here has no dropout")
    return notes


def show(value: Any) -> str:
    """A value of any size and kind, for a line."""
    text = str(value) if str(value).isprintable() else ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
