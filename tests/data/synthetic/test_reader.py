"""Needle, recall and BABILong texts as training windows: exact layout, the same for any split of lanes, resumable."""

import dataclasses
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from infini_train.config.attention import FullConfig
from infini_train.config.data import BabilongConfig, DataConfig, NeedlesConfig, RecallConfig
from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run
from infini_train.data.lanes import IGNORED
from infini_train.data.source import open_reader, open_source, text_segment
from infini_train.data.synthetic.babilong_maker import BabilongMaker
from infini_train.data.synthetic.needle_maker import NeedleMaker
from infini_train.data.synthetic.needles import THINGS
from infini_train.data.synthetic.reader import Difficulty, Progress, SyntheticReader
from infini_train.data.synthetic.recall_maker import FIRST_PAIR, KEYS, VALUES, VOCABULARY, RecallMaker
from infini_train.data.tokenizer import ByteTokenizer, load_tokenizer

BOS, PAD = ByteTokenizer.bos_id, ByteTokenizer.pad_id
LANES, WINDOW, SEGMENT = 4, 1280, 64
LONGEST_ROUND = len(". What is the pass key of the notebook? The pass key of the notebook is 12345")
NEEDLES = NeedlesConfig(
    tasks=("single", "multikey", "multivalue", "multiquery", "variables"), needles=5, grow_below_loss=0.5
)


NEEDLE = (
    r" The pass key is \d+\. Remember it\. \d+ is the pass key\."
    r"| The pass key of the \w+ is \d+\. Remember it\. \d+ is the pass key of the \w+\.| VAR \w+ = (VAR )?\w+\."
)


def reader_of(kind: str, rows: slice = slice(None)) -> SyntheticReader:
    if kind == "needles":
        maker = NeedleMaker(NEEDLES, WINDOW, SEGMENT, ByteTokenizer())
    elif kind == "babilong":
        maker = BabilongMaker(BabilongConfig(grow_below_loss=0.5), WINDOW, SEGMENT, ByteTokenizer())
    else:
        joined = kind == "recall"
        maker = RecallMaker(
            RecallConfig(min_pairs=3, max_pairs=100, joined=joined, grow_below_loss=0.5), WINDOW, SEGMENT
        )
    return SyntheticReader(maker, LANES, WINDOW, SEGMENT, 7, rows)


@pytest.fixture(params=["needles", "recall", "recall, two tokens", "babilong"])
def kind(request) -> str:
    return request.param


def windows(reader: SyntheticReader, position: Progress, count: int):
    for _ in range(count):
        batch, position = reader.next(position)
        yield batch, position


def test_lanes_are_independent_of_the_ranks(kind):
    whole, _ = reader_of(kind).next(Progress(3, 9.0, 1.0))
    for rows in (slice(0, 1), slice(1, 4)):
        part, _ = reader_of(kind, rows).next(Progress(3, 9.0, 1.0))
        for name in ("tokens_BT", "labels_BT", "starts_BT", "weights_BT", "loss_weights_BT"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[rows])


def test_a_resumed_reader_goes_on_with_the_next_batch(kind):
    reader = reader_of(kind)
    first = list(windows(reader, reader.start(), 4))
    again = reader_of(kind)
    position = again.parse(json.loads(json.dumps(first[1][1].to_json())))
    for (batch, after), (other, then) in zip(first[2:], windows(again, position, 2), strict=True):
        np.testing.assert_array_equal(batch.tokens_BT, other.tokens_BT)
        assert after == then
    assert not np.array_equal(first[0][0].tokens_BT, first[1][0].tokens_BT)


def test_texts_grow_while_the_loss_is_low(kind):
    reader = reader_of(kind)
    position = reader.start()
    assert position.largest == reader.maker.min_size
    for _ in range(30):
        position = reader.observe_loss(position, 3.0)
    assert position.largest == reader.maker.min_size
    sizes = []
    for _ in range(200):
        position = reader.observe_loss(position, 0.1)
        sizes.append(position.largest)
    assert all(a <= b for a, b in pairwise(sizes)) and sizes[-1] == reader.maker.max_size
    assert reader.mix(position) == {"texts/largest": reader.maker.max_size}


def texts_of(batch, row: int) -> list[slice]:
    begins = [*np.flatnonzero(batch.starts_BT[row]), WINDOW]
    return [slice(a, b) for a, b in pairwise(begins)]


