"""Looking after datasets: what is damaged is named, and merging and splitting lose nothing."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import cli, combine, inspect, lengths
from data_tools.encode import is_held_out
from data_tools.verify import verify
from infini_train.config.errors import ConfigError
from infini_train.data.manifest import MANIFEST_FILE, hash_file
from infini_train.data.sealed import dump_sealed
from infini_train.data.shards import Dataset, ShardWriter
from infini_train.data.tokenizer import ByteTokenizer

TEXTS = [f"Text {i}: grün\n" * (i % 7 + 1) for i in range(40)]


def write(folder: Path, texts: list[str] = TEXTS, tokenizer=None, **options) -> Path:
    tokenizer = tokenizer or ByteTokenizer()
    with ShardWriter(folder, tokenizer, **{"max_shard_bytes": 30_000, **options}) as writer:
        for i, text in enumerate(texts):
            ids, n_bytes = tokenizer.encode(text), len(text.encode())
            writer.add(ids, n_bytes=n_bytes, id=f"{folder.name}{i}", source=f"s{i % 2}", metadata={"title": f"T{i}"})
    return folder


def read(folder: Path) -> list[tuple[str, str]]:
    dataset = Dataset.open(folder)
    texts = [ByteTokenizer().decode(dataset.read(i, 0, int(n))) for i, n in enumerate(dataset.lengths_tokens)]
    return [(dataset.metadata(i)["id"], text) for i, text in enumerate(texts)]


def test_inspect_tells_counts_and_documents(tmp_path) -> None:
    folder = write(tmp_path / "set")
    text = inspect.summarise(folder)
    assert "documents     40" in text and "1.00 bytes a token" in text and "s0: 20 documents" in text
    shown = inspect.show_document(folder, 20)
    assert '"title": "T20"' in shown and shown.count("Text 20: grün\n") == 7
    first = Dataset.open(folder).manifest.shards[0].documents
    assert inspect.show_document(folder, 2, shard=1) == inspect.show_document(folder, first + 2)
    with pytest.raises(ConfigError, match="document: 40 is not there; .* holds documents 0 to 39"):
        inspect.show_document(folder, 40)
    with pytest.raises(ConfigError, match=f"shard-00000.tar holds documents 0 to {first - 1}"):
        inspect.show_document(folder, first, shard=0)
    with pytest.raises(ConfigError, match="shard: 9 is not there; .* holds shards 0 to"):
        inspect.show_document(folder, 0, shard=9)


def test_names_that_no_terminal_shows_are_shown_escaped(tmp_path, capsys) -> None:
    """Half a surrogate pair (from a file's name that is not UTF-8), terminal codes, line ends."""
    folder, odd = tmp_path / "caf\udce9", "b\udce9\x1b[2J\n"
    with ShardWriter(folder, ByteTokenizer()) as writer:
        writer.add(np.arange(9), n_bytes=9, id=odd, source=odd, metadata={"title": odd, odd: odd})
    shown = {}
    for command in ("inspect", "inspect --document 0", "inspect --json", "stats", "verify"):
        name, *options = command.split()
        assert cli.main([name, str(folder), *options]) == 0
        shown[command] = capsys.readouterr().out
        assert shown[command].isascii() and "\x1b" not in shown[command], command
    assert "\n  b\\udce9\\x1b[2J\\n: 1 documents" in shown["inspect"]
    document, _ = json.JSONDecoder().raw_decode(shown["inspect --document 0"])
    assert (document["id"], document["title"], document[odd]) == (odd, odd, odd)
    assert json.loads(shown["inspect --json"])["sources"][0]["name"] == "b\\udce9\x1b[2J\n"
    assert cli.main(["inspect", str(folder / "none")]) == 2 and "caf\\udce9/none: no such" in capsys.readouterr().err
    assert cli.main(["merge", str(folder), str(folder), "--out", str(tmp_path / "two\udce9")]) == 0
    assert cli.main(["split", str(tmp_path / "two\udce9"), "--holdout", "0.5", "--out", str(tmp_path / "s")]) == 2
    assert "no document falls to" in capsys.readouterr().err


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), name=st.sampled_from([0, 1]))
def test_verify_finds_any_changed_bit_and_names_its_document(tmp_path_factory, place, bit, name) -> None:
    folder = tmp_path_factory.getbasetemp() / "verified"
    if not folder.exists():
        write(folder)
    assert verify(folder) == []
    dataset = Dataset.open(folder)
    path = folder / dataset.manifest.shards[name].file
    data = path.read_bytes()
    offset = int(place * len(data))
    rows = dataset._index[dataset._index["shard"] == name]
    starts = rows["data_offset"] - 128 - 512
    stops = rows["json_offset"] + rows["json_bytes"]
    hit = [i for i, (start, stop) in enumerate(zip(starts, stops, strict=True)) if start <= offset < stop]
    try:
        path.write_bytes(data[:offset] + bytes([data[offset] ^ (1 << bit)]) + data[offset + 1 :])
        problems = verify(folder, workers=2)
    finally:
        path.write_bytes(data)
    assert len(problems) == 1 and str(path) in problems[0]
    first = sum(shard.documents for shard in dataset.manifest.shards[:name])
    is_padding = not hit or "but in no document" in problems[0]  # the zeros that fill a member's last block
    assert is_padding or f"document {hit[0]} of the shard ({first + hit[0]} of the dataset)" in problems[0]
    row = rows[hit[0]] if hit else None
    if row is not None and row["data_offset"] <= offset < row["data_offset"] + 2 * row["n_tokens"]:
        assert not is_padding


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / MANIFEST_FILE
    path.write_bytes(dump_sealed(json.loads(path.read_bytes()) | changes))


