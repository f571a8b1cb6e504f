"""Tiny models over bytes, and shards to evaluate them on."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from infini_train.config import FullConfig, InfiniConfig, LocalConfig, ModelConfig
from infini_train.data.shards import Dataset, ShardWriter
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.model.init import initialise
from infini_train.model.transformer import Transformer
from infini_train.parallel import device, mesh

torch.set_num_threads(1)

VARIANTS = {
    "linear": InfiniConfig(segment_tokens=8),
    "delta": InfiniConfig(segment_tokens=8, update="delta"),
    "linear-overlap": InfiniConfig(segment_tokens=8, overlap_tokens=3),
    "delta-overlap": InfiniConfig(segment_tokens=8, update="delta", overlap_tokens=8),
    "local": LocalConfig(segment_tokens=8),
    "local-overlap": LocalConfig(segment_tokens=8, overlap_tokens=3),
    "full": FullConfig(),
}


def build(variant: str) -> Transformer:
    """A model whose context matters: large weights, so that greedy text does not repeat one token."""
    config = ModelConfig(
        vocab_size=259,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_size=48,
        attention=VARIANTS[variant],
        init_std=0.3,
    )
    model = Transformer(config)
    initialise(model, config, 3)
    return model.eval()


def write(folder: Path, lengths: Iterable[int]) -> Dataset:
    """Documents of random bytes; a token stands for two bytes of text."""
    random = np.random.default_rng(0)
    with ShardWriter(folder, ByteTokenizer()) as writer:
        for number, length in enumerate(lengths):
            writer.add(random.integers(0, 256, length), n_bytes=2 * length, id=f"document {number}")
    return Dataset.open(folder)


class Tools(NamedTuple):
    """What tests of several files call."""

    build: Callable[[str], Transformer] = build
    write: Callable[[Path, Iterable[int]], Dataset] = write


@pytest.fixture(scope="session")
def tools() -> Tools:
    device.prepare()
    mesh.start()
    return Tools()


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param