@pytest.mark.parametrize("longest", [5.0, 20.0])
def test_needle_windows_hold_whole_texts(longest):
    reader = reader_of("needles")
    for step in range(6):
        batch, _ = reader.next(Progress(step, longest, 1.0))
        assert (batch.starts_BT.nonzero()[1] % SEGMENT == 0).all()
        assert ((batch.labels_BT == IGNORED) == (batch.loss_weights_BT == 0)).all()
        for row in range(LANES):
            for place in texts_of(batch, row):
                used = int((batch.weights_BT[row, place] > 0).sum())
                tokens, labels = batch.tokens_BT[row, place], batch.labels_BT[row, place]
                assert tokens[0] == BOS and (tokens[1:used] == labels[: used - 1]).all()
                assert (tokens[used:] == PAD).all() and (labels[used:] == IGNORED).all()
                weights = batch.loss_weights_BT[row, place][:used]
                answer = weights > 2 * NEEDLES.text_weight / used
                assert weights[answer].sum() == pytest.approx(1.0, rel=1e-5) and answer[-1]
                assert weights[~answer].sum() < NEEDLES.text_weight
                prompt, said = (bytes(labels[:used][part].tolist()).decode() for part in (~answer, answer))
                assert all(word in prompt for word in said[1:].split(", "))


