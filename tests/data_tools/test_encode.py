"""Encoding a corpus: nothing lost, whole documents held out, datasets appear whole or not at all."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import inspect
from data_tools.encode import EncodeOptions, encode_corpus, is_held_out
from data_tools.readers import Document
from infini_train.config import ConfigError
from infini_train.data.manifest import hash_file
from infini_train.data.shards import Dataset
from infini_train.data.tokenizer import ByteTokenizer, tokenizer_of


def corpus(n: int, prefix: str = "d") -> list[Document]:
    return [
        Document(f"{prefix}{i}", f"Text {i}: grün\n" * (i % 7 + 1), f"s{i % 2}", {"title": f"T{i}"}) for i in range(n)
    ]


def read(folder: Path) -> list[Document]:
    dataset, tokenizer = Dataset.open(folder), tokenizer_of(folder)
    found = []
    for i, n in enumerate(dataset.lengths_tokens):
        text, m = tokenizer.decode(dataset.read(i, 0, int(n))), dataset.metadata(i)
        assert (m["n_bytes"], m["n_tokens"]) == (len(text.encode()), n)
        found.append(Document(m["id"], text, m["source"], {"title": m["title"]}))
    return found


def test_all_documents_are_there_in_order(tmp_path) -> None:
    written = encode_corpus(corpus(200), ByteTokenizer(), tmp_path / "set", EncodeOptions(max_shard_bytes=50_000))
    assert read(tmp_path / "set") == corpus(200)
    assert len(written[tmp_path / "set"].shards) > 3


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 30), share=st.floats(0.001, 0.999), prefix=st.text("abc"))
def test_holdout_splits_whole_documents_and_neither_is_empty(tmp_path_factory, n, share, prefix) -> None:
    out, documents = tmp_path_factory.mktemp("e") / "out", corpus(n, prefix)
    encode_corpus(documents, ByteTokenizer(), out, EncodeOptions(holdout=share))
    train, validation = read(out / "train"), read(out / "validation")
    assert (
        train
        and validation
        and sorted([*train, *validation], key=lambda d: d.text + d.id) == sorted(documents, key=lambda d: d.text + d.id)
    )
    assert sum(is_held_out(d.id, share) != (d in validation) for d in documents) <= 1  # moved so that none is empty


def test_the_share_is_met_and_stays_when_the_corpus_grows(tmp_path) -> None:
    for n in (1000, 1500):
        encode_corpus(corpus(n), ByteTokenizer(), tmp_path / str(n), EncodeOptions(holdout=0.1))
    small, large = ({d.id for d in read(tmp_path / n / "validation")} for n in ("1000", "1500"))
    assert 60 < len(small) < 140 and small < large


def test_the_same_corpus_gives_the_same_bytes(tmp_path) -> None:
    for name, threads in (("a", 1), ("b", 2)):
        encode_corpus(corpus(50), ByteTokenizer(), tmp_path / name, EncodeOptions(holdout=0.2, threads=threads))
    a, b = ({p.relative_to(tmp_path / n): hash_file(p) for p in (tmp_path / n).rglob("*.*")} for n in ("a", "b"))
    assert a == b and len(a) == 6


def breaking(error: BaseException) -> Iterator[Document]:
    yield from corpus(20)
    raise error


@pytest.mark.parametrize("holdout", [0.0, 0.5])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ConfigError("a.txt:1: broken")])
def test_nothing_is_left_of_a_broken_run(tmp_path, error, holdout) -> None:
    with pytest.raises(type(error)):
        encode_corpus(breaking(error), ByteTokenizer(), tmp_path / "set", EncodeOptions(holdout=holdout))
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path) -> None:
    byte, holdout = ByteTokenizer(), EncodeOptions(holdout=0.5)
    with pytest.raises(ConfigError, match="--holdout: needs two documents"):
        encode_corpus(corpus(1), byte, tmp_path / "one", holdout)
    with pytest.raises(ConfigError, match="--holdout: 1.5 is not a share"):
        EncodeOptions(holdout=1.5)
    encode_corpus(corpus(3), byte, tmp_path / "set")
    with pytest.raises(ConfigError, match="is itself a dataset"):
        encode_corpus(corpus(3), byte, tmp_path / "set", EncodeOptions(holdout=0.5, overwrite=True))
    encode_corpus(corpus(3), byte, tmp_path / "two", holdout)
    with pytest.raises(ConfigError, match="datasets are there already"):
        encode_corpus(corpus(3), byte, tmp_path / "two", holdout)
    with pytest.raises(ConfigError, match="not empty and not a dataset"):
        encode_corpus(corpus(3), byte, tmp_path / "two", EncodeOptions(overwrite=True))
    encode_corpus(corpus(9), byte, tmp_path / "two", EncodeOptions(holdout=0.5, overwrite=True))
    assert len(read(tmp_path / "two" / "train")) + len(read(tmp_path / "two" / "validation")) == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "two"]


def test_inspect_tells_counts_and_documents(tmp_path) -> None:
    encode_corpus(corpus(40), ByteTokenizer(), tmp_path / "set")
    text = inspect.summarise(tmp_path / "set")
    assert "documents     40" in text and "1.00 bytes a token" in text and "s0: 20 documents" in text
    shown = inspect.show_document(tmp_path / "set", 20)
    assert '"title": "T20"' in shown and shown.count("Text 20: grün\n") == 7
    with pytest.raises(ConfigError, match="--document: 40 is not there; .* holds documents 0 to 39"):
        inspect.show_document(tmp_path / "set", 40)


def test_verify_finds_one_changed_byte(tmp_path) -> None:
    encode_corpus(corpus(40), ByteTokenizer(), tmp_path / "set")
    assert "2 files and the tokenizer are as they were written" in inspect.verify(tmp_path / "set")
    path = tmp_path / "set" / "shard-00000.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="shard-00000.tar: is damaged"):
        inspect.verify(tmp_path / "set")
