"""tokenizer.json files: whole texts, special tokens never from text, bos and eos found or refused."""

import json
from pathlib import Path

import pytest

tokenizers = pytest.importorskip("tokenizers")

from infini_train.config.errors import ConfigError  # noqa: E402
from infini_train.data.shards import Dataset, ShardWriter  # noqa: E402
from infini_train.data.tokenizer import load_tokenizer, tokenizer_of  # noqa: E402

TEXTS = ["the cat sat on the mat\n", "a cat; grün 你好 </s> 🙂", ""]


def train(folder: Path, specials: list[str]) -> Path:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    model.train_from_iterator(TEXTS, trainer)
    model.enable_truncation(4)
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_texts_come_back_and_special_names_are_text(tmp_path) -> None:
    tokenizer = load_tokenizer(train(tmp_path, ["<s>", "</s>", "<pad>"]))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    for threads in (1, 2):
        many = tokenizer.encode_many(TEXTS, threads)
        assert [tokenizer.decode(ids) for ids in many] == TEXTS
        assert [ids.tolist() for ids in many] == [tokenizer.encode(text).tolist() for text in TEXTS]
        assert all(ids.size == 0 or ids.min() > 2 for ids in many)
    assert tokenizer.decode([0, *tokenizer.encode("a cat").tolist(), 1, 2, 10**6]) == "a cat"


def test_special_tokens_are_found_by_name_or_config(tmp_path) -> None:
    path = train(tmp_path / "gpt", ["<|endoftext|>"])
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 0, 0)
    path = train(tmp_path / "own", ["<begin>", "<end>"])
    with pytest.raises(ConfigError, match="no end-of-text token found; put tokenizer_config.json beside it"):
        load_tokenizer(path)
    names = {"bos_token": "<begin>", "eos_token": {"content": "<end>"}}
    path.with_name("tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    with ShardWriter(tmp_path / "set", tokenizer) as writer:
        writer.add(tokenizer.encode("the cat"), n_bytes=7, id="a")
    found = tokenizer_of(tmp_path / "set")  # only the copy of tokenizer.json lies there
    assert (found.bos_id, found.eos_id, found.sha256) == (0, 1, tokenizer.sha256)
    assert found.decode(Dataset.open(tmp_path / "set").read(0, 0, 2)).startswith("the")
    assert Dataset.open(tmp_path / "set").manifest.tokenizer.kind == "huggingface"


def test_what_is_no_tokenizer_is_refused(tmp_path) -> None:
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a tokenizer.json"):
        load_tokenizer(tmp_path / "t.json")
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        load_tokenizer(tmp_path / "none.json")