def test_pressure_spares_the_needles_once_texts_have_grown():
    config = dataclasses.replace(NEEDLES, pressure=64, pressure_share=0.5)
    reader = SyntheticReader(
        NeedleMaker(config, WINDOW, SEGMENT, ByteTokenizer()), LANES, WINDOW, SEGMENT, 7, slice(None)
    )
    seen = set()
    for step in range(12):
        plain, pressed = (
            reader_of("needles").next(Progress(step, 20.0, 1.0))[0],
            reader.next(Progress(step, 20.0, 1.0))[0],
        )
        first = texts_of(pressed, 0)[0]  # those after it are drawn from other numbers
        np.testing.assert_array_equal(plain.tokens_BT[0, first], pressed.tokens_BT[0, first])
        for row in range(LANES):
            for place in texts_of(pressed, row):
                weights = pressed.weights_BT[row, place]
                weights = weights[: int((weights > 0).sum())]
                text = ByteTokenizer().decode(pressed.tokens_BT[row, place][1 : len(weights)])
                spared = {0}
                for found in re.finditer(NEEDLE, text):
                    spared |= set(range((1 + found.start()) // SEGMENT, found.end() // SEGMENT + 1))
                for segment in range(-(-len(weights) // SEGMENT)):
                    of_it = weights[segment * SEGMENT : (segment + 1) * SEGMENT]
                    assert (of_it == (1 if segment in spared else weights.max())).all()
                assert (weights[:SEGMENT] == 1).all() and 1 <= weights.min() <= weights.max() <= 64 * WINDOW / len(
                    weights
                )
                seen.add(weights.max() > 1)
        assert reader.next(Progress(step, 19.9, 1.0))[0].weights_BT.max() == 1, "not before"
    assert seen == {False, True}


def test_further_questions_ask_for_other_needles():
    config = NeedlesConfig(needles=4, questions=3)
    maker = NeedleMaker(config, WINDOW, SEGMENT, ByteTokenizer())
    reader = SyntheticReader(maker, LANES, WINDOW, SEGMENT, 7, slice(None))
    asked_times, too_small = set(), 0
    for step in range(12):
        batch, _ = reader.next(Progress(step, 20.0, 1.0))
        for row in range(LANES):
            for place in texts_of(batch, row):
                labels, weights = batch.labels_BT[row, place], batch.loss_weights_BT[row, place]
                labels, weights = labels[labels != IGNORED], weights[labels != IGNORED]
                said = bytes(labels[weights > 2 * config.text_weight / len(labels)].tolist()).decode().split()
                text = bytes(labels.tolist()).decode()
                stored_pairs = dict(re.findall(r"The pass key of the (\w+) is (\d+)\. Remember", text))
                asked = re.findall(r"What is the pass key of the (\w+)\? The pass key of the \1 is (\d+)", text)
                assert len(stored_pairs) <= 4 and len({thing for thing, _ in asked}) == len(asked) <= 3
                assert [stored_pairs[thing] for thing, _ in asked] == [value for _, value in asked] == said
                room = -(-(1 + len(text)) // SEGMENT) * SEGMENT - 1
                assert len(asked) == min(len(stored_pairs), 3) or len(text) + LONGEST_ROUND > room, (
                    "another one would fit"
                )
                too_small += len(asked) < min(len(stored_pairs), 3)
                assert weights.sum() == pytest.approx(1 + config.text_weight, rel=0.1)
                assert len(labels) < place.stop - place.start
                asked_times.add(len(asked))
    assert asked_times == {1, 2, 3} and too_small


def write_tokenizer(path: Path, lines: list[str]) -> None:
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=400, byte_fallback=True, pad_id=3,
            split_digits=True, hard_vocab_limit=False, minloglevel=2, model_type="bpe"
        )  # fmt: skip


def test_needles_with_varied_words_and_digits():
    config = NeedlesConfig(
        needles=4, questions=2, digits=4, min_digits=2, varied_wording=True, haystack="assorted", min_segments=11
    )
    maker, usual, lengths = NeedleMaker(config, 1024, 16, ByteTokenizer()), 0, Counter()
    for seed in range(80):
        text = maker.compose(np.random.default_rng(seed), 64, 64, Difficulty(False, False))
        whole = ByteTokenizer().decode(text.ids)
        usual += "The pass key of the" in whole
        answers = ByteTokenizer().decode(np.where(text.loss_weights > 0.05, text.ids, ord(" "))).split()
        assert answers and len(set(map(len, answers))) == 1, "the values of a text have as many digits"
        lengths[len(answers[0])] += 1
    assert set(lengths) == {2, 3, 4} and min(lengths.values()) > 10 and 20 < usual < 60


def test_needles_in_the_tokens_of_a_file(tmp_path):
    path = tmp_path / "things.model"
    lines = [f" The pass key of the {thing} is 12. Remember it." for thing in THINGS]
    write_tokenizer(path, lines)
    tokenizer = load_tokenizer(path)
    config = load_run("passkey_no_conv")
    needles = NeedlesConfig(tokenizer=str(path), digits=2)
    config = dataclasses.replace(config, data=DataConfig(synthetic=needles))
    source = open_source(config)
    assert source.tokenizer_sha256 == tokenizer.sha256 and source.tokenizer.path == path
    assert source.vocab_size == tokenizer.vocab_size
    assert source.special_ids == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    reader = open_reader(source, config, slice(None), print)
    batch, _ = reader.next(Progress(0, 20.0, 1.0))
    counted = 0
    for row in range(len(batch.starts_BT)):
        for place in texts_of(batch, row):
            labels = batch.labels_BT[row, place]
            labels, weights = (x[labels != IGNORED] for x in (labels, batch.loss_weights_BT[row, place]))
            assert batch.tokens_BT[row, place.start] == tokenizer.bos_id
            text, said = (
                tokenizer.decode(labels),
                tokenizer.decode(labels[weights > 2 * needles.text_weight / len(labels)]),
            )
            assert re.search(r"What is the pass key of the \w+\? The pass key of the \w+ is \d\d$", text)
            assert re.fullmatch(r" ?\d\d", said) and f"is{text[-3:]}. Remember it" in text
            counted += len(text.encode())
    assert batch.n_bytes == counted


def test_the_tokenizer_may_move_but_not_change(tmp_path):
    config = load_run("passkey_no_conv")
    identities = []
    for name, thing in (("a/t.model", "lamp"), ("b/t.model", "lamp"), ("c/t.model", "bell")):
        (tmp_path / name).parent.mkdir()
        write_tokenizer(tmp_path / name, [f" the {thing} the {thing}s"] * 50)
        needles = NeedlesConfig(tokenizer=str(tmp_path / name))
        identities.append(open_source(dataclasses.replace(config, data=DataConfig(synthetic=needles))).identity)
    assert identities[0] == identities[1] != identities[2]


def test_a_missing_tokenizer_is_named():
    config = load_run("passkey_no_conv")
    config = dataclasses.replace(config, data=DataConfig(synthetic=NeedlesConfig(tokenizer="none.model")))
    with pytest.raises(ConfigError, match="data.synthetic.tokenizer: none.model: the tokenizer can't be read"):
        open_source(config)


@pytest.mark.parametrize("longest", [3.0, 40.0, 100.0])
@pytest.mark.parametrize("form", ["recall", "recall, two tokens"])
def test_recall_windows_ask_for_every_pair_behind_an_edge(longest, form):
    reader, joined = reader_of(form), form == "recall"
    for step in range(6):
        batch, _ = reader.next(Progress(step, longest, 1.0))
        for row in range(LANES):
            for place in texts_of(batch, row):
                tokens, labels = batch.tokens_BT[row, place], batch.labels_BT[row, place]
                asked = np.flatnonzero(labels != IGNORED)
                pairs = len(asked)
                stored = pairs if joined else 2 * pairs
                keys, values = divmod(tokens[1 : pairs + 1] - FIRST_PAIR, VALUES)
                keys, values = (keys, KEYS + values) if joined else (tokens[1:stored:2], tokens[2 : stored + 1 : 2])
                stored_pairs = dict(zip(keys.tolist(), values.tolist(), strict=True))
                assert len(stored_pairs) == pairs <= longest
                assert (
                    0
                    <= min(stored_pairs)
                    <= max(stored_pairs)
                    < KEYS
                    <= min(stored_pairs.values())
                    <= max(stored_pairs.values())
                    < FIRST_PAIR
                )
                assert [stored_pairs[key] for key in tokens[asked].tolist()] == labels[asked].tolist()
                assert sorted(tokens[asked].tolist()) == sorted(stored_pairs)
                assert asked[0] % SEGMENT == 0 and asked[0] >= stored + 1
                assert batch.loss_weights_BT[row, place].sum() == pytest.approx(1.0)
                written = np.flatnonzero(batch.weights_BT[row, place])
                assert written.tolist() == list(range(1, stored + 1)), "nothing but the pairs"
                assert tokens.max() < VOCABULARY


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="data.synthetic.max_pairs: 100 pairs .* take 384 tokens in segments of 64"):
        RecallMaker(RecallConfig(max_pairs=100), 320, SEGMENT)
    with pytest.raises(ConfigError, match="data.synthetic.min_segments: 1 segments of 64 tokens can't hold a text of"):
        NeedleMaker(NeedlesConfig(min_segments=1), WINDOW, SEGMENT, ByteTokenizer())
    with pytest.raises(ConfigError, match="data.synthetic.haystack: none.txt can't be read"):
        NeedleMaker(NeedlesConfig(haystack="none.txt"), WINDOW, SEGMENT, ByteTokenizer())
    for message, make in (
        ("data.synthetic.max_pairs: must lie between min_pairs", lambda: RecallConfig(min_pairs=9, max_pairs=8)),
        ("data.synthetic.max_pairs: must lie between", lambda: RecallConfig(max_pairs=129)),
        ("data.synthetic.tasks: give at least one", lambda: NeedlesConfig(tasks=())),
        ("data.synthetic.needles: must be positive", lambda: NeedlesConfig(needles=0)),
        ("data.synthetic.digits: there are not 11 different values", lambda: NeedlesConfig(needles=11, digits=1)),
        ("data.synthetic.questions: only multikey has", lambda: NeedlesConfig(questions=2, tasks=("variables",))),
        ("data.synthetic.min_digits: must lie between 1 and data.synt", lambda: NeedlesConfig(digits=2, min_digits=3)),
        ("data.synthetic.min_digits: there are not 11 diff", lambda: NeedlesConfig(needles=11, digits=2, min_digits=1)),
        ("data.synthetic.questions: can't be more than data.synthetic.needles", lambda: NeedlesConfig(questions=5)),
        ("data.synthetic.pressure: must be at least 1", lambda: NeedlesConfig(pressure=0.5)),
        ("data.synthetic.pressure_share: must lie between 0 and 1", lambda: NeedlesConfig(pressure_share=2)),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


def test_texts_lie_on_the_models_segments_or_on_parts_of_the_window():
    config = load_run("recall")
    assert text_segment(config) == config.model.segment_tokens == 16
    full = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=FullConfig()))
    for window, segment in ((416, 52), (1280, 64), (1000, 50)):
        train = dataclasses.replace(config.train, window_tokens=window)
        assert text_segment(dataclasses.replace(full, train=train)) == segment


def test_pairs_need_their_own_vocabulary():
    assert open_source(load_run("recall")).vocab_size == VOCABULARY == 1283
    assert open_source(load_run("passkey_no_conv")).vocab_size == ByteTokenizer.vocab_size
