"""Passkey texts in training windows: where texts begin, what is learned, how lengths grow, what pressure touches."""

import dataclasses
import itertools
import re

import numpy as np
import pytest

from infini_train.config.data import PasskeyConfig
from infini_train.data.lanes import IGNORED
from infini_train.data.synthetic.passkey_maker import PasskeyMaker
from infini_train.data.synthetic.reader import Progress, SyntheticReader
from infini_train.data.synthetic.wordings import SENTENCES, WORDINGS, WORDS
from infini_train.data.tokenizer import ByteTokenizer

SEGMENT, WINDOW = 128, 128 * 12
GROWING = PasskeyConfig(min_segments=3, grow_below_loss=0.5, pressure=64, pressure_share=0.5)


def passkey_reader(config, lanes, window, segment, seed, rows):
    return SyntheticReader(PasskeyMaker(config, window, segment), lanes, window, segment, seed, rows)


def reader(config=GROWING, lanes=4, rows=None):
    return passkey_reader(config, lanes, WINDOW, SEGMENT, 5, rows if rows is not None else slice(None))


def texts(batch, row):
    """(start, stop) columns of a lane's texts, without padding."""
    starts = [*np.flatnonzero(batch.starts_BT[row]), WINDOW]
    for begin, end in itertools.pairwise(starts):
        yield begin, begin + int((batch.weights_BT[row, begin:end] > 0).sum())


@pytest.mark.parametrize("longest", [3.0, 7.3, 12.0])
def test_texts_begin_at_segments_and_end_with_the_answer(longest):
    batch, _ = reader().next(Progress(7, longest, 1.0))
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


def test_half_of_the_texts_and_all_short_ones_go_without_an_intro():
    byte, intro = ByteTokenizer(), WORDINGS["paper"].intro
    for longest, fewest, most in ((3.0, 0, 60), (12.0, 5, 35)):
        windows = [reader().next(Progress(step, longest, 1.0))[0] for step in range(10)]
        begun = [
            byte.decode(window.labels_BT[row, a:b]).startswith(intro)
            for window in windows
            for row in range(4)
            for a, b in texts(window, row)
        ]
        assert fewest < sum(begun) * 60 / len(begun) < most
    short = passkey_reader(dataclasses.replace(GROWING, min_segments=1), 1, SEGMENT, SEGMENT, 5, slice(None))
    batch, _ = short.next(short.start())
    words = byte.decode(batch.labels_BT[0][batch.labels_BT[0] != IGNORED])
    assert "pass key is" in words and intro[:20] not in words


def test_varied_filler_is_drawn_for_each_text_from_sentences_of_no_test():
    config = dataclasses.replace(GROWING, varied_filler=True)
    batch, _ = reader(config).next(Progress(3, 12.0, 0.1))
    seen, known = [], " ".join(SENTENCES)
    nonsense = 0
    for row in range(4):
        for start, stop in texts(batch, row):
            words = ByteTokenizer().decode(batch.labels_BT[row, start:stop])
            assert not any(sentence in words for text in WORDINGS.values() for sentence in text.filler)
            seen.append(frozenset(sentence for sentence in SENTENCES if sentence in words))
            filler = words.partition("is the pass key. ")[2].partition(" What is the pass key?")[0]
            whole = re.split(r"[.?!]", filler)[1:-1]
            nonsense += sum(sentence.strip() not in known for sentence in whole)
    assert len(set(seen)) > 4 and max(map(len, seen)) <= 8 and set().union(*seen) > seen[0]
    assert nonsense > 4, "and words of these sentences in any order"


@pytest.mark.parametrize(("digits", "varied_filler"), [(5, False), (8, True)])
def test_varied_wording_says_other_words_around_the_key_in_half_of_the_texts(digits, varied_filler):
    config = dataclasses.replace(GROWING, varied_wording=True, varied_filler=varied_filler, digits=digits)
    byte, paper, drawn, owns = ByteTokenizer(), WORDINGS["paper"], [], 0
    for step in range(10):
        batch, _ = reader(config).next(Progress(step, 12.0, 0.1))
        for row in range(4):
            for start, stop in texts(batch, row):
                text = byte.decode(batch.labels_BT[row, start:stop])
                body, key = text[:-digits], text[-digits:]
                assert re.findall(r"\d+", text) == [key] * 3
                second, weights = start + body.rindex(key), batch.loss_weights_BT[row]
                assert weights[second : second + digits].sum() == pytest.approx(config.key_weight)
                assert weights[stop - digits - 1 : stop].sum() == pytest.approx(config.answer_weight)
                if text.endswith(f"{paper.question} {key}"):
                    owns += 1
                else:
                    drawn.append((body.strip(), key))
                    assert not any(part in text for part in (paper.intro, paper.question, *paper.key.split("{key}")))
    assert 0.3 < owns / (owns + len(drawn)) < 0.7
    asked = [body.rpartition("? ") for body, _ in drawn]
    questions = [re.split("[.?]", before)[-1] for before, _, _ in asked]
    assert len(set(questions)) > 0.9 * len(drawn), "anew for each text"
    assert {word.lower() for question in questions for word in question.split()[-2:]} <= set(WORDS)
    repeats = sum(f"{words} {key}" in body for (body, key), (_, _, words) in zip(drawn, asked, strict=True))
    assert 0.25 < repeats / len(drawn) < 0.75, "some ask in the words that stood before the key"
    begun = [not body.startswith((paper.filler[0], "The pass")) for body, _ in drawn]
    assert varied_filler or 0.1 < sum(begun) / len(drawn) < 0.9, "some begin with an intro, of drawn words too"


