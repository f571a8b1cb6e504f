"""Lanes: every document once, labels inside documents, exact resume, no dependence on window or rank."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infini_train.config.errors import ConfigError
from infini_train.data.corpus import Corpus, Turn, permute
from infini_train.data.lanes import IGNORED, Batch, LaneReader, LaneState, prefetch
from infini_train.data.manifest import NPY_HEADER_BYTES
from infini_train.data.shards import Dataset, ShardWriter
from infini_train.data.tokenizer import ByteTokenizer

BOS, EOS, PAD = ByteTokenizer.bos_id, ByteTokenizer.eos_id, ByteTokenizer.pad_id


def write(folder: Path, lengths: list[int]) -> Dataset:
    """Documents of these lengths; tokens identify their document."""
    with ShardWriter(folder, ByteTokenizer(), max_shard_bytes=20_000) as writer:
        for i, n in enumerate(lengths):
            writer.add((np.arange(n) * 7 + i) % 256, n_bytes=3 * n, id=f"d{i}")
    return Dataset.open(folder)


def run(reader: LaneReader, steps: int | None = None) -> list[Batch]:
    state, batches = reader.start(), []
    while steps is None or len(batches) < steps:
        batch, state = reader.next(state)
        if batch is None:
            break
        batches.append(batch)
    return batches


def join(batches: list[Batch], name: str) -> np.ndarray:
    return np.concatenate([getattr(batch, name) for batch in batches], axis=1)


def same(a: Batch, b: Batch) -> bool:
    return all(
        np.array_equal(x, y) and np.asarray(x).dtype == np.asarray(y).dtype
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def cut_documents(batches: list[Batch]) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) of each document in the lanes, cut at the start marks."""
    tokens_BT, labels_BT, weights_BT = (join(batches, n) for n in ("tokens_BT", "labels_BT", "weights_BT"))
    found = []
    for lane, starts_T in enumerate(join(batches, "starts_BT")):
        edges = [*np.flatnonzero(starts_T), len(starts_T)]
        assert edges[0] == 0
        for a, b in zip(edges, edges[1:], strict=False):
            if weights_BT[lane, a]:
                assert weights_BT[lane, a:b].all()
                found.append((tokens_BT[lane, a:b].tolist(), labels_BT[lane, a:b].tolist()))
            else:
                assert not weights_BT[lane, a:b].any() and (labels_BT[lane, a:b] == IGNORED).all()
                assert (tokens_BT[lane, a:b] == PAD).all()
    return found


