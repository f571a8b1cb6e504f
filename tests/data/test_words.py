"""Words of any script: as `str.split` where there are spaces, characters where there are none."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infini_train.data.words import has_unspaced_words, plain_words, words


@settings(max_examples=200, derandomize=True)
@given(st.text(st.characters(max_codepoint=0x0E00)))
def test_texts_of_scripts_with_spaces_are_split_at_them(text):
    assert words(text) == text.split() and not has_unspaced_words(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("今天，GPU 很快。", ["今", "天，", "GPU", "很", "快。"]),
        ("スーパー", ["ス", "ー", "パ", "ー"]),
        ("ดีที่", ["ดี", "ที่"]),
        ("ខ្មែរ\u200bល្អ", ["ខ្", "មែ", "រ", "ល្", "អ"]),
        ("བཀྲ་ཤིས།", ["བཀྲ", "ཤིས།"]),
        ("ሰላም፡ዓለም", ["ሰላም", "ዓለም"]),
        ("한국어 문장", ["한국어", "문장"]),
    ],
)
def test_where_there_are_no_spaces_characters_are_words(text, expected):
    assert words(text) == expected and words(f" x {text}\n") == ["x", *expected]


@settings(max_examples=200, derandomize=True)
@given(st.text(st.characters(exclude_categories=("Cs", "Cn"))))
def test_no_letter_is_lost_and_every_plain_word_has_one(text):
    assert [char for char in "".join(words(text)) if char.isalnum()] == [char for char in text if char.isalnum()]
    assert all(any(char.isalpha() or char.isnumeric() for char in word) for word in plain_words(text))
