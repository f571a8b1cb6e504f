"""Tokenizer files of any content: a tokenizer, or one line that names the file, and nothing else."""

import io
import json
import os

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infini_train.config.errors import ConfigError
from infini_train.data.tokenizer import load_tokenizer

tokenizers = pytest.importorskip("tokenizers")

TEXTS = ["the cat sat on the mat\n", "a cat; gr\u00fcn \u4f60\u597d </s> \U0001f642", "", " \x00\u2581x", "e\u0301"]
FEW_SECONDS = settings(
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def use(path) -> None:
    """Loads and uses a tokenizer, unless it is refused."""
    try:
        tokenizer = load_tokenizer(path)
        for threads in (1, 2):
            many = tokenizer.encode_many(TEXTS, threads)
        for text, ids in zip(TEXTS, many, strict=True):
            assert tokenizer.encode(text).tolist() == ids.tolist()
            tokenizer.decode(ids)
        tokenizer.decode(range(min(tokenizer.vocab_size, 500)))
    except ConfigError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def train_json(model, trainer, pre_tokenizer, decoder) -> dict:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = (
        tokenizers.normalizers.NFC(),
        pre_tokenizer,
        decoder,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return json.loads(tokenizer.to_str())


def whole_jsons() -> list[dict]:
    kind, shown = tokenizers, {"show_progress": False, "special_tokens": ["<unk>", "<s>", "</s>"], "vocab_size": 60}
    return [
        train_json(
            kind.models.BPE(),
            kind.trainers.BpeTrainer(**shown),
            kind.pre_tokenizers.ByteLevel(),
            kind.decoders.ByteLevel(),
        ),
        train_json(
            kind.models.WordPiece(unk_token="<unk>"),
            kind.trainers.WordPieceTrainer(**shown),
            kind.pre_tokenizers.BertPreTokenizer(),
            kind.decoders.WordPiece(),
        ),
        train_json(
            kind.models.Unigram(),
            kind.trainers.UnigramTrainer(unk_token="<unk>", **shown),
            kind.pre_tokenizers.Metaspace(),
            kind.decoders.Metaspace(),
        ),
    ]


WHOLE_JSONS = whole_jsons()


def places(tree, at=()):
    yield at
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(inside)[:12]:
        yield from places(value, (*at, key))


def replace(tree, at, value):
    if not at:
        return value
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    tree[at[0]] = replace(tree[at[0]], at[1:], value)
    return tree


ODD = st.sampled_from(
    [None, -1, 0, 2**31, 2**32 - 1, 2**64, 1e300, "", "\x00", "x" * 99, [], {}, True, "\u2581", ["a", "b"], "a b"]
    + [{"type": "Sequence", "pretokenizers": []}, {"type": "ByteLevel"}, {"Regex": "(a|a)*c"}, "\\p{", "</s>"]
)
WRONG_JSONS = st.sampled_from(WHOLE_JSONS).flatmap(
    lambda whole: st.tuples(st.sampled_from(list(places(whole))), ODD).map(lambda change: replace(whole, *change))
)


@FEW_SECONDS
@given(data=WRONG_JSONS.map(lambda tree: json.dumps(tree).encode()) | st.binary(max_size=40))
def test_any_json_is_a_tokenizer_or_told(tmp_path, data) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    use(tmp_path / "tokenizer.json")


def test_a_panic_of_the_library_is_one_line(tmp_path) -> None:
    """It is no Exception: neither the commands nor whoever calls them would catch it."""
    whole = WHOLE_JSONS[0]
    assert whole["model"]["merges"]
    wrong = {**whole, "model": {**whole["model"], "continuing_subword_prefix": "x" * 1000}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(wrong))
    with pytest.raises(BaseException, match="out of range") as panic:
        tokenizers.Tokenizer.from_str(json.dumps(wrong))
    assert not isinstance(panic.value, Exception), "the library panics no more: find another file"
    with pytest.raises(ConfigError, match=r"tokenizer.json: is not a tokenizer.json: range end index"):
        load_tokenizer(tmp_path / "tokenizer.json")


def word_level(vocab: dict[str, int]) -> str:
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>")).to_str()


def test_texts_that_a_tokenizer_has_no_ids_for_are_told(tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text(word_level({"</s>": 0, "a": 1}))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode("a").tolist() == [1]
    for encode in (
        tokenizer.encode,
        lambda text: tokenizer.encode_many([text]),
        lambda text: tokenizer.encode_many([text], 2),
    ):
        with pytest.raises(ConfigError, match=r"tokenizer.json: can't encode a text: WordLevel error: Missing"):
            encode("b")


def test_ids_over_32_bits_are_refused(tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text(word_level({"</s>": 0, "a": 1}).replace('"a":1', '"a":4294967295'))
    with pytest.raises(ConfigError, match=r"holds the token id 4294967295; ids go up to 2147483647"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("config", ["[" * 100_000, "{", "\xff"])
def test_a_broken_config_beside_is_told(tmp_path, config) -> None:
    (tmp_path / "tokenizer.json").write_text(word_level({"</s>": 0}))
    (tmp_path / "tokenizer_config.json").write_text(config, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: is not valid JSON: "):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path, name) -> None:
    (tmp_path / "tokenizer.json").write_text(word_level({"</s>": 0}))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match="is a named pipe, not a file"):
        load_tokenizer(tmp_path / (name if name != "tokenizer_config.json" else "tokenizer.json"))


# -------------------------------------------------------------------------------------------------------- SentencePiece


def train_model(kind: str, **more) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:2] * 9),
        model_writer=out,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
        **more,
    )
    return out.getvalue()


LOSSLESS = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
WHOLE_MODELS = [train_model("unigram", vocab_size=40), train_model("bpe", vocab_size=290, **LOSSLESS)]


@st.composite
def wrong_models(draw) -> bytes:
    data = draw(st.sampled_from(WHOLE_MODELS))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data) - 1) | st.integers(max(0, len(data) - 300), len(data) - 1))
        data = data[:start] + draw(st.binary(max_size=6)) + data[start + draw(st.integers(0, 6)) :]
        data = data or b"x"
    return data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data


@FEW_SECONDS
@given(data=wrong_models() | st.binary(max_size=40))
def test_any_bytes_are_a_sentencepiece_model_or_told(tmp_path, data) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    use(tmp_path / "tokenizer.model")


def load_tokenizer_of(data: bytes, folder):
    (folder / "whole.model").write_bytes(data)
    return load_tokenizer(folder / "whole.model")


def test_entries_that_are_not_utf8_are_refused(tmp_path) -> None:
    """To the library they are bytes, and decoding fails in the middle of a generated text."""
    whole = WHOLE_MODELS[0]
    (tmp_path / "tokenizer.model").write_bytes(whole.replace("\u4f60".encode(), b"\xff\xff\xff", 1))
    model = sentencepiece.SentencePieceProcessor(model_proto=(tmp_path / "tokenizer.model").read_bytes())
    assert model.vocab_size() == load_tokenizer_of(whole, tmp_path).vocab_size, "the library takes it"
    with pytest.raises(ConfigError, match=r"tokenizer.model: is not a SentencePiece model; give the .model file"):
        load_tokenizer(tmp_path / "tokenizer.model")
