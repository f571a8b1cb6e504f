"""BABILong texts to train on: labels in the answers, all questions right, pressure that spares the facts."""

import dataclasses
import re

import numpy as np
import pytest

from infini_train.config.data import BabilongConfig
from infini_train.config.errors import ConfigError
from infini_train.data.lanes import IGNORED
from infini_train.data.synthetic.babi import TASKS
from infini_train.data.synthetic.babilong_maker import BabilongMaker
from infini_train.data.synthetic.reader import Difficulty
from infini_train.data.tokenizer import ByteTokenizer

BYTE = ByteTokenizer()
WINDOW, SEGMENT = 2048, 64
CONFIG = BabilongConfig(tasks=TASKS, max_facts=20, questions=3)
NEW, GROWN = Difficulty(False, False), Difficulty(False, True)
FACT = re.compile(
    r"(?:Daniel|John|Mary|Sandra|Bill|Fred|Jeff) [a-z ]+(?: to (?:Mary|Bill|Fred|Jeff))?\.|The \w+ is \w+ of the \w+\."
)
ROUND = re.compile(r"((?:Where|What|Who) (?:is|was|did|gave|received) [^.?!]*\?) Answer: (\w+)\.")


def maker_of(**changes) -> BabilongMaker:
    return BabilongMaker(dataclasses.replace(CONFIG, **changes), WINDOW, SEGMENT, BYTE)


@pytest.mark.parametrize("size", [5, 12, 32])
def test_each_question_is_answered_from_the_facts_and_only_answers_weigh(size, read_facts):
    maker, asked = maker_of(), 0
    for seed in range(40):
        text = maker.compose(np.random.default_rng(seed), size, 32, NEW)
        assert text.segments == size and (size - 1) * SEGMENT < len(text.ids) + 1 <= size * SEGMENT
        assert text.n_bytes == len(text.ids)
        np.testing.assert_array_equal(text.labels, text.ids)
        answer = text.loss_weights > 2 * CONFIG.text_weight / len(text.ids)
        assert text.loss_weights[answer].sum() == pytest.approx(CONFIG.answer_weight, rel=1e-4)
        assert text.loss_weights[~answer].sum() < CONFIG.text_weight
        said = BYTE.decode(text.ids)
        rounds = ROUND.findall(said)
        answers = BYTE.decode(np.where(answer, text.ids, ord("|")))
        assert re.findall(r"[^|]+", answers) == [f" {word}." for _, word in rounds]
        reader = read_facts(tuple(FACT.findall(said[: said.index(rounds[0][0])])))
        assert [reader.answer(question) for question, _ in rounds] == [word for _, word in rounds]
        assert 1 <= len(rounds) <= 3
        asked += len(rounds)
    assert asked > 60


def test_no_loss_is_taken_on_the_text_without_a_weight():
    text = maker_of(text_weight=0).compose(np.random.default_rng(0), 12, 32, NEW)
    assert ((text.labels == IGNORED) == (text.loss_weights == 0)).all()
    assert BYTE.decode(text.ids[text.labels != IGNORED]).count(".") in (1, 2, 3)


def test_pressure_comes_with_grown_texts_and_spares_the_facts():
    maker, seen = maker_of(pressure=64.0, pressure_share=1.0, tasks=("qa1",), max_facts=4), set()
    for seed in range(10):
        text = maker.compose(np.random.default_rng(seed), 32, 32, GROWN)
        plain = maker.compose(np.random.default_rng(seed), 32, 32, NEW)
        np.testing.assert_array_equal(text.ids, plain.ids)
        assert (plain.write_weights == 1).all()
        facts = {(m.start() + 1) // SEGMENT for m in FACT.finditer(BYTE.decode(text.ids))}
        pressed = set((np.flatnonzero(text.write_weights > 1) // SEGMENT).tolist())
        assert not facts & pressed and text.write_weights.max() <= 64 * 1.1
        seen |= pressed
    assert len(seen) > 20


def test_a_text_is_a_function_of_the_seed_and_fits_the_room():
    first, again = (maker_of().compose(np.random.default_rng(5), 20, 9, NEW) for _ in range(2))
    np.testing.assert_array_equal(first.ids, again.ids)
    assert first.segments == 9
    assert maker_of().compose(np.random.default_rng(5), 20, 3, NEW) is None


def test_what_does_not_fit_is_refused():
    for message, make in (
        ("data.synthetic.min_segments: 1 segments of 64 tokens can't hold a text", lambda: maker_of(min_segments=1)),
        ("data.synthetic.haystack: none.txt can't be read", lambda: maker_of(haystack="none.txt")),
        ("data.synthetic.tasks: give at least one", lambda: maker_of(tasks=())),
        ("data.synthetic.max_facts: must be at least 3", lambda: maker_of(max_facts=2)),
        ("data.synthetic.questions: must be positive", lambda: maker_of(questions=0)),
        ("data.synthetic.text_weight: must not be negative", lambda: maker_of(text_weight=-1)),
        ("data.synthetic.pressure: must be at least 1", lambda: maker_of(pressure=0.5)),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
