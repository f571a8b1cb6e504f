"""Needle texts: every task says what it asks for, and what is laid out reads as it should, to the token."""

import re
from collections import Counter

import numpy as np
import pytest

from infini_train.data.synthetic.haystack import HaystackSource
from infini_train.data.synthetic.needle_wordings import NEEDLE_WORDINGS, draw_needle_wording, find_needle_wording
from infini_train.data.synthetic.needles import OWN_WORDING, TASKS, EncodedNeedles, draw_needles, find_words
from infini_train.data.tokenizer import ByteTokenizer

BYTE = ByteTokenizer()
HAY = HaystackSource("varied", BYTE)


def solve(text: str) -> list[str]:
    """The answer, read from the words of the text alone."""
    cut = max(text.rfind(f" {words}") for words in ("What is the pass key", "What are all", "Which variables"))
    body, question = text[:cut], text[cut + 1 :]
    if question.startswith("Which variables"):
        value = re.search(r"the value (\d+)", question)[1]
        known: dict[str, str] = {}
        for name, source in re.findall(r"VAR (\w+) = (\w+)\.", body):
            known[name] = known.get(source, source)
        return [name for name, found in known.items() if found == value]
    asked = re.search(r"keys? of the ([^?]*)\?", question)
    if asked is None:
        return re.findall(r"The pass key is (\d+)\.", body)
    things = re.split(r", | and ", asked[1])
    return [
        value
        for thing in things
        for value in re.findall(
            rf"pass key of the {thing} is (\d+)\. Remember it\. \1 is the pass key of the {thing}\.", body
        )
    ]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_text_holds_the_answer_and_the_layout_is_exact(task, count):
    for seed in range(20):
        random = np.random.default_rng(seed)
        needles = draw_needles(random, task, count, 5)
        encoded = EncodedNeedles(BYTE, needles, "Listen.")
        hay = int(random.integers(0, 900))
        before = np.sort(random.integers(0, hay + 1, len(needles.sentences))).tolist()
        text = encoded.place(HAY.draw([seed]), before, hay)
        ids = text.read(0, text.tokens)
        assert len(ids) == text.tokens == encoded.min_tokens + hay
        whole = BYTE.decode(ids)
        prompt, answer = BYTE.decode(ids[: text.prompt_tokens]), BYTE.decode(ids[text.prompt_tokens :])
        assert whole == prompt + answer and answer == " " + ", ".join(needles.answer)
        assert solve(prompt) == list(needles.answer)
        assert prompt.endswith(" " + needles.question) and whole[text.question_token :].startswith(
            f" {needles.question}"
        )
        for span, sentence in zip(text.needle_spans, needles.sentences, strict=True):
            assert whole[span] == f" {sentence}"
        bare = whole.replace(f" {needles.question}", "").replace("Listen.", "", 1)[: -len(answer)]
        for sentence in needles.sentences:
            bare = bare.replace(f" {sentence}", "", 1)
        assert bare == BYTE.decode(HAY.draw([seed]).read(0, hay)), "the hay continues after a needle where it stopped"
        cut = int(random.integers(0, text.tokens))
        np.testing.assert_array_equal(np.concatenate((text.read(0, cut), text.read(cut, text.tokens))), ids)


WORDED = [task for task in TASKS if task not in OWN_WORDING]


@pytest.mark.parametrize("name", NEEDLE_WORDINGS)
@pytest.mark.parametrize("task", WORDED)
def test_every_wording_tells_each_value_of_its_thing(task, name):
    for seed in range(20):
        needles = draw_needles(np.random.default_rng(seed), task, 3, 5, find_needle_wording(name))
        usual = draw_needles(np.random.default_rng(seed), task, 3, 5)
        assert needles.answer == usual.answer and needles.asked == usual.asked, "only the words differ"
        told = zip(sorted(needles.asked), sorted_values(usual), strict=True)
        assert all(value in needles.sentences[i] for i, value in told)
        assert not needles.question.startswith("What is the pass") or name == "pass_key"
        assert not re.search("[{}]", "".join((*needles.sentences, needles.question)))


def sorted_values(needles) -> list[str]:
    return [re.search(r"\d{5}", needles.sentences[i])[0] for i in sorted(needles.asked)]


def test_drawn_wordings_tell_and_ask_with_nothing_left_open():
    times = Counter()
    for seed in range(200):
        wording = draw_needle_wording(np.random.default_rng(seed))
        told = wording.needle.format(thing="<lamp>", value="<71>")
        assert told.count("<lamp>") == told.count("<71>") in (1, 2) and told.endswith(".")
        asked = wording.one.format(things="<lamp>")
        assert asked.count("<lamp>") in (1, 2) and not asked.endswith((" ", "?"))
        assert told.index("<lamp>") < told.index("<71>")
        times[told.count("<71>")] += 1
    assert min(times.values()) > 60, "once or twice"


@pytest.mark.parametrize("task", TASKS)
def test_needles_differ_where_they_must(task):
    for seed in range(50):
        needles = draw_needles(np.random.default_rng(seed), task, 6, 2)
        assert len(set(needles.answer)) == len(needles.answer)
        assert (
            len(set(needles.sentences))
            == len(needles.sentences)
            == (1 if task == "single" else 12 if task == "variables" else 6)
        )
        assert len(needles.answer) == (1 if task in ("single", "multikey") else 6)
        if task != "variables":
            assert [needles.sentences[i].count(word) for i, word in zip(needles.asked, needles.answer, strict=False)]
    assert draw_needles(np.random.default_rng(1), task, 3, 5) == draw_needles(np.random.default_rng(1), task, 3, 5)


@pytest.mark.parametrize(
    ("said", "expected"),
    [(" 123, 456", [True, True]), ("456 123", [True, True]), (" 1234, 456", [False, True]), ("", [False, False])],
)
def test_words_are_found_whole_and_in_any_order(said, expected):
    assert find_words(["123", "456"], said) == expected
