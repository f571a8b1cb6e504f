"""Hay: what is read in pieces is what is read at once; prose comes from files, and bad files are refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from infini_train.config.errors import ConfigError
from infini_train.data.synthetic.haystack import HaystackSource, RepeatedHaystack, Stretch, encode_after, read_stretches
from infini_train.data.synthetic.wordings import SENTENCES, WORDS
from infini_train.data.tokenizer import ByteTokenizer, load_tokenizer

BYTE = ByteTokenizer()


def spell(ids) -> str:
    return BYTE.decode(ids)


@pytest.fixture(params=["repeated", "varied", "words", "tokens", "assorted", "prose"])
def source(request, tmp_path):
    if request.param != "prose":
        return HaystackSource(request.param, BYTE)
    (tmp_path / "essays.txt").write_text("One day the sea was calm. " * 3 + "Then it rose.\n\nNobody slept.")
    return HaystackSource(str(tmp_path / "essays.txt"), BYTE)


def test_any_piece_is_that_of_the_whole(source):
    whole = source.draw([3, 4]).read(0, 20_000)
    assert len(whole) == 20_000
    other = source.draw([3, 4])
    for start, stop in [(0, 1), (7, 7), (63, 64), (19_000, 20_000), (100, 9_000), (5, 6)]:
        np.testing.assert_array_equal(other.read(start, stop), whole[start:stop])


def test_seeds_give_other_hay(source):
    same = np.array_equal(source.draw([1]).read(0, 500), source.draw([2]).read(0, 500))
    assert same is (source.name == "repeated")


def test_varied_hay_is_sentences_and_does_not_come_back():
    ids = HaystackSource("varied", BYTE).draw([0]).read(0, 50_000)
    text = spell(ids)
    for sentence in SENTENCES:
        text = text.replace(f" {sentence}", "")
    assert len(text) < max(map(len, SENTENCES)) + 1, "only the last sentence may be cut"
    first = ids[:200].tobytes()
    assert ids.tobytes().count(first) == 1


def test_assorted_hay_is_one_of_three_sorts_a_text():
    source = HaystackSource("assorted", BYTE)
    texts = [source.draw([seed]).read(0, 400) for seed in range(40)]
    bytewise = sum((ids > 127).any() for ids in texts)
    prose = [spell(ids) for ids in texts if not (ids > 127).any()]
    sentences = sum("." in text for text in prose)
    assert 5 < bytewise < 25 and 5 < sentences < 25 and 5 < len(prose) - sentences < 25
    words = {word for text in prose if "." not in text for word in text.split()[1:-1]}
    assert len(words) > 200 and words <= set(WORDS)


def test_hay_of_tokens_has_every_token_that_is_text():
    assert set(HaystackSource("tokens", BYTE).draw([1]).read(0, 10_000).tolist()) == set(range(256))


def test_hay_of_tokens_has_no_token_for_unknown_text():
    tokenizer = load_tokenizer(Path(__file__).parents[3] / "models" / "needles-linear" / "tokenizer.model")
    found = set(HaystackSource("tokens", tokenizer).draw([1]).read(0, 60_000).tolist())
    ids = set(range(tokenizer.vocab_size))
    assert ids - found == {0, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}, "0 is the unknown token"


def test_prose_begins_anywhere_and_goes_round(tmp_path):
    rows = [{"text": "Abc."}, {"text": "  "}, {"text": "De."}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    source = HaystackSource(str(tmp_path / "a.jsonl"), BYTE)
    assert source.prose_tokens == 9
    found = {spell(source.draw([seed]).read(0, 9)) for seed in range(60)}
    assert found == {(" Abc. De." * 2)[i : i + 9] for i in range(9)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "none.txt",
            None,
            r"^.*none.txt can't be read \(No such file or directory\); give repeated, varied",
        ),
        ("empty.txt", b" \n", "^.*empty.txt holds no text"),
        ("broken.txt", b"\xff\xfe\x00", "^.*broken.txt is not UTF-8 text"),
        ("a.jsonl", b'{"body": "x"}\n', 'every line must be a JSON object with a "text" field'),
        ("b.jsonl", b"{\n", 'every line must be a JSON object with a "text" field'),
    ],
)
def test_files_without_prose_are_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        HaystackSource(str(tmp_path / name), BYTE)


def test_stretches_are_put_together():
    parts = [Stretch(RepeatedHaystack(np.arange(4)), 2, 5), Stretch(RepeatedHaystack(np.arange(10, 13)), 0, 3)]
    whole = [2, 3, 0, 1, 2, 10, 11, 12]
    for start in range(9):
        for stop in range(start, 9):
            assert read_stretches(parts, start, stop).tolist() == whole[start:stop]


def test_text_is_encoded_as_behind_a_sentence():
    assert spell(encode_after(BYTE, " a")) == " a"
