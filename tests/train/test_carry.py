"""Lanes over data-parallel ranks: together they read the one stream, whatever their number, and so after a resume."""

import dataclasses
import json

import numpy as np
import pytest

from infini_train.config.run import RunConfig, divide_processes
from infini_train.data.corpus import Corpus
from infini_train.data.lanes import Batch, LaneReader, LaneState
from infini_train.data.shards import Dataset
from infini_train.train.carry import Lanes

FIELDS = ("tokens_BT", "labels_BT", "starts_BT", "weights_BT", "document_B")
LAYOUTS = {  # processes and sizes -> data-parallel ranks
    "one": (1, {}),
    "dp2": (2, {}),
    "dp4-zero3": (4, {"zero_stage": 3}),
    "tp2-pp2-dp2": (8, {"tensor_size": 2, "pipeline_size": 2}),
    "cp2-dp4": (8, {"context_size": 2}),
    "tp4-dp8": (32, {"tensor_size": 4}),
}


@pytest.fixture
def open_readers(configure, shards):
    """The readers of all data-parallel ranks of a layout, as `open_session` makes them."""

    def build(layout: str) -> list[LaneReader]:
        processes, sizes = LAYOUTS[layout]
        config: RunConfig = configure("model.vocab_size=264", "train.batch_lanes=8", "train.micro_batch_lanes=1")
        parallel = dataclasses.replace(config.parallel, **sizes)
        config = divide_processes(dataclasses.replace(config, parallel=parallel), processes)
        lanes = [Lanes.of(config, rank) for rank in range(config.parallel.data_size)]
        window, rows = config.train.window_tokens, config.lanes_per_rank
        corpus = Corpus.of(Dataset.open(shards), 0)
        return [LaneReader(corpus, 8, window, rows=slice(mine.first, mine.first + rows)) for mine in lanes]

    return build


def read(readers: list[LaneReader], states: list[LaneState]) -> tuple[dict[str, np.ndarray], float, list[LaneState]]:
    """The next batch of all ranks put together, its bytes, and where each rank stands."""
    pairs = [reader.next(state) for reader, state in zip(readers, states, strict=True)]
    batches: list[Batch] = [batch for batch, _ in pairs]
    together = {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in FIELDS}
    return together, sum(batch.n_bytes for batch in batches), [state for _, state in pairs]


@pytest.mark.parametrize("after", LAYOUTS)
@pytest.mark.parametrize("before", LAYOUTS)
def test_all_ranks_together_read_the_one_stream(before, after, open_readers) -> None:
    steps, change = 9, 4
    whole, readers = open_readers("one"), open_readers(before)
    expected_states, states = [whole[0].start()], [whole[0].start()] * len(readers)
    for step in range(steps):
        if step == change:  # a checkpoint keeps rank 0's position; ranks of another number go on from it
            readers = open_readers(after)
            states = [LaneState.from_json(json.loads(json.dumps(states[0].to_json())))] * len(readers)
        expected, expected_bytes, expected_states = read(whole, expected_states)
        found, n_bytes, states = read(readers, states)
        assert all(np.array_equal(found[name], expected[name]) for name in FIELDS), step
        assert n_bytes == pytest.approx(expected_bytes)
        assert set(states) == set(expected_states), "every rank knows where all lanes stand"
