"""Cutting texts for the tokenizer: the ids are those of the whole text, for whatever model a cut is made."""

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from infini_train.data.cuts import SPACE_SYMBOL, Cuts, cuts_of, parse_model
from infini_train.data.pieces import PieceTable
from infini_train.data.tokenizer import SentencePieceTokenizer

TEXTS = ["the cat sat on the mat\n\n\tand so on, and on\n", "a cat; a mat 12 24\nel niño 你好 你们\n"] * 40
EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
MODELS = {
    "ours": {"byte_fallback": True, "add_dummy_prefix": False, "allow_whitespace_only_pieces": True, **EXACT},
    "dummy prefix": {"byte_fallback": True, **EXACT},
    "no bytes": {"add_dummy_prefix": False, **EXACT},
    "symbols": {"byte_fallback": True, "add_dummy_prefix": False, "user_defined_symbols": ["\n\n", "on,"], **EXACT},
    "across spaces": {"byte_fallback": True, "add_dummy_prefix": False, "split_by_whitespace": False, **EXACT},
}
ALPHABET = [
    "a cat that sat on the mat",
    "not_a_short_piece_at_all",
    *"the catmniou 12\n\t,;zé你好们🙂",
    "\n\n",
    "on,",
    "  ",
    "cat ",
    "the ",
    "<s>",
]


def train(path, model_type="bpe", **options) -> SentencePieceTokenizer:
    vocab_size = 330 if options.get("byte_fallback") else 60
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=file,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
    return SentencePieceTokenizer(path)


@pytest.fixture(scope="module", params=MODELS)
def tokenizer(request, tmp_path_factory) -> SentencePieceTokenizer:
    return train(tmp_path_factory.mktemp("t") / "t.model", **MODELS[request.param])


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.lists(st.sampled_from(ALPHABET), max_size=60).map("".join), max_size=4),
    size=st.integers(1, 99),
    remembered=st.sampled_from([3, 1 << 18]),
)
def test_the_ids_are_those_of_the_whole_text(tokenizer, texts, size, remembered) -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    cuts = tokenizer.piece_encoder.cuts
    for text in texts:
        slabs = list(cuts.slabs(text, size))
        assert "".join(slabs) == text and all(slabs)
    marked = [f"{tokenizer.around[0]}{text}" if text else "" for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infini_train.data.pieces._REMEMBERED_PIECES", remembered)
        patch.setattr("infini_train.data.pieces._LONG_CHARS", remembered)
        for _ in range(2):  # the second time all pieces are known, or forgotten
            found = tokenizer.piece_encoder.encode(marked, slab_chars=size)
            assert [ids.tolist() for ids in found] == [model.encode(text) for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode_many(texts)] == [model.encode(text) for text in texts]


def test_what_is_remembered_is_bounded(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("infini_train.data.pieces._REMEMBERED_PIECES", 50)
    encoder = tokenizer.piece_encoder
    for i in range(100):
        text = f"the cat {i * i} sat on {i} mats, {i % 7}\n"
        (found,) = encoder.encode([text])
        assert found.tolist() == tokenizer._inner.encode(text)
        assert len(encoder._counts) <= 50 + len(text) and encoder._ids.size < 500


def test_where_cuts_are() -> None:
    def pieces(cuts: Cuts, text: str, size: int) -> list[str]:
        return list(cuts.slabs(text, size))

    cuts = Cuts(frozenset(["aa", "ab"]), None)
    assert pieces(cuts, "a" * 5000, 100) == ["a" * 5000] and pieces(cuts, "", 1) == []
    assert pieces(cuts, "aaaabbbb", 3) == ["aaaabb", "bb"] and cuts.mask("xyaab").tolist() == [1, 1, 0, 0, 1]
    unknown = Cuts(frozenset(), frozenset("x"))  # neighbours become one <unk>
    assert pieces(unknown, "yyyyxyyy", 2) == ["yyyy", "x", "yyy"]
    symbol = f"y{SPACE_SYMBOL}{SPACE_SYMBOL}y"
    assert unknown.mask(symbol).all() and cuts.mask(symbol).all()


def check_short_texts(tokenizer) -> None:
    """`encode` has a short way for them."""
    whole = "".join(TEXTS)
    for text in [
        "",
        " ",
        "a",
        "\n\n x  ",
        *TEXTS,
        *(whole[i : i + size] for size in (50, 999, 1000, 1001) for i in (0, 7)),
    ]:
        (expected,) = tokenizer.encode_many([text])
        np.testing.assert_array_equal(tokenizer.encode(text), expected)


def test_short_texts_have_the_same_ids(tokenizer) -> None:
    check_short_texts(tokenizer)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", **MODELS["ours"]},
        {**MODELS["ours"], "normalization_rule_name": "nmt_nfkc"},
        {**MODELS["ours"], "remove_extra_whitespaces": True},
        {**MODELS["dummy prefix"], "treat_whitespace_as_suffix": True},
    ],
    ids=["unigram", "normalising", "spaces removed", "suffix"],
)
def test_nothing_is_cut_without_proof(tmp_path, options) -> None:
    tokenizer = train(tmp_path / "t.model", **options)
    assert cuts_of(parse_model(tokenizer.model_bytes)) is None and tokenizer.piece_encoder is None
    text = "".join(TEXTS)
    assert tokenizer.encode(text).tolist() == tokenizer._model.encode(text)
    check_short_texts(tokenizer)


def test_the_space_symbol_in_a_text_keeps_its_bytes(tokenizer) -> None:
    if not tokenizer._model.is_byte(tokenizer._symbol_ids[0].item()):
        pytest.skip("this model has no bytes")
    text = f"a {SPACE_SYMBOL}{SPACE_SYMBOL} cat"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=50, deadline=None)
@given(keys=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=60), slots=st.sampled_from([6, 20]))
def test_the_table_tells_all_keys_apart(keys, slots) -> None:
    """In a table of 64 slots most keys find theirs taken."""
    distinct = list(dict.fromkeys(keys))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infini_train.data.pieces._SLOT_BITS", slots)
        table, known = PieceTable(), len(distinct) // 2
        low, high = (np.array([key[i] for key in distinct], np.uint64) for i in (0, 1))
        for some in (slice(0, known // 2), slice(known // 2, known)):
            table.add(low[some], high[some], np.arange(known)[some])
        expected = [*range(known), *[-1] * (len(distinct) - known)]
        assert table.find(low, high).tolist() == expected
