"""(book, summary) pairs: what is read, what is learned, and what is cut."""

import numpy as np
import pytest

from infini_train.config.errors import ConfigError
from infini_train.data.corpus import Corpus
from infini_train.data.lanes import IGNORED, LaneReader
from infini_train.data.manifest import LOSS_START
from infini_train.data.pairs import PairForm
from infini_train.data.shards import CorruptDocumentError, Dataset, ShardWriter
from infini_train.data.tokenizer import ByteTokenizer

BYTE = ByteTokenizer()
FORM = PairForm(prompt="Read: ", separator=" | ")


def test_a_pair_is_prompt_book_separator_summary():
    ids, start = FORM.encode(BYTE, "A book.", "Its end.")
    assert BYTE.decode(ids) == "Read: A book. | Its end."
    assert BYTE.decode(ids[start:]) == "Its end."
    assert ids[:start].tolist() == FORM.encode_book(BYTE, "A book.").tolist(), "what generation will read"


@pytest.mark.parametrize("max_tokens", [18, 20, 24, 100])
def test_what_is_too_long_is_cut_from_the_book(max_tokens):
    ids, start = FORM.encode(BYTE, "A book.", "Its end.", max_tokens)
    book = "A book."[: max_tokens - len("Read:  | Its end.")]
    assert BYTE.decode(ids) == f"Read: {book} | Its end." and len(ids) == min(max_tokens, 24)
    assert BYTE.decode(FORM.encode_book(BYTE, "A book.", 12)) == "Read: A b | "


@pytest.mark.parametrize("max_tokens", [5, 17])
def test_no_room_for_a_book_is_refused(max_tokens):
    with pytest.raises(ConfigError, match=r"^max tokens: .* give more$"):
        FORM.encode(BYTE, "A book.", "Its end.", max_tokens)


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    """Pairs and plain documents in turn, in shards that hold one or both."""
    random = np.random.default_rng(0)
    with ShardWriter(tmp_path / "data", BYTE, max_shard_bytes=12_000) as writer:
        for number in range(9):
            length = int(random.integers(1, 60))
            start = int(random.integers(0, length + 1))
            metadata = {LOSS_START: start} if number % 3 else {}
            writer.add(random.integers(0, 256, length), n_bytes=length, id=f"d{number}", metadata=metadata)
    return Dataset.open(tmp_path / "data")


def test_the_manifest_counts_pairs(dataset):
    assert sum(shard.pairs for shard in dataset.manifest.shards) == 6
    assert [dataset.loss_start(number) for number in (0, 3, 6)] == [0, 0, 0]
    assert dataset.loss_start(1) == dataset.metadata(1)[LOSS_START]


@pytest.mark.parametrize("window", [1, 7, 64])
@pytest.mark.parametrize("lanes", [1, 3])
def test_labels_are_those_of_the_summary_and_the_end_alone(dataset, window, lanes):
    """Whatever the window: the labels in a document's order are its tokens from the summary on, and eos."""
    reader = LaneReader(Corpus.of(dataset, seed=None, epochs=1), lanes, window)
    state, inputs, learned, n_bytes = reader.start(), {}, {}, 0.0
    while True:
        pieces, _ = reader.plan(state)
        batch, state = reader.next(state)
        if batch is None:
            break
        n_bytes += batch.n_bytes
        for lane, column, document, start, stop in pieces:
            columns = slice(column, column + stop - start)
            if document >= 0:
                labels = batch.labels_BT[lane, columns]
                inputs.setdefault(document, []).extend(batch.tokens_BT[lane, columns].tolist())
                learned.setdefault(document, []).extend(labels[labels != IGNORED].tolist())
    expected_bytes = 0.0
    for number, length in enumerate(dataset.lengths_tokens.tolist()):
        content, start = dataset.read(number, 0, length).tolist(), dataset.loss_start(number)
        assert inputs[number] == [BYTE.bos_id, *content]
        assert learned[number] == [*content[start:], BYTE.eos_id]
        expected_bytes += (length + 1 - start) / (length + 1) * length
    assert n_bytes == pytest.approx(expected_bytes)


def test_a_place_outside_of_the_document_is_damage(tmp_path):
    with ShardWriter(tmp_path / "data", BYTE) as writer:
        writer.add(np.arange(5), n_bytes=5, id="d", metadata={LOSS_START: 6})
    dataset = Dataset.open(tmp_path / "data")
    with pytest.raises(CorruptDocumentError):
        dataset.loss_start(0)
    batch, _ = (reader := LaneReader(Corpus.of(dataset, None, 1), 1, 8)).next(reader.start())
    assert batch is not None and not batch.weights_BT.any() and reader.corrupt_documents == 1
