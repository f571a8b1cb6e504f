"""Tiny models over bytes, and shards to evaluate them on."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from infini_train.config.model import ModelConfig
from infini_train.data.shards import Dataset, ShardWriter
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.model.init import initialise
from infini_train.model.transformer import Transformer


def write(folder: Path, lengths: Iterable[int]) -> Dataset:
    """Documents of random bytes; a token stands for two bytes of text."""
    random = np.random.default_rng(0)
    with ShardWriter(folder, ByteTokenizer()) as writer:
        for number, length in enumerate(lengths):
            writer.add(random.integers(0, 256, length), n_bytes=2 * length, id=f"document {number}")
    return Dataset.open(folder)


class Tools(NamedTuple):
    """What tests of several files call."""

    tiny: Callable[..., ModelConfig]
    write: Callable[[Path, Iterable[int]], Dataset] = write

    def build(self, variant: str) -> Transformer:
        """A model whose context matters: large weights, so that greedy text does not repeat one token."""
        config = self.tiny(variant, vocab_size=259, init_std=0.3)
        model = Transformer(config)
        initialise(model, config, 3)
        return model.eval()


@pytest.fixture(scope="session")
def tools(tiny: Callable[..., ModelConfig], process_groups: None) -> Tools:
    return Tools(tiny)