def expected(dataset: Dataset) -> list[tuple[list[int], list[int]]]:
    contents = [dataset.read(i, 0, int(n)).tolist() for i, n in enumerate(dataset.lengths_tokens)]
    return [([BOS, *x], [*x, EOS]) for x in contents]


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=25)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, lanes=st.integers(1, 6), window=st.integers(1, 24), seed=st.none() | st.integers(0, 3))
def test_each_document_once_with_labels_inside_it(tmp_path_factory, lengths, lanes, window, seed) -> None:
    dataset = write(tmp_path_factory.mktemp("d") / "set", lengths)
    batches = run(LaneReader(Corpus.of(dataset, seed, 1), lanes, window))
    assert sorted(cut_documents(batches)) == sorted(expected(dataset))
    assert sum(batch.n_bytes for batch in batches) == pytest.approx(3 * sum(lengths))
    assert batches[-1].weights_BT.any()  # no batch of padding alone


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, lanes=st.integers(1, 5), windows=st.tuples(st.integers(1, 9), st.integers(10, 33)))
def test_what_a_lane_reads_does_not_depend_on_the_window(tmp_path_factory, lengths, lanes, windows) -> None:
    dataset = write(tmp_path_factory.mktemp("d") / "set", lengths)
    short, long = (run(LaneReader(Corpus.of(dataset, 5), lanes, w), 99 // w) for w in windows)
    stop = min(join(short, "tokens_BT").shape[1], join(long, "tokens_BT").shape[1])
    for name in ("tokens_BT", "labels_BT", "starts_BT", "weights_BT"):
        assert np.array_equal(join(short, name)[:, :stop], join(long, name)[:, :stop])


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, lanes=st.integers(1, 4), window=st.integers(1, 16), epochs=st.sampled_from([1, 2, None]))
def test_resume_at_every_step_is_bit_identical(tmp_path_factory, lengths, lanes, window, epochs) -> None:
    dataset = write(tmp_path_factory.mktemp("d") / "set", lengths)
    reader = LaneReader(Corpus.of(dataset, 1, epochs), lanes, window)
    state, steps = reader.start(), []
    while len(steps) < 12:
        batch, after = reader.next(state)
        if batch is None:
            break
        steps.append((json.dumps(state.to_json()), batch))
        state = after
    for text, batch in reversed(steps):  # from the last to the first, by a reader that has seen nothing before
        again, _ = LaneReader(Corpus.of(dataset, 1, epochs), lanes, window).next(LaneState.from_json(json.loads(text)))
        assert again is not None and same(again, batch)


@pytest.mark.parametrize("seed", [None, 3])
def test_rows_are_slices_of_the_whole(tmp_path, seed) -> None:
    dataset = write(tmp_path / "set", [5, 0, 17, 40, 3, 3, 9, 21])
    whole = run(LaneReader(Corpus.of(dataset, seed, 2), 6, 8))
    parts = [run(LaneReader(Corpus.of(dataset, seed, 2), 6, 8, rows=slice(a, a + 2))) for a in (0, 2, 4)]
    assert all(len(part) == len(whole) for part in parts)
    for step, batch in enumerate(whole):
        for name in ("tokens_BT", "labels_BT", "starts_BT", "weights_BT", "document_B"):
            assert np.array_equal(np.concatenate([getattr(part[step], name) for part in parts]), getattr(batch, name))
        assert sum(part[step].n_bytes for part in parts) == pytest.approx(batch.n_bytes)


def test_types_and_the_rule_of_the_order(tmp_path) -> None:
    """Natural order, two lanes: lengths 1, 3, 0, 2 give 2, 4, 1 and 3 positions."""
    dataset = write(tmp_path / "set", [1, 3, 0, 2])
    (batch,) = run(LaneReader(Corpus.of(dataset, None, 1), 2, 6))
    assert (batch.tokens_BT.dtype, batch.labels_BT.dtype) == (np.int64, np.int64)
    assert (batch.starts_BT.dtype, batch.weights_BT.dtype, batch.document_B.dtype) == (bool, np.float32, np.int64)
    assert batch.tokens_BT.tolist() == [[BOS, 0, BOS, BOS, 3, 10], [BOS, 1, 8, 15, PAD, PAD]]
    assert batch.labels_BT.tolist() == [[0, EOS, EOS, 3, 10, EOS], [1, 8, 15, EOS, IGNORED, IGNORED]]
    assert batch.starts_BT.astype(int).tolist() == [[1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 1, 0]]
    assert batch.weights_BT.tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    assert batch.document_B.tolist() == [3, -1]


def test_epochs_differ_and_seeds_differ() -> None:
    orders = [permute(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert permute(6, 0, 0).tolist() == permute(6, 0, 0).tolist()


def test_the_endless_stream_reads_each_epoch_whole(tmp_path) -> None:
    lengths = [4, 0, 9, 2, 7]
    dataset = write(tmp_path / "set", lengths)
    reader = LaneReader(Corpus.of(dataset, 0), 1, 1)  # a single lane: epochs follow one another
    documents = cut_documents(run(reader, 3 * (sum(lengths) + len(lengths))))
    for epoch in range(3):
        order = permute(5, 0, epoch)
        assert documents[5 * epoch : 5 * epoch + 5] == [expected(dataset)[d] for d in order]


def test_a_corrupt_document_is_masked_and_shifts_nothing(tmp_path) -> None:
    lengths = [11, 6, 20, 5]
    good = write(tmp_path / "good", lengths)
    bad = write(tmp_path / "bad", lengths)
    path, offset = tmp_path / "bad" / "shard-00000.tar", int(bad._index[2]["data_offset"])
    with path.open("r+b") as file:
        file.seek(offset - NPY_HEADER_BYTES)
        file.write(b"garbage!")
    said: list[str] = []
    readers = [LaneReader(Corpus.of(dataset, None, 1), 2, 7, on_corrupt=said.append) for dataset in (good, bad)]
    whole, masked = (run(reader) for reader in readers)
    assert [reader.corrupt_documents for reader in readers] == [0, 1]
    (line,) = said
    assert line.startswith(f"{bad.folder}: the data of document ") and line.endswith(" tokens are left out")
    assert np.array_equal(join(whole, "starts_BT"), join(masked, "starts_BT"))
    lost = join(whole, "weights_BT") != join(masked, "weights_BT")
    assert lost.sum() == 21 and (join(masked, "labels_BT")[lost] == IGNORED).all()
    assert np.array_equal(join(whole, "tokens_BT")[~lost], join(masked, "tokens_BT")[~lost])
    assert sum(b.n_bytes for b in masked) == pytest.approx(3 * (sum(lengths) - 20))


def test_a_wrong_position_is_refused_by_name(tmp_path) -> None:
    corpus = Corpus.of(write(tmp_path / "set", [4, 5]), 0)
    with pytest.raises(ConfigError, match=r"train.batch_lanes: the saved position has 3 lanes, not 2"):
        LaneReader(corpus, 2, 4).next(LaneReader(corpus, 3, 4).start())
    for state in (LaneState((Turn(),), (7,), (0,)), LaneState((Turn(0, 2),), (0,), (0,)), LaneState((), (0,), (0,))):
        with pytest.raises(ConfigError, match="give the data it was saved with"):
            LaneReader(corpus, 1, 4).next(state)


def test_prefetch_gives_the_same_and_closes(tmp_path) -> None:
    dataset = write(tmp_path / "set", [30, 12, 5, 9])
    reader = LaneReader(Corpus.of(dataset, 0, 2), 2, 5)
    plain, threads = run(reader), threading.active_count()
    pairs = list(prefetch(reader, reader.start()))
    assert len(pairs) == len(plain) and all(same(a, b) for (a, _), b in zip(pairs, plain, strict=True))
    again, _ = reader.next(pairs[0][1])
    assert again is not None and same(again, plain[1])
    reader = LaneReader(Corpus.of(dataset, 0), 2, 5)
    endless = prefetch(reader, reader.start())
    next(endless)
    endless.close()
    assert threading.active_count() == threads


def test_prefetch_raises_what_the_reader_raised(tmp_path) -> None:
    dataset = write(tmp_path / "set", [30, 12])
    (tmp_path / "set" / "shard-00000.tar").unlink()
    reader = LaneReader(Corpus.of(dataset, 0), 2, 5)
    with pytest.raises(FileNotFoundError):
        next(prefetch(reader, reader.start()))