def test_verify_checks_counts_and_the_index(tmp_path, capsys) -> None:
    folder = write(tmp_path / "set")
    sources = json.loads((folder / MANIFEST_FILE).read_bytes())["sources"]
    edit_manifest(folder, sources=[{**sources[0], "bytes": sources[0]["bytes"] - 1}, sources[1]])
    assert [line.split(": ", 1)[1][:30] for line in verify(folder)] == ["the counts of the sources are "]
    edit_manifest(folder, length_histogram=[1])
    assert [line.split(": ", 1)[1][:30] for line in verify(folder)] == ["the histogram of lengths is no"]
    assert cli.main(["verify", str(folder)]) == 1 and "histogram" in capsys.readouterr().out
    index = folder / "documents.idx"
    data = bytearray(index.read_bytes())
    data[24] ^= 1  # the offset of the first document
    index.write_bytes(data)
    with pytest.raises(ConfigError, match="documents.idx: is damaged"):
        verify(folder)


def test_datasets_of_earlier_versions_are_read_and_sealed_when_all_is_right(tmp_path, capsys, caplog) -> None:
    folder = write(tmp_path / "set")
    path = folder / MANIFEST_FILE
    tree = json.loads(path.read_bytes())
    for name in ("length_histogram", "left_out", "checksum"):
        del tree[name]
    old = json.dumps({**tree, "format_version": 1, "documents": 40})
    path.write_text(old.replace('"pairs": 0', '"pairs": 7'))
    assert [line.split(": ", 1)[1] for line in verify(folder)] == ["holds 0 pairs, 7 in the manifest"] * 3
    assert cli.main(["verify", "--seal", str(folder)]) == 1, "not all is right"
    assert cli.main(["merge", str(folder), str(folder), "--out", str(tmp_path / "two")]) == 0
    assert "has no checksum" in caplog.text
    path.write_text(old)
    assert verify(folder) == [] and len(read(folder)) == 40
    assert cli.main(["verify", "--seal", str(folder)]) == 0
    assert "as it was written; its manifest has a checksum now" in capsys.readouterr().out
    sealed = json.loads(path.read_bytes())
    assert (sealed["format_version"], len(sealed["checksum"]), sealed["tool_version"]) == (2, 64, tree["tool_version"])
    assert cli.main(["verify", "--seal", str(folder)]) == 0 and "now" not in capsys.readouterr().out
    path.write_bytes(path.read_bytes().replace(b'"eos_id": 257', b'"eos_id": 256'))
    assert cli.main(["verify", str(folder)]) == 2 and "its checksum differs" in capsys.readouterr().err


