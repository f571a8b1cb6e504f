"""Tiny random models in Hugging Face's layout, saved by transformers itself."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "initializer_range": 0.3,  # large weights: every part matters
}


def save_model(folder: Path, kind: str = "llama", dtype: str = "float32", shard: str = "5GB", **changes: object):
    """A random model, written by save_pretrained; returns it."""
    import torch

    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **changes})
    make = transformers.AutoModelForCausalLM.from_config
    model = make(config, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms neither ones, nor biases zeros
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def save_tokenizer(folder: Path) -> None:
    """A tokenizer.json of all bytes with <s> 0 and </s> 1, and what models have beside it."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=262, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    model.train_from_iterator(["a text"], trainer)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')


@pytest.fixture
def save_text_files() -> Callable[[Path], None]:
    return save_tokenizer


@pytest.fixture
def save() -> Callable[..., object]:
    return save_model


@pytest.fixture
def edit() -> Callable[..., None]:
    """Changes fields of a folder's config.json; None takes one away."""

    def change(folder: Path, **fields: object) -> None:
        tree = json.loads((folder / "config.json").read_text())
        tree = {name: value for name, value in {**tree, **fields}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(tree))

    return change
