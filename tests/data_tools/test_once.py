"""From texts to lanes: whatever the shards, parts, stops and ranks, each document comes once an epoch, and in order."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import plan
from data_tools.encode import EncodeOptions, encode_corpus
from infini_train.data.corpus import Corpus
from infini_train.data.lanes import LaneReader, LaneState
from infini_train.data.shards import Dataset
from infini_train.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text("ab é\n", min_size=1, max_size=30), min_size=1, max_size=20),
    shard_bytes=st.sampled_from([3_000, 20_000, 1 << 29]),
    task_bytes=st.sampled_from([40, 200, 10_000]),
    parts=st.integers(1, 3),
    stops=st.lists(st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 4])), max_size=4),
    window=st.integers(1, 20),
    seed=st.integers(0, 3),
)
def test_each_text_comes_once_an_epoch(
    tmp_path_factory, texts, shard_bytes, task_bytes, parts, stops, window, seed
) -> None:
    folder = tmp_path_factory.mktemp("once")
    rows = [json.dumps({"id": str(i), "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    (folder / "c.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_MIN_TASK_BYTES", task_bytes)
        for part in range(1, parts + 1):
            options = EncodeOptions(max_shard_bytes=shard_bytes, part=f"{part}/{parts}")
            encode_corpus([str(folder / "c.jsonl")], "byte", folder / "set", options)
    corpus = Corpus.of(Dataset.open(folder / "set"), seed, epochs=2)
    order = [corpus.take(corpus.start())]
    while order[-1][0] is not None:
        order.append(corpus.take(order[-1][1]))
    expected = [texts[number] for number, _ in order[:-1]]
    assert [sorted(expected[: len(texts)]), sorted(expected[len(texts) :])] == [sorted(texts)] * 2
    assert read(corpus, window, stops) == sorted(expected)


def read(corpus: Corpus, window: int, stops: list[tuple[int, int]]) -> list[str]:
    """The texts that four lanes give, to as many ranks as it says from each stop on, sorted."""
    state, lanes = LaneReader(corpus, 4, window).start(), [[] for _ in range(4)]
    for steps, ranks in [*stops, (10**6, 1)]:
        size = 4 // ranks
        readers = [LaneReader(corpus, 4, window, rows=slice(r * size, (r + 1) * size)) for r in range(ranks)]
        for _ in range(steps):
            found = [reader.next(state) for reader in readers]
            if found[0][0] is None:
                break
            tokens, weights = (
                np.concatenate([getattr(batch, name) for batch, _ in found]) for name in ("tokens_BT", "weights_BT")
            )
            for lane in range(4):
                lanes[lane] += tokens[lane][weights[lane] > 0].tolist()
            state = LaneState.from_json(json.loads(json.dumps(found[0][1].to_json())))  # as a checkpoint keeps it
    starts = [[i for i, token in enumerate(lane) if token == BYTES.bos_id] + [len(lane)] for lane in lanes]
    return sorted(BYTES.decode(lane[a:b]) for lane, ends in zip(lanes, starts, strict=True) for a, b in pairwise(ends))
