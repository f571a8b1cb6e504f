"""Passkey texts in training windows: where texts begin, what is learned, how lengths grow, what pressure touches."""

import itertools

import numpy as np
import pytest

from infini_train.config import PasskeyConfig
from infini_train.data.lanes import IGNORED
from infini_train.data.passkey_reader import PasskeyReader, Step
from infini_train.data.tokenizer import ByteTokenizer

SEGMENT, WINDOW = 128, 128 * 12
GROWING = PasskeyConfig(min_segments=3, grow_from_step=10, grow_until_step=20, pressure=64, pressure_share=0.5)


def reader(config=GROWING, lanes=4, rows=None):
    return PasskeyReader(config, lanes, WINDOW, SEGMENT, 5, rows if rows is not None else slice(None))


def texts(batch, row):
    """(start, stop) columns of a lane's texts, without padding."""
    starts = [*np.flatnonzero(batch.starts_BT[row]), WINDOW]
    for begin, end in itertools.pairwise(starts):
        yield begin, begin + int((batch.weights_BT[row, begin:end] > 0).sum())


@pytest.mark.parametrize("step", [0, 15, 300])
def test_texts_begin_at_segments_and_end_with_the_answer(step):
    batch, _ = reader().next(Step(step))
    byte = ByteTokenizer()
    for row in range(4):
        for start, stop in texts(batch, row):
            assert start % SEGMENT == 0
            assert batch.tokens_BT[row, start] == byte.bos_id
            text = byte.decode(batch.labels_BT[row, start:stop])
            assert text == byte.decode(batch.tokens_BT[row, start + 1 : stop]) + text[-1]
            key = text[-5:]
            assert text.endswith(f"The pass key is {key}") and key.isdigit()
            assert f"The pass key is {key}. Remember it. {key} is the pass key." in text
    padding = batch.weights_BT == 0
    assert (batch.labels_BT[padding] == IGNORED).all() and (batch.loss_weights_BT[padding] == 0).all()
    assert (batch.labels_BT[~padding] != IGNORED).all()


def test_lengths_grow():
    lengths = {
        step: {
            stop - start
            for n in range(9)
            for row in range(4)
            for start, stop in texts(reader().next(Step(step + n))[0], row)
        }
        for step in (0, 1000)
    }
    assert min(lengths[0]) > 2 * SEGMENT and max(lengths[0]) <= 3 * SEGMENT
    assert max(lengths[1000]) > 9 * SEGMENT
    assert [reader().longest_segments(step) for step in (0, 10, 20, 99)] == [3, 3, 12, 12]


def test_every_text_counts_alike():
    batch, _ = reader().next(Step(50))
    config = GROWING
    for start, stop in texts(batch, 1):
        weights = batch.loss_weights_BT[1, start:stop]
        assert weights[-5:].sum() == pytest.approx(config.answer_weight)
        assert np.isclose(weights, config.key_weight / 5).sum() == 5
        assert weights.sum() - config.answer_weight - config.key_weight == pytest.approx(config.text_weight, rel=0.1)


def test_pressure_spares_the_key_and_the_first_segment():
    seen = set()
    for step in range(20, 60):
        batch, _ = reader().next(Step(step))
        for row in range(4):
            for start, stop in texts(batch, row):
                weights = batch.weights_BT[row, start:stop]
                assert (weights[:SEGMENT] == 1).all()
                text = ByteTokenizer().decode(batch.tokens_BT[row, start + 1 : stop])
                place = 1 + text.find("The pass key is")
                first, last = place // SEGMENT, (place + len("The pass key is 12345. Remember it.")) // SEGMENT
                assert (weights[first * SEGMENT : (last + 1) * SEGMENT] == 1).all()
                seen.add(len(set(weights.tolist())))
                assert weights.max() <= 64 * WINDOW / (stop - start)
    assert seen == {1, 2}, "some texts are under pressure, some are not"
    quiet = [reader().next(Step(step))[0].weights_BT.max() for step in range(20)]
    assert set(quiet) == {1.0}, "none before the lengths have grown"


def test_a_rank_reads_its_rows_of_the_same_batch():
    whole, after = reader().next(Step(33))
    part, _ = reader(rows=slice(2, 4)).next(Step(33))
    for name in ("tokens_BT", "labels_BT", "starts_BT", "weights_BT", "loss_weights_BT"):
        assert np.array_equal(getattr(part, name), getattr(whole, name)[2:4])
    assert after == Step(34) and Step.from_json(after.to_json()) == after
    assert not np.array_equal(whole.tokens_BT, reader().next(after)[0].tokens_BT)
