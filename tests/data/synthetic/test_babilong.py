"""BABILong texts: facts between sentences, in order, at any length, the same read whole or in parts; the scoring."""

import re
from pathlib import Path

import numpy as np
import pytest

from infini_train.data.synthetic.babi import TASKS, Round, draw_story
from infini_train.data.synthetic.babilong import EncodedStory, SentenceHay, draw_fitting, is_right
from infini_train.data.synthetic.needles import NeedleText
from infini_train.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

BYTE = ByteTokenizer()
MODELS = Path(__file__).parents[3] / "models"
PROSE = 'It was late, and he said: "Go home!" Nobody moved. Then (at last) the door opened... She left.\n' * 9


@pytest.fixture(params=["varied", "repeated", "prose"])
def hay(request, tmp_path) -> SentenceHay:
    (tmp_path / "prose.txt").write_text(PROSE)
    return SentenceHay(str(tmp_path / "prose.txt") if request.param == "prose" else request.param, BYTE)


def text_of(
    hay: SentenceHay, seed: int, hay_tokens: int, tokenizer: Tokenizer = BYTE
) -> tuple[NeedleText, EncodedStory]:
    random = np.random.default_rng(seed)
    story = EncodedStory(tokenizer, draw_story(random, TASKS[seed % len(TASKS)], 20))
    return story.place(random, hay, hay.draw([seed]), hay_tokens), story


@pytest.mark.parametrize("hay_tokens", [0, 10, 500, 3000])
def test_facts_stand_in_order_between_sentences(hay, hay_tokens):
    for seed in range(20):
        text, encoded = text_of(hay, seed, hay_tokens)
        assert text.tokens == encoded.min_tokens + hay_tokens
        said = BYTE.decode(text.read(0, text.tokens))
        facts, asked = encoded.story.facts, encoded.story.rounds[0]
        assert said.endswith(f" {asked.question} Answer: {asked.answer}.")
        assert BYTE.decode(text.read(0, text.prompt_tokens)).endswith("Answer:")
        found = [BYTE.decode(text.read(span.start, span.stop)) for span in text.needle_spans]
        assert found == [f" {fact}" for fact in facts]
        befores = [BYTE.decode(text.read(max(span.start - 2, 0), span.start)) for span in text.needle_spans]
        assert all(before == "" or re.search(r"[.!?][\"”)]?$", before) for before in befores), befores
        begin = said.removeprefix(f" {facts[0]}") if text.needle_spans[0].start == 0 else said
        assert hay_tokens == 0 or begin.startswith((" ", "\n", '"', "."))


def test_a_text_read_in_parts_is_the_text(hay):
    text, _ = text_of(hay, 3, 5000)
    whole = text.read(0, text.tokens)
    parts = [text.read(start, min(start + 7, text.tokens)) for start in range(0, text.tokens, 7)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_ten_million_tokens_are_made_as_they_are_read(hay):
    text, encoded = text_of(hay, 0, 10_000_000)
    assert text.tokens == 10_000_000 + encoded.min_tokens
    assert text.needle_spans[-1].stop > 1_000_000
    for span, fact in zip(text.needle_spans, encoded.story.facts, strict=True):
        assert BYTE.decode(text.read(span.start, span.stop)) == f" {fact}"
    assert BYTE.decode(text.read(text.question_token, text.tokens)).startswith(" Where is ")


def test_hay_without_sentences_is_cut_anywhere(tmp_path):
    (tmp_path / "list.txt").write_text("one two three " * 200)
    text, encoded = text_of(SentenceHay(str(tmp_path / "list.txt"), BYTE), 0, 2000)
    said = BYTE.decode(text.read(0, text.tokens))
    assert text.tokens == encoded.min_tokens + 2000
    places = [said.index(fact) for fact in dict.fromkeys(encoded.story.facts)]
    assert places == sorted(places)


def test_a_tokenizer_of_pieces_will_do():
    tokenizer = load_tokenizer(MODELS / "needles-linear" / "tokenizer.model")
    text, encoded = text_of(SentenceHay("varied", tokenizer), 0, 400, tokenizer)
    said = tokenizer.decode(text.read(0, text.tokens))
    assert all(f" {fact}" in said for fact in encoded.story.facts)


@pytest.mark.parametrize("task", TASKS)
def test_stories_are_shortened_until_they_fit(task):
    for seed in range(20):
        encoded = draw_fitting(np.random.default_rng(seed), BYTE, task, 60, 260)
        assert encoded.min_tokens <= 260


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (" kitchen.", True),
        ("Mary is in the KITCHEN. Not in the garden.", True),
        ("kitchens", True),
        ("the kitchen or the garden.", False),
        (" garden.", False),
        ("nowhere. kitchen", False),
        ("", False),
    ],
)
def test_an_answer_is_scored_as_published(said, right):
    assert is_right("qa1", Round("Where is Mary?", "kitchen"), said) is right


def test_words_of_the_question_do_not_count():
    asked = Round("Where was the apple before the garden?", "office")
    assert is_right("qa3", asked, "Before the garden it was in the office.")
    assert not is_right("qa3", asked, "The garden.")
    assert is_right("qa5", Round("What did Fred give to Bill?", "apple"), "Fred gave Bill the apple.")
