"""Tokenizers: bytes, model files, and text that comes token by token."""

import shutil

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from infini_train.config.errors import ConfigError
from infini_train.data.tokenizer import (
    ByteTokenizer,
    SentencePieceTokenizer,
    decode_stream,
    find_tokenizer,
    load_tokenizer,
)


def train(path, **options) -> None:
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat", "a cat, a mat"] * 9),
            model_writer=file,
            minloglevel=2,
            **options,
        )


@given(text=st.text())
def test_bytes_come_back(text) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text == "".join(decode_stream(tokenizer, ids))
    assert tokenizer.decode([256, *ids.tolist(), 257, 258]) == text
    assert tokenizer.encode_many([text, "é"])[1].tolist() == [0xC3, 0xA9]


def test_byte_tokenizer_is_fixed() -> None:
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (259, 256, 257, 258)
    assert tokenizer.decode([0xC3, 65]) == "\ufffdA"
    assert tokenizer.sha256 == ByteTokenizer().sha256 and len(tokenizer.sha256) == 64


def test_a_stream_holds_a_character_back_until_it_is_whole() -> None:
    tokenizer = ByteTokenizer()
    assert list(decode_stream(tokenizer, tokenizer.encode("a🙂b"))) == ["a", "🙂", "b"]
    assert list(decode_stream(tokenizer, [65, 0xF0, 0x9F])) == ["A", "\ufffd"]  # never finished: shown at the end


def test_foreign_models_work_with_their_own_spaces(tmp_path) -> None:
    train(tmp_path / "t.model", vocab_size=17)
    tokenizer = load_tokenizer(tmp_path / "t.model")
    ids = tokenizer.encode("the cat sat")
    assert tokenizer.decode(ids) == "the cat sat" == "".join(decode_stream(tokenizer, ids))
    assert tokenizer.pad_id == tokenizer.eos_id == 2  # the model has no pad


SPACED = ["the cat sat on the mat", "  the  cat", "a cat\nsat", "é🙂 the cat 🙂", "cat"]


def metaspace(folder):
    """A tokenizer.json in the way of Llama 2: the first space of a text is the tokenizer's own."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    model.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    names = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=names[:2], show_progress=False)
    model.train_from_iterator(["the cat sat on the mat"] * 9, trainer)
    model.add_tokens(names[2:])
    model.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder / "tokenizer.json")


def byte_level(folder):
    """A tokenizer.json in the way of GPT-2 and Llama 3."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator(["the cat sat on the mat"] * 9, trainer)
    model.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder / "tokenizer.json")


def sentencepiece_with(folder, **options):
    sizes = {"vocab_size": 300, "hard_vocab_limit": False, "byte_fallback": True, "model_type": "bpe"}
    train(folder / "t.model", **sizes, normalization_rule_name="identity", **options)
    return load_tokenizer(folder / "t.model")


STREAMED = {
    "bytes": lambda folder: ByteTokenizer(),
    "dummy prefix": lambda folder: sentencepiece_with(folder, remove_extra_whitespaces=False),
    "space as suffix": lambda folder: sentencepiece_with(
        folder, remove_extra_whitespaces=False, treat_whitespace_as_suffix=True
    ),
    "no prefix": lambda folder: sentencepiece_with(folder, remove_extra_whitespaces=False, add_dummy_prefix=False),
    "metaspace": metaspace,
    "byte level": byte_level,
}


@pytest.mark.parametrize("name", STREAMED)
def test_a_text_after_a_prompt_is_the_rest_of_both(name, tmp_path):
    """Wherever the prompt ends between two characters, its first new word keeps the space before it."""
    tokenizer = STREAMED[name](tmp_path)
    split = 0
    for text in SPACED:
        ids = [tokenizer.bos_id, *tokenizer.encode(text).tolist()]
        whole = tokenizer.decode(ids)
        for cut in range(1, len(ids) + 1):
            prompt = tokenizer.decode(ids[:cut])
            if not whole.startswith(prompt):
                continue  # in the middle of a character, or (space as suffix) before a space that is kept back
            assert prompt + "".join(decode_stream(tokenizer, ids[cut:], before=ids[:cut])) == whole
            split += 1
    assert split > 20


def test_models_that_do_not_fit_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        load_tokenizer(tmp_path / "t.model")
    for data in (b"", b"not a model", b"\0" * 100):
        (tmp_path / "t.model").write_bytes(data)
        with pytest.raises(ConfigError, match="is not a SentencePiece model"):
            SentencePieceTokenizer(tmp_path / "t.model")
    train(tmp_path / "t.model", vocab_size=16, bos_id=-1)
    with pytest.raises(ConfigError, match="has no bos or eos"):
        SentencePieceTokenizer(tmp_path / "t.model")


def test_the_right_tokenizer_is_found_beside_a_checkpoint_and_in_its_run(tmp_path):
    """Whatever else lies there; bytes need no file."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    for size in (15, 16):
        train(tmp_path / f"{size}.model", vocab_size=size)
    right = load_tokenizer(tmp_path / "15.model")
    own, beside = tmp_path / "run" / "tokenizer.model", checkpoint / "tokenizer.model"
    assert find_tokenizer(checkpoint, right.sha256, None) is None
    shutil.copyfile(tmp_path / "15.model", own)
    assert find_tokenizer(checkpoint, right.sha256, None)[1] == own
    shutil.copyfile(tmp_path / "16.model", beside)
    assert find_tokenizer(checkpoint, right.sha256, None)[1] == own
    shutil.copyfile(tmp_path / "15.model", beside)
    found, file = find_tokenizer(checkpoint, right.sha256, None)
    assert file == beside and found.sha256 == right.sha256
    assert find_tokenizer(checkpoint, ByteTokenizer.sha256, None)[1] is None
