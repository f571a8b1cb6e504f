"""Cutting texts for the tokenizer: the ids are those of the whole text, for whatever model a cut is made."""

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from infini_train.data.cuts import SPACE_SYMBOL, Cuts, cuts_of, parse_model
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
ALPHABET = [*"the catmniou 12\n\t,;zé你好们🙂", "\n\n", "on,", "  ", "cat ", "the ", "<s>"]


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


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.sampled_from(ALPHABET), max_size=60).map("".join), size=st.integers(1, 12))
def test_the_ids_are_those_of_the_whole_text(tokenizer, text, size) -> None:
    whole = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes).encode(text)
    cuts = tokenizer.cuts
    pieces = list(cuts(text, size))
    assert "".join(pieces) == text and all(pieces)
    tokenizer.cuts = lambda text: cuts(text, size)
    try:
        assert tokenizer.encode(text).tolist() == whole
        assert [ids.tolist() for ids in tokenizer.encode_many([text, "", text])] == [whole, [], whole]
    finally:
        tokenizer.cuts = cuts


def test_long_texts_are_cut_into_small_pieces(tokenizer) -> None:
    text = "".join(TEXTS) * 50
    pieces = list(tokenizer.cuts(text))
    assert max(map(len, pieces)) < 600 and len(pieces) > len(text) / 600
    assert np.array_equal(tokenizer.encode(text), tokenizer._model.encode(text))


def test_what_can_not_be_cut_stays_whole() -> None:
    cuts = Cuts(frozenset(["aa", "ab"]), None)
    assert list(cuts("a" * 5000)) == ["a" * 5000] and list(cuts("")) == []
    assert list(cuts("aaaabbbb", 3)) == ["aaaab", "bbb"]
    assert list(Cuts(frozenset(), frozenset("x"))("yyyyxyyy", 2)) == ["yyyy", "x", "yyy"]  # neighbours become one <unk>


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
    assert cuts_of(parse_model(tokenizer.model_bytes)) is None
    text = "".join(TEXTS)
    assert tokenizer.encode(text).tolist() == tokenizer._model.encode(text)


def test_the_space_symbol_in_a_text_keeps_its_bytes(tokenizer) -> None:
    if not tokenizer._model.is_byte(tokenizer._symbol_ids[0].item()):
        pytest.skip("this model has no bytes")
    text = f"a {SPACE_SYMBOL}{SPACE_SYMBOL} cat"
    assert tokenizer.decode(tokenizer.encode(text)) == text
