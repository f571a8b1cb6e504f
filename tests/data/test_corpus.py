"""Mixtures: shares of tokens, every document once an epoch, curricula that only reorder, positions that go on."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infini_train.config.data import LengthStage
from infini_train.config.errors import ConfigError
from infini_train.data.corpus import Corpus, WeightedDataset, bring_forward, permute
from infini_train.data.lanes import Batch, LaneReader, LaneState
from infini_train.data.shards import Dataset, ShardWriter
from infini_train.data.tokenizer import ByteTokenizer


def write(folder: Path, lengths: list[int], first: int = 0) -> Dataset:
    """Documents of these lengths, whose tokens identify them."""
    with ShardWriter(folder, ByteTokenizer(), max_shard_bytes=20_000) as writer:
        for i, n in enumerate(lengths):
            writer.add(np.full(n, (first + i) % 256), n_bytes=n, id=f"d{i}")
    return Dataset.open(folder)


def take(corpus: Corpus, count: int) -> list[int]:
    turns, found = corpus.start(), []
    while len(found) < count:
        document, turns = corpus.take(turns)
        if document is None:
            break
        found.append(document)
    return found


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    sets=st.lists(LENGTHS, min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.3, 1.0, 2.0, 5.0]), min_size=4, max_size=4),
    epochs=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    stages=st.lists(
        st.builds(LengthStage, tokens=st.integers(1, 90), max_document_tokens=st.integers(1, 40)), max_size=3
    ),
    lanes=st.integers(1, 4),
    cuts=st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 4])), max_size=4),
)
def test_each_document_comes_once_an_epoch_whoever_reads(
    tmp_path_factory, sets, weights, epochs, stages, lanes, cuts
) -> None:
    """Read by one rank, and by ranks whose number changes at every stop."""
    folder, lanes = tmp_path_factory.mktemp("d"), 4 * lanes
    datasets = [write(folder / str(i), [*lengths, i + 50], 16 * i) for i, lengths in enumerate(sets)]

    def open_corpus() -> Corpus:
        parts = zip(map(str, range(4)), datasets, weights, epochs, strict=False)
        return Corpus([WeightedDataset(*part) for part in parts], 3, stages)

    corpus = open_corpus()
    taken = take(corpus, 1000)
    expected = [
        d
        for part, first in zip(corpus.datasets, corpus._first, strict=False)
        for d in range(first, first + len(part.dataset))
        for _ in range(part.epochs or 0)
    ]
    assert sorted(taken) == sorted(expected)
    assert sum(corpus.positions[taken]) == corpus.total_positions

    def read(ranks: int, state: LaneState, steps: int) -> tuple[list[np.ndarray], LaneState]:
        rows = [slice(rank * lanes // ranks, (rank + 1) * lanes // ranks) for rank in range(ranks)]
        readers = [LaneReader(open_corpus(), lanes, 8, rows=mine) for mine in rows]
        found: list[np.ndarray] = []
        for _ in range(steps):
            pairs = [reader.next(state) for reader in readers]
            batches = [batch for batch, _ in pairs if isinstance(batch, Batch)]
            if not batches:
                break
            assert len({json.dumps(after.to_json()) for _, after in pairs}) == 1
            state = pairs[0][1]
            found.append(np.concatenate([np.stack([b.tokens_BT, b.labels_BT, b.weights_BT]) for b in batches], axis=1))
        return found, LaneState.from_json(json.loads(json.dumps(state.to_json())))

    start = LaneReader(corpus, lanes, 8).start()
    whole, _ = read(1, start, 1000)
    pieces, state = [], start
    for steps, ranks in [*cuts, (1000, 2)]:
        found, state = read(ranks, state, steps)
        pieces += found
    assert len(pieces) == len(whole) and all(map(np.array_equal, pieces, whole))


def test_parts_have_their_shares_of_the_tokens(tmp_path) -> None:
    random = np.random.default_rng(0)
    sets = [write(tmp_path / str(i), random.integers(1, 40 * 3**i, 60).tolist()) for i in range(3)]
    corpus = Corpus(
        [
            WeightedDataset(str(i), dataset, weight)
            for i, (dataset, weight) in enumerate(zip(sets, (5, 3, 2), strict=True))
        ],
        0,
    )
    reader = LaneReader(corpus, 2, 64)
    state = reader.start()
    for _ in range(200):
        _, state = reader.next(state)
    mix = reader.mix(state)
    shares = [mix[f"mix/{i}/share"] for i in range(3)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.02)
    given = [corpus.taken_positions(i, turn) for i, turn in enumerate(state.turns)]
    assert mix["mix/1/epochs"] == pytest.approx(given[1] / (sets[1].manifest.tokens + 60), abs=0.2)
    alone = LaneReader(Corpus.of(sets[0], 0), 2, 64)
    assert alone.mix(alone.start()) == {}


def test_a_part_that_is_used_up_leaves_its_place_to_the_others(tmp_path) -> None:
    small, large = write(tmp_path / "s", [9] * 3), write(tmp_path / "l", [9] * 30)
    corpus = Corpus([WeightedDataset("s", small, 1.0, 2), WeightedDataset("l", large, 1.0)], None)
    taken = take(corpus, 30)
    assert taken[:12] == [0, 3, 1, 4, 2, 5, 0, 6, 1, 7, 2, 8]
    assert min(taken[12:]) >= 3
    assert corpus.total_positions == float("inf")


def test_a_curriculum_brings_short_documents_forward() -> None:
    positions = np.array([5, 50, 6, 500, 7, 60, 8, 9])
    stages = (LengthStage(tokens=12, max_document_tokens=10), LengthStage(tokens=1000, max_document_tokens=100))
    order = permute(8, None, 0)
    assert bring_forward(order, positions, stages, 1.0).tolist() == [0, 2, 4, 1, 5, 6, 7, 3]
    assert bring_forward(order, positions, stages, 0.1).tolist() == [0, 1, 2, 4, 5, 3, 6, 7]


def test_the_curriculum_is_of_the_first_epoch(tmp_path) -> None:
    dataset = write(tmp_path / "d", [30, 3, 30, 3, 30, 3])
    corpus = Corpus([WeightedDataset("d", dataset)], None, (LengthStage(tokens=100, max_document_tokens=3),))
    assert take(corpus, 12) == [1, 3, 5, 0, 2, 4, 0, 1, 2, 3, 4, 5]


def test_what_does_not_go_together_is_refused(tmp_path) -> None:
    one, other = write(tmp_path / "one", [3, 4]), write(tmp_path / "other", [3, 4, 5])
    with pytest.raises(ConfigError, match=r"^b is there twice; give it once, with a larger weight"):
        Corpus([WeightedDataset("a", one), WeightedDataset("b", one)], 0)
    tokenizer = ByteTokenizer()
    tokenizer.sha256 = "another"  # type: ignore[misc]
    with ShardWriter(tmp_path / "third", tokenizer) as writer:
        writer.add(np.arange(3), n_bytes=3, id="x")
    with pytest.raises(ConfigError, match=r"^c was encoded with another tokenizer than a; encode all"):
        Corpus(
            [
                WeightedDataset("a", one),
                WeightedDataset("b", other),
                WeightedDataset("c", Dataset.open(tmp_path / "third")),
            ],
            0,
        )


def test_the_identity_knows_weights_epochs_and_curriculum(tmp_path) -> None:
    one, other = write(tmp_path / "one", [3, 4]), write(tmp_path / "other", [3, 4, 5])
    stage = LengthStage(tokens=9, max_document_tokens=3)
    identities = {
        Corpus(parts, 0, stages).identity
        for parts in (
            [WeightedDataset("a", one)],
            [WeightedDataset("a", one, 1.0, 2)],
            [WeightedDataset("a", one), WeightedDataset("b", other)],
            [WeightedDataset("a", one), WeightedDataset("b", other, 2.0)],
            [WeightedDataset("b", other), WeightedDataset("a", one)],
        )
        for stages in ((), (stage,))
    }
    assert len(identities) == 10
    assert Corpus([WeightedDataset("moved", one)], 5).identity == one.identity
