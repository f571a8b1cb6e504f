"""A flipped bit anywhere in a dataset: `verify` finds it; training refuses it, leaves a document out, or is unaffected.

A flip that training does not notice may only be one that changes nothing of what it reads.
"""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from data_tools.verify import verify
from infini_train.config.errors import ConfigError
from infini_train.data.corpus import Corpus
from infini_train.data.lanes import LaneReader
from infini_train.data.shards import Dataset, ShardWriter
from infini_train.data.tokenizer import SentencePieceTokenizer, tokenizer_of

FLIPS = 30  # of each file
FILES = ["manifest.json", "documents.idx", "shard-00000.tar", "shard-00001.tar", "tokenizer.model"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and a pair, in two shards, with names that JSON must escape."""
    place = tmp_path_factory.mktemp("flips")
    with (place / "t.model").open("wb") as file:
        texts = iter(["the cat sat on the mat"] * 9)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts, model_writer=file, vocab_size=14, minloglevel=2
        )
    with ShardWriter(place / "set", SentencePieceTokenizer(place / "t.model"), max_shard_bytes=9_000) as writer:
        for i in range(5):
            metadata: dict[str, Any] = {"title": f"\x1b[{i}m"} | ({"loss_start": 3} if i == 3 else {})
            tokens = np.arange(100 * i) % 14
            writer.add(tokens, n_bytes=200 * i, id=f"é{i}", source='a\x1b"', metadata=metadata)
    assert sorted(path.name for path in (place / "set").iterdir()) == sorted(FILES)
    assert verify(place / "set") == []
    return place / "set"


def read(folder: Path) -> tuple[list[np.ndarray], list[str]]:
    """All batches of an epoch as training reads them, and the documents that were left out."""
    left_out: list[str] = []
    opened = Dataset.open(folder)
    tokenizer_of(folder)
    reader = LaneReader(Corpus.of(opened, seed=0, epochs=1), 2, 64, on_corrupt=left_out.append)
    position, arrays = reader.start(), []
    while (found := reader.next(position))[0] is not None:
        batch, position = found
        arrays += [batch.tokens_BT, batch.labels_BT, batch.starts_BT, batch.weights_BT, np.array(batch.n_bytes)]
    return arrays, left_out


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found(dataset, tmp_path, name) -> None:
    clean, left_out = read(dataset)
    assert len(clean) > 40 and not left_out
    folder = tmp_path / "set"
    shutil.copytree(dataset, folder)
    path, rng = folder / name, random.Random(f"flips of {name}")
    data = path.read_bytes()
    outcomes = {"refused": 0, "left out": 0, "unaffected": 0}
    for place in [0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(FLIPS))]:
        bit = rng.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])
        where = f"{name}, byte {place}, bit {bit}"
        try:
            problems = verify(folder)
        except ConfigError as error:
            problems = [str(error)]
        assert problems and not any("\n" in problem for problem in problems), where
        try:
            arrays, left_out = read(folder)
        except ConfigError as error:
            assert "\n" not in str(error), where
            outcomes["refused"] += 1
            continue
        outcomes["left out" if left_out else "unaffected"] += 1
        same = len(arrays) == len(clean) and all(map(np.array_equal, arrays, clean))
        assert same or left_out, where
    if name in ("documents.idx", "tokenizer.model"):
        assert outcomes["refused"] == sum(outcomes.values()), "each byte of them counts"
    elif name == "manifest.json":
        assert outcomes["refused"] > FLIPS // 2 and not outcomes["left out"]
    else:
        assert outcomes["left out"] and not outcomes["refused"]