def test_drawn_texts_lie_on_any_segments():
    """Key and question may be longer than a segment, or stand in one together; nothing runs over its place."""
    for segment, segments in ((32, 10), (64, 4), (256, 2)):
        config = dataclasses.replace(GROWING, varied_wording=True, min_segments=segments)
        small = passkey_reader(config, 2, segment * segments, segment, 5, slice(None))
        ends = set()
        for step in range(60):
            batch, _ = small.next(Progress(step, float(segments), 0.1))
            for row in range(2):
                length = int((batch.weights_BT[row] > 0).sum())
                text = ByteTokenizer().decode(batch.labels_BT[row, :length])
                assert len(re.findall(r"\d{5}", text)) == 3
                ends.add(length % segment)
        assert len(ends) > 10


def test_drawn_words_that_do_not_fit_give_way_to_the_wording():
    tight = dataclasses.replace(GROWING, varied_wording=True, min_segments=1)
    least = len(
        " The pass key is 12345. Remember it. 12345 is the pass key. What is the pass key? The pass key is 12345"
    )
    small = passkey_reader(tight, 2, least, least, 5, slice(None))
    found = [ByteTokenizer().decode(small.next(Progress(step, 1.0, 1.0))[0].labels_BT[0]) for step in range(40)]
    own = [text.strip().startswith("The pass key is") for text in found]
    assert 0.5 < sum(own) / len(own) < 1, "drawn ones that are short enough stay"


@pytest.mark.parametrize(("few_digits", "two"), [(False, 0.0135), (True, 0.18)])
def test_keys_of_few_digits_repeat_them(few_digits, two):
    keys = []
    for step in range(30):
        batch, _ = reader().next(Progress(step, 3.0, 1.0, few_digits))
        for row in range(4):
            keys += [ByteTokenizer().decode(batch.labels_BT[row, b - 5 : b]) for _, b in texts(batch, row)]
    different = np.bincount([len(set(key)) for key in keys], minlength=6) / len(keys)
    assert different[2] == pytest.approx(two, abs=0.05) and 0.08 < different[5] < 0.4
    shares = np.bincount([int(digit) for digit in "".join(keys)], minlength=10) / (5 * len(keys))
    assert np.abs(shares - 0.1).max() < 0.04, "all digits are as frequent"


def test_texts_grow_while_the_loss_is_low():
    lengths = {}
    for longest in (3.0, 12.0):
        windows = [reader().next(Progress(step, longest, 1.0))[0] for step in range(20)]
        lengths[longest] = [b - a for window in windows for row in range(4) for a, b in texts(window, row)]
    assert min(lengths[3.0]) > 2 * SEGMENT and max(lengths[3.0]) <= 3 * SEGMENT
    assert max(lengths[12.0]) > 9 * SEGMENT
    position = reader().start()
    assert position.largest == 3
    for _ in range(60):
        position = reader().observe_loss(position, 0.6)
    assert position.largest == 3, "not below the threshold"
    seen = [position.largest]
    for _ in range(60):
        position = reader().observe_loss(position, 0.4)
        seen.append(position.largest)
    assert seen == sorted(seen) and seen[-1] == 12
    assert reader().observe_loss(position, 9.0).largest == 12, "they never shrink"


def test_texts_wait_for_keys_of_few_digits_to_be_learned():
    waits = reader(dataclasses.replace(GROWING, few_digits_below_loss=1.0, grow_below_loss=0.3))
    position, stages = waits.start(), []
    for loss in [0.9] * 60 + [0.2] * 60:
        position = waits.observe_loss(position, loss)
        stages.append((position.harder, position.largest))
    turn = [few_digits for few_digits, _ in stages].index(True)
    assert set(stages[:turn]) == {(False, 3)} and set(stages[turn:60]) == {(True, 3)}
    assert stages[-1] == (True, 12) and stages == sorted(stages), "keys stay as they are, texts never get short again"
    quick = [waits.start()]
    for _ in range(40):
        quick.append(waits.observe_loss(quick[-1], 0.2))
    waited = sum(position.harder and position.largest == 3 for position in quick)
    assert waited > 10, "what was learned of other keys doesn't count"
    window, after = waits.next(position)
    assert after.harder and waits.parse(after.to_json()) == after and window.weights_BT.max() > 1


def test_every_text_counts_alike():
    batch, _ = reader().next(Progress(50, 12.0, 0.1))
    config = GROWING
    for start, stop in texts(batch, 1):
        weights = batch.loss_weights_BT[1, start:stop]
        assert weights[-6:].sum() == pytest.approx(config.answer_weight), "its space, and five digits"
        assert np.isclose(weights, config.key_weight / 5).sum() == 5
        assert weights.sum() - config.answer_weight - config.key_weight == pytest.approx(config.text_weight, rel=0.1)


def test_pressure_spares_the_key_and_the_first_segment():
    seen = set()
    for step in range(40):
        batch, _ = reader().next(Progress(step, 12.0, 0.1))
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
    quiet = [reader().next(Progress(step, 11.9, 0.1))[0].weights_BT.max() for step in range(20)]
    assert set(quiet) == {1.0}, "none before the lengths have grown"


def test_a_rank_reads_its_rows_of_the_same_batch():
    whole, after = reader().next(Progress(33, 12.0, 0.1))
    part, _ = reader(rows=slice(2, 4)).next(Progress(33, 12.0, 0.1))
    for name in ("tokens_BT", "labels_BT", "starts_BT", "weights_BT", "loss_weights_BT"):
        assert np.array_equal(getattr(part, name), getattr(whole, name)[2:4])
    assert after == Progress(34, 12.0, 0.1) and reader().parse(after.to_json()) == after
    assert not np.array_equal(whole.tokens_BT, reader().next(after)[0].tokens_BT)
