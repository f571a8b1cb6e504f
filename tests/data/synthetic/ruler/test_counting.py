"""Common and frequent words: repeats and frequencies are the published ones, and the answer is the commonest words."""

import math
import re
from collections import Counter

import pytest

from infini_train.data.synthetic.ruler.counting import DOTS
from infini_train.data.synthetic.ruler.tasks import TASKS
from infini_train.data.synthetic.ruler.words import ADJECTIVES, NOUNS, VERBS, WORDS
from infini_train.data.synthetic.ruler.writer import RulerWriter
from infini_train.data.tokenizer import ByteTokenizer


def read_lists(whole: str) -> list[Counter]:
    """The words of the example and of the list, each checked for its numbers."""
    found = []
    for part in whole.split("Question: Which 10 words")[:-1]:
        listed = re.findall(r"(\d+)\. ([a-z]+)", part.rsplit("often.\n", 1)[1])
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        found.append(Counter(word for _, word in listed))
    return found


@pytest.mark.parametrize(("length_tokens", "is_long"), [(4095, False), (9000, True), (30_000, True)])
def test_common_words_come_thirty_times_and_others_three(writer, read_whole, length_tokens, is_long):
    repeats = TASKS["cwe"].long if is_long else TASKS["cwe"].short
    for seed in range(2):
        text = writer.draft("cwe", length_tokens, 0, [seed]).place(length_tokens)
        whole = read_whole(text)
        example, counts = read_lists(whole)
        assert len(text.references) == 10
        assert {word for word, count in counts.items() if count == repeats.common} == set(text.references)
        assert {count for word, count in counts.items() if word not in text.references} == {repeats.uncommon}
        assert len(example) == repeats.example_words
        assert Counter(example.values()) == {
            repeats.example_common: 10,
            repeats.example_uncommon: repeats.example_words - 10,
        }
        solved = whole.split("in the list are:")[1].split("\n")[0]
        often = {word for word, count in example.items() if count == repeats.example_common}
        assert set(re.findall(r"\d+\. ([a-z]+)", solved)) == often
        assert whole.count("Here is a numbered list") == 2


def test_words_are_real_while_there_are_enough_and_always_different():
    writer = RulerWriter(ByteTokenizer(), None, {})
    for length_tokens, is_real in ((16_384, True), (200_000, False)):
        text = writer.draft("cwe", length_tokens, 0, [0]).place(length_tokens)
        _, counts = read_lists(bytes(text.read(0, text.prompt_tokens).tolist()).decode())
        assert (set(counts) <= set(WORDS)) is is_real
        assert (len(counts) > len(WORDS)) is not is_real
        assert set(Counter(counts.values())) == {30, 3}


def test_a_list_that_leaves_no_room_is_a_short_one():
    """Published lists need some 6,400 bytes."""
    text = RulerWriter(ByteTokenizer(), None, {}).draft("cwe", 4096, 0, [0]).place(4096)
    _, counts = read_lists(bytes(text.read(0, text.prompt_tokens).tolist()).decode())
    assert set(counts.values()) == {6, 1}


@pytest.mark.parametrize("length_tokens", [600, 2048, 40_000])
def test_frequencies_fall_as_a_zeta_distribution(writer, read_whole, length_tokens):
    for seed in range(2):
        text = writer.draft("fwe", length_tokens, 0, [seed]).place(length_tokens)
        body = read_whole(text).split(" often. ")[1].split("\nQuestion:")[0]
        counts = Counter(body.split(" "))
        ranked = counts.most_common()
        assert ranked[0][0] == DOTS and text.references == tuple(word for word, _ in ranked[1:4])
        assert ranked[3][1] > ranked[4][1], "the answer is unique"
        drawn = next(n for n in range(10**6) if int(n * 6 / math.pi**2) == ranked[0][1])
        fitting = [
            n
            for n in range(drawn, drawn + 3)
            if [int(n * 6 / math.pi**2 / rank**2) for rank in range(1, len(ranked) + 1)] == [c for _, c in ranked]
        ]
        assert fitting, "counts are draws * rank ** -2 / zeta(2), rounded down"
        assert all(re.fullmatch(r"[a-z]{6}", word) for word in counts if word != DOTS)
        assert len(counts) <= max((length_tokens - 50) // 50, 4)


def test_the_lists_of_words_are_words():
    assert min(map(len, (ADJECTIVES, NOUNS, VERBS))) > 200 and len(WORDS) > 900
    assert all(re.fullmatch(r"[a-z]+", word) for word in WORDS)
