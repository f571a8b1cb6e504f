"""Passkey texts: exact lengths and places in any tokenizer's tokens, as pure functions of a generator."""

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.tokenizer import TokenizerOptions, train_tokenizer
from infini_train.config.errors import ConfigError
from infini_train.data.synthetic.passkey import PasskeyWriter, choose_before
from infini_train.data.synthetic.wordings import SENTENCES, WORDINGS, find_wording
from infini_train.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer

PROSE = " ".join(f"{t.intro} {' '.join(t.filler)} {t.key} {t.question} 0123456789." for t in WORDINGS.values())
HARBOUR = PasskeyWriter(ByteTokenizer(), WORDINGS["harbour"])
KINDS = ("byte", "bpe", "unigram", "foreign")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Bytes; two as infini-data trains them; one that adds a space before a text and has no bytes."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in ("bpe", "unigram"):
        train_tokenizer([PROSE] * 3, folder / f"{kind}.model", TokenizerOptions(vocab_size=360, kind=kind, threads=1))
    train_foreign(folder / "foreign.model", split_digits=True)
    models = {kind: SentencePieceTokenizer(folder / f"{kind}.model") for kind in KINDS[1:]}
    return {"byte": ByteTokenizer(), **models}


def train_foreign(path: Path, text: str = PROSE, **options: object) -> None:
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text] * 3),
            model_writer=file,
            vocab_size=140,
            character_coverage=1.0,
            minloglevel=2,
            **options,
        )


def in_words(wording: str, key: str, before: str, after: str) -> str:
    text = WORDINGS[wording]
    return f"{text.intro}{before} {text.key.format(key=key)}{after} {text.question} {key}"


# ------------------------------------------------------------------------------------------------------------ contents


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wording", WORDINGS)
def test_a_text_is_what_the_tokenizer_makes_of_its_words(kind, wording, tokenizers):
    """Two rounds of filler before the key and one after it, nothing cut."""
    tokenizer = tokenizers[kind]
    writer = PasskeyWriter(tokenizer, WORDINGS[wording], 7)
    filler = " " + " ".join(WORDINGS[wording].filler)
    words = in_words(wording, "9041552", 2 * filler, filler)
    expected = tokenizer.encode(words)
    round_tokens = (len(expected) - writer.min_tokens) // 3
    text = writer.place(np.array([9, 0, 4, 1, 5, 5, 2]), len(expected), 2 * round_tokens)
    assert text.ids.tolist() == expected.tolist()
    assert tokenizer.decode(text.ids) == words


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(data=st.data())
def test_lengths_and_spans_are_exact(kind, data, tokenizers):
    tokenizer = tokenizers[kind]
    writer = PasskeyWriter(
        tokenizer, WORDINGS[data.draw(st.sampled_from(list(WORDINGS)))], data.draw(st.integers(1, 12))
    )
    length = writer.min_tokens + data.draw(st.integers(0, 700))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    position, jitter = data.draw(st.floats(0, 1)), data.draw(st.integers(0, 200))
    text = writer.compose(random, length, position, jitter_tokens=jitter)
    assert text.tokens == len(text.ids) == length and text.ids.dtype == np.int32
    key = "".join(map(str, text.digits))
    for span in (text.spans.first_mention, text.spans.second_mention, text.spans.answer):
        assert span.stop - span.start == writer.digits
        assert text.ids[span].tolist() == text.answer_ids.tolist()
        assert tokenizer.decode(text.ids[span]).strip() == key == writer.spell(text.ids[span])
    assert tokenizer.decode(text.ids[text.spans.key]).strip() == writer.text.key.format(key=key)
    assert tokenizer.decode(text.ids[text.spans.question]).strip() == writer.text.question
    assert text.spans.question.stop == text.spans.answer.start and text.spans.answer.stop == length
    assert writer.spell(text.ids).count("?") == length - 3 * writer.digits, "filler and words hold no digits"


@settings(max_examples=60)
@given(data=st.data())
def test_any_part_can_be_read(data):
    writer = HARBOUR
    text = writer.compose(np.random.default_rng(0), writer.min_tokens + data.draw(st.integers(0, 400)), 0.3)
    start = data.draw(st.integers(0, text.tokens))
    stop = data.draw(st.integers(start, text.tokens))
    assert text.read(start, stop).tolist() == text.ids[start:stop].tolist()


