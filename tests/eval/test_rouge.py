"""ROUGE of texts in any script; of ASCII texts exactly rouge-score's own numbers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infini_train.eval.rouge import MEASURES, lead, make_scorer

pytest.importorskip("rouge_score")


@pytest.fixture(scope="module")
def scorer():
    return make_scorer()


def test_rouge_by_hand(scorer):
    found = scorer("the cat sat on the mat", "the cats sit on a mat")
    # stems: the cat sat on the mat / the cat sit on a mat: the, cat, on, mat in common, of 6 each; one pair of 5
    assert found == pytest.approx({"rouge1": 4 / 6, "rouge2": 1 / 5, "rougeL": 4 / 6})
    assert scorer("a b", "") == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


@settings(max_examples=100, derandomize=True)
@given(st.lists(st.text(st.characters(max_codepoint=127), max_size=40), min_size=2, max_size=2))
def test_ascii_texts_score_as_with_rouge_score_alone(scorer, texts):
    from rouge_score.rouge_scorer import RougeScorer

    expected = RougeScorer(list(MEASURES), use_stemmer=True).score(*texts)
    assert scorer(*texts) == {name: score.fmeasure for name, score in expected.items()}


@pytest.mark.parametrize(
    ("reference", "summary", "rouge1"),
    [
        ("Кот сидит на окне", "кот спит на окне", 3 / 4),
        ("बिल्ली खिड़की पर बैठी है", "बिल्ली खिड़की पर सोती है", 4 / 5),
        ("l'été où il naît", "l'été ou il naît", 4 / 5),
        ("l'e\u0301te\u0301", "l'été", 1),  # decomposed and composed
        ("القطة على النافذة", "القطة تحت النافذة", 2 / 3),
        ("猫坐在窗上", "猫睡在窗上", 4 / 5),
        ("แมวนอน", "แมวนั่ง", 2 * 3 / (6 + 5)),  # by characters with their marks: แ ม ว น อ น and แ ม ว นั่ ง
        ("می\u200cخواهم", "میخواهم", 1),  # with and without a joiner
        ("it cost 5 €", "it cost 6 €", 2 / 3),  # symbols are no words
    ],
)
def test_other_scripts_have_words_too(scorer, reference, summary, rouge1):
    assert scorer(reference, reference)["rouge1"] == 1
    assert scorer(reference, summary)["rouge1"] == pytest.approx(rouge1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A. B! C? D.", "A. B! C?"),
        ("A. B", "A. B"),
        ("no end", "no end"),
        ("", ""),
        ("一。二！三？四。", "一。二！三？"),
        ("एक। दो। तीन॥ चार।", "एक। दो। तीन॥"),
        ("واحد۔ اثنان؟ ثلاثة! أربعة", "واحد۔ اثنان؟ ثلاثة!"),
        ("አንድ። ሁለት። ሦስት። አራት።", "አንድ። ሁለት። ሦስት።"),
        ("တစ်။ နှစ်။ သုံး။ လေး။", "တစ်။ နှစ်။ သုံး။"),
        ("หนึ่ง สอง สาม สี่", "หนึ่ง สอง สาม"),
    ],
)
def test_lead_is_the_first_three_sentences(text, expected):
    assert lead(text) == expected