def test_stats_tell_the_lengths(tmp_path, capsys) -> None:
    class Long(ByteTokenizer):
        def encode(self, text: str) -> np.ndarray:
            return np.zeros(int(text), np.int32)

    folder = write(tmp_path / "set", ["0", "1", "4096", "4097", "40000", "200000"], Long())
    assert cli.main(["stats", str(folder), "--png", str(tmp_path / "plots" / "l.png")]) == 0
    text = capsys.readouterr().out
    total = 1 + 4096 + 4097 + 40000 + 200000
    for limit, tokens in (("4K", 244097), ("32K", 240000), ("128K", 200000)):
        assert f"{limit} tokens  {tokens / total:7.1%}" in text
    assert "131,072 to 262,143             1" in text and "longest    200,000" in text
    assert (tmp_path / "plots" / "l.png").read_bytes().startswith(b"\x89PNG")
    documents, tokens = lengths.token_histogram(Dataset.open(folder).lengths_tokens)
    assert tuple(documents) == Dataset.open(folder).manifest.length_histogram and int(tokens.sum()) == total


@pytest.mark.parametrize("link", [False, True])
def test_merge_keeps_every_document_in_order(tmp_path, link) -> None:
    parts = [write(tmp_path / name, TEXTS[:n]) for name, n in (("a", 40), ("b", 3), ("c", 25))]
    merged = combine.merge(parts, tmp_path / "all", link=link)
    assert read(tmp_path / "all") == [document for part in parts for document in read(part)]
    assert verify(tmp_path / "all") == []
    assert (merged.documents, [s.name for s in merged.sources]) == (68, ["s0", "s1"])
    assert sum(merged.length_histogram) == 68
    entry = merged.shards[-1]
    assert hash_file(tmp_path / "all" / entry.file) == Dataset.open(parts[-1]).manifest.shards[-1].sha256


def test_what_can_not_be_merged_is_refused(tmp_path) -> None:
    class Other(ByteTokenizer):
        sha256 = "0" * 64

    class Wide(ByteTokenizer):
        vocab_size = 300

    a, b = write(tmp_path / "a"), write(tmp_path / "b", tokenizer=Other())
    with pytest.raises(ConfigError, match="b: was encoded with another tokenizer than .*a"):
        combine.merge([a, b], tmp_path / "all")
    with pytest.raises(ConfigError, match="another vocab_size"):
        combine.merge([a, write(tmp_path / "c", tokenizer=Wide())], tmp_path / "all")
    with pytest.raises(ConfigError, match="two datasets or more"):
        combine.merge([a], tmp_path / "all")
    path = write(tmp_path / "d") / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match="shard-00001.tar: is damaged"):
        combine.merge([a, tmp_path / "d"], tmp_path / "all")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "d"]


def test_split_holds_out_the_documents_that_encode_holds_out(tmp_path, capsys) -> None:
    folder = write(tmp_path / "set", TEXTS * 3)
    command = ["split", str(folder), "--holdout", "0.2", "--out", str(tmp_path / "two")]
    assert cli.main(command) == 0 and "two/validation: " in capsys.readouterr().out
    train, validation = read(tmp_path / "two" / "train"), read(tmp_path / "two" / "validation")
    assert [d for d in read(folder) if is_held_out(d[0], 0.2)] == validation
    assert [d for d in read(folder) if not is_held_out(d[0], 0.2)] == train and len(validation) > 5
    assert verify(tmp_path / "two" / "train") == [] == verify(tmp_path / "two" / "validation")
    assert Dataset.open(tmp_path / "two" / "train").metadata(0)["title"].startswith("T")
    assert cli.main(command) == 2 and "datasets are there already" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0
    with pytest.raises(ConfigError, match="no document falls to validation"):
        combine.split(folder, tmp_path / "none", 1e-9)
    with pytest.raises(ConfigError, match="is not a share"):
        combine.split(folder, tmp_path / "none", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "two"]


def test_sources_are_told_with_their_counts(tmp_path) -> None:
    manifest = Dataset.open(write(tmp_path / "set")).manifest
    assert sum(source.documents for source in manifest.sources) == 40
    assert dataclasses.asdict(manifest)["left_out"] == {}


def test_a_picture_is_replaced_whole(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fill_the_disk(figure, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    lengths.plot_lengths(np.array([3, 5000]), tmp_path / "lengths.png")
    before = (tmp_path / "lengths.png").read_bytes()
    assert before.startswith(b"\x89PNG")
    monkeypatch.setattr(Figure, "savefig", fill_the_disk)
    with pytest.raises(ConfigError, match="no space left"):
        lengths.plot_lengths(np.array([4]), tmp_path / "lengths.png")
    assert [path.name for path in tmp_path.iterdir()] == ["lengths.png"]
    assert (tmp_path / "lengths.png").read_bytes() == before