def test_the_same_words_around_other_filler():
    writer = PasskeyWriter(ByteTokenizer(), WORDINGS["paper"])
    other = writer.refill(["One.", "Two and three."])
    key, length = np.array([1, 2, 3, 4, 5]), writer.min_tokens + 40
    words = ByteTokenizer().decode(other.place(key, length, 20).ids)
    assert words == in_words("paper", "12345", " One. Two and three.", " One. Two and three.")
    assert writer.text == WORDINGS["paper"] and "green" in ByteTokenizer().decode(writer.place(key, length, 20).ids)
    tests = [sentence for text in WORDINGS.values() for sentence in text.filler]
    assert len(set(SENTENCES)) == len(SENTENCES) and not set(SENTENCES) & set(tests)
    assert not any(letter.isdigit() for sentence in SENTENCES for letter in sentence)


def test_a_text_of_any_length_takes_no_memory():
    writer = PasskeyWriter(ByteTokenizer(), WORDINGS["paper"])
    text = writer.compose(np.random.default_rng(0), 10**13, 0.5)
    end = ByteTokenizer().decode(text.read(10**13 - 80, 10**13))
    assert end.endswith(f" What is the pass key? The pass key is {''.join(map(str, text.digits))}")
    key = text.spans.key
    assert key.start == pytest.approx(5 * 10**12, rel=1e-9)
    assert (
        text.read(key.start, key.stop).tobytes()
        == ByteTokenizer().encode(" " + writer.text.key.format(key="".join(map(str, text.digits)))).tobytes()
    )


def test_a_text_is_a_function_of_the_generator():
    writer = PasskeyWriter(ByteTokenizer(), WORDINGS["paper"])

    def draw(seed: int) -> list[list[int]]:
        random = np.random.default_rng(seed)
        return [writer.compose(random, 600, 0.5, jitter_tokens=32).ids.tolist() for _ in range(3)]

    assert draw(1) == draw(1) != draw(2)
    assert len(set(map(tuple, draw(1)))) == 3


def test_every_digit_comes_as_often_in_every_place():
    writer, random = PasskeyWriter(ByteTokenizer(), WORDINGS["paper"]), np.random.default_rng(0)
    keys = np.array([writer.compose(random, writer.min_tokens, 0).digits for _ in range(2000)])
    for place in range(5):
        assert np.abs(np.bincount(keys[:, place], minlength=10) - 200).max() < 60


# -------------------------------------------------------------------------------------------------------------- places


@given(
    filler=st.integers(0, 10**7), position=st.floats(0, 1), jitter=st.integers(0, 4096), share=st.floats(0, 1 - 1e-9)
)
def test_the_key_lies_where_it_was_asked_for(filler, position, jitter, share):
    before = choose_before(filler, position, jitter, share)
    assert 0 <= before <= filler
    window = min(max(jitter, 1), filler + 1)
    assert abs(before - position * filler) <= window
    if position == 0:
        assert before < window
    if position == 1:
        assert before > filler - window


@pytest.mark.parametrize("position", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("filler", [20, 500])
def test_the_jitter_takes_every_place_of_its_window_alike(position, filler):
    places = [choose_before(filler, position, 16, share / 1600) for share in range(1600)]
    values, counts = np.unique(places, return_counts=True)
    assert len(values) == 16 == values[-1] - values[0] + 1
    assert (counts == 100).all()


def test_composed_keys_take_every_phase_of_a_segment():
    writer, random = PasskeyWriter(ByteTokenizer(), WORDINGS["paper"]), np.random.default_rng(0)
    for position in (0.0, 0.5, 1.0):
        texts = [writer.compose(random, 3000, position, jitter_tokens=32) for _ in range(400)]
        assert {text.spans.first_mention.start % 32 for text in texts} == set(range(32))
        fixed = {writer.compose(random, 3000, position).spans.first_mention.start for _ in range(5)}
        assert len(fixed) == 1, "no jitter, one place"


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_wordings_share_no_filler():
    sentences = [sentence for text in WORDINGS.values() for sentence in text.filler]
    assert len(set(sentences)) == len(sentences)
    assert all(name == text.name and PROSE.isascii() for name, text in WORDINGS.items())
    with pytest.raises(ConfigError, match=r"^papr: no such wording; choose one of paper, harbour, "):
        find_wording("papr")


@pytest.mark.parametrize("digits", ["12345 67 890 12 34 56 78 90 123 ", ""], ids=["joined", "unknown"])
def test_a_tokenizer_that_can_not_write_digits_is_refused(digits, tmp_path):
    """Groups of digits in one token; or no digits at all, which become the unknown token."""
    train_foreign(tmp_path / "t.model", PROSE.replace("0123456789.", digits) + 20 * digits)
    with pytest.raises(ConfigError, match=r"^tokenizer: doesn't write each digit as a token of its own"):
        PasskeyWriter(SentencePieceTokenizer(tmp_path / "t.model"), WORDINGS["paper"])
