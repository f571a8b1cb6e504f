"""Training tokenizers: lossless for any text, bounded and even samples, clear refusals."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.tokenizer import TokenizerOptions, cut_text, sample_pieces, train_tokenizer
from infini_train.config.errors import ConfigError
from infini_train.data.tokenizer import SentencePieceTokenizer, decode_stream

WORDS = ["".join(random.Random(i).choices("abcdefghij", k=2 + i % 6)) for i in range(300)]
CORPUS = [
    f"def {' '.join(random.Random(i).choices(WORDS, k=9))}:\n    return {i}\n\n\tGrüße, 你好\r\n" for i in range(600)
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request, tmp_path_factory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("t") / "deep" / "t.model"
    train_tokenizer(CORPUS, path, TokenizerOptions(vocab_size=600, kind=request.param, threads=1))
    return SentencePieceTokenizer(path)


NASTY = st.lists(
    st.sampled_from([*"ab 1\t\n\r\0▁▅é你🙂\u2028\u3000\ufeff\ufffd<>/s0xA", "<s>", "<0x0A>", "  ", " ⁇ ", "<unk>"])
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(NASTY, st.text()))
def test_every_text_comes_back(tokenizer, text) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(decode_stream(tokenizer, ids)) == text
    assert not set(ids.tolist()) & {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, 0}


def test_long_texts_come_back_and_batches_equal_single_texts(tokenizer) -> None:
    texts = ["".join(CORPUS) * 2, "x" * 100_000, "", " ▁ " * 500, "\n" * 70_000]
    many = tokenizer.encode_many(texts, threads=2)
    assert [tokenizer.decode(ids) for ids in many] == texts
    assert all((tokenizer.encode(text) == ids).all() for text, ids in zip(texts, many, strict=True))


def test_ids_and_pieces(tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 3, 600)
    assert len(tokenizer.encode(" " * 4)) <= 2 and len(tokenizer.encode("\n")) == 1  # indentation is learned
    assert len(tokenizer.encode("2024")) == 4  # digits stand alone
    assert tokenizer.decode([1, *tokenizer.encode("ab").tolist(), 2, 3, 10**6]) == "ab"


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab\né你🙂")), limit=st.integers(4, 20))
def test_cut_pieces_join_and_are_small(text, limit) -> None:
    pieces = list(cut_text(text, limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= limit for piece in pieces)


def test_the_sample_is_bounded_even_and_repeatable() -> None:
    texts = [f"{i:05d}" for i in range(20_000)]
    sample = sample_pieces(iter(texts), 10_000, seed=1)
    assert sum(map(len, sample)) <= 10_000 < sum(map(len, sample)) + 5 and sample == sorted(sample)
    assert 800 < sum(int(s) < 10_000 for s in sample) < 1200  # of 2000, half from each half
    assert sample == sample_pieces(texts, 10_000, seed=1) != sample_pieces(texts, 10_000, seed=2)
    assert sample_pieces(texts[:9], 10_000, seed=1) == texts[:9]


def test_the_same_text_gives_the_same_tokenizer(tmp_path) -> None:
    for name in ("a", "b"):
        train_tokenizer(CORPUS, tmp_path / f"{name}.model", TokenizerOptions(vocab_size=400))
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 50_000}, r"too little text for 50000 tokens; use \d+ or fewer"),
        ({"vocab_size": 50_000, "kind": "unigram"}, r"too little text for 50000 tokens; use \d+ or fewer"),
        ({"vocab_size": 265}, r"265 can't hold the text's characters; use more than \d+"),
        ({"vocab_size": 100}, "100 is too small"),
    ],
)
def test_impossible_vocabularies_are_refused(tmp_path, options, message) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        train_tokenizer(CORPUS, tmp_path / "t.model", TokenizerOptions(**options))
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_the_largest_size_told_can_be_trained(tmp_path) -> None:
    for kind in ("bpe", "unigram"):
        with pytest.raises(ConfigError) as error:
            train_tokenizer(CORPUS, tmp_path / "t.model", TokenizerOptions(vocab_size=50_000, kind=kind))
        size = int(str(error.value).split("use ")[1].split()[0])
        train_tokenizer(CORPUS, tmp_path / f"{kind}.model", TokenizerOptions(vocab_size=size, kind=kind))
        assert SentencePieceTokenizer(tmp_path / f"{kind}.model").vocab_size == size


def test_a_tokenizer_is_not_replaced_unasked(tmp_path) -> None:
    (tmp_path / "t.model").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        train_tokenizer(CORPUS, tmp_path / "t.model", TokenizerOptions(vocab_size=300))
    with pytest.raises(ConfigError, match=r"name the tokenizer's file \*.model"):
        train_tokenizer(CORPUS, tmp_path / "t.bin", TokenizerOptions(vocab_size=300))
    train_tokenizer(CORPUS, tmp_path / "t.model", TokenizerOptions(vocab_size=300), overwrite=True)
    assert SentencePieceTokenizer(tmp_path / "t.model").vocab_size == 300
