"""Tiny random models in Hugging Face's layout, saved by transformers itself."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from infini_train.config.model import ModelConfig
    from infini_train.model.transformer import Transformer

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


def write_random_checkpoint(folder: Path, model: "ModelConfig") -> "Transformer":
    """A run's folder with a random model of this config, in which every part matters; returns the model."""
    import torch

    from infini_train.checkpoint.fragments import whole_fragment
    from infini_train.checkpoint.resharding import write_whole
    from infini_train.config.files import to_tree, validate
    from infini_train.model.init import initialise
    from infini_train.model.transformer import Transformer

    run = validate({
        "model": to_tree(model),
        "data": {"train": "-"},
        "train": {"window_tokens": 32, "batch_lanes": 1, "max_steps": 1},
        "optim": {"warmup_steps": 0},
    })  # fmt: skip
    built = Transformer(model)
    initialise(built, dataclasses.replace(model, init_std=0.3), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # gates that differ, maps that are none, norms that are not ones
        for name, parameter in built.named_parameters():
            if parameter.dim() != 2 or any(part in name for part in ("gate_query", "strength", "decay")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    fragments = [whole_fragment(name, "master", weight) for name, weight in built.named_parameters()]
    write_whole(folder / "checkpoints" / "step-00000007", 7, fragments, {"tokenizer": "another"}, to_tree(run))
    return built.eval()


@pytest.fixture
def write_checkpoint() -> "Callable[[Path, ModelConfig], Transformer]":
    return write_random_checkpoint


@pytest.fixture
def edit() -> Callable[..., None]:
    """Changes fields of a folder's config.json; None takes one away."""

    def change(folder: Path, **fields: object) -> None:
        tree = json.loads((folder / "config.json").read_text())
        tree = {name: value for name, value in {**tree, **fields}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(tree))

    return change
