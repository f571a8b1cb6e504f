"""Datasets on disk: read back, standard tools read them, damage is named in one line, nothing half-written."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset

from infini_train.config.errors import ConfigError
from infini_train.data.manifest import INDEX_FILE, MANIFEST_FILE, NPY_HEADER_BYTES, hash_file
from infini_train.data.sealed import dump_sealed
from infini_train.data.shards import CorruptDocumentError, Dataset, ShardWriter
from infini_train.data.tokenizer import ByteTokenizer, tokenizer_of
from tests.data.cat import write_cat

LENGTHS = [0, 1, 300, 5000, 17, 64]


def write(folder: Path, lengths: list[int] = LENGTHS, **options) -> Path:
    with ShardWriter(folder, ByteTokenizer(), max_shard_bytes=8_000, **options) as writer:
        for i, n in enumerate(lengths):
            title = {"title": f"Höhe {i}", "n_tokens": -1}
            writer.add(np.arange(n) % 256, n_bytes=n, id=f"é{i}", source=f"s{i % 2}", metadata=title)
    return folder


def test_what_was_written_is_read(tmp_path) -> None:
    dataset = Dataset.open(write(tmp_path / "deep" / "set"))
    assert len(dataset) == 6 and dataset.lengths_tokens.tolist() == LENGTHS and dataset.lengths_tokens.dtype == np.int64
    for i, n in enumerate(LENGTHS):
        assert np.array_equal(dataset.read(i, 0, n), np.arange(n) % 256)
        assert np.array_equal(dataset.read(i, n // 3, n // 2), (np.arange(n) % 256)[n // 3 : n // 2])
        metadata = dataset.metadata(i)
        assert isinstance(metadata.pop("crc32"), int) and metadata == {
            "title": f"Höhe {i}",
            "id": f"é{i}",
            "source": f"s{i % 2}",
            "n_bytes": n,
            "n_tokens": n,
        }
    manifest = dataset.manifest
    assert (manifest.tokens, manifest.bytes, manifest.dtype, manifest.vocab_size) == (5382, 5382, "<u2", 259)
    assert [s.documents for s in manifest.shards] == [3, 1, 2]  # one document over the limit has a shard of its own
    assert [(s.name, s.documents, s.tokens) for s in manifest.sources] == [("s0", 3, 317), ("s1", 3, 5065)]
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["set"]


def test_tar_and_webdataset_read_the_shards(tmp_path) -> None:
    folder = write(tmp_path / "set")
    paths = sorted(str(p) for p in folder.glob("*.tar"))
    samples = [s for path in paths for s in webdataset.WebDataset(path, shardshuffle=False).decode()]
    assert [len(s["npy"]) for s in samples] == LENGTHS and samples[3]["json"]["title"] == "Höhe 3"
    names = subprocess.run(["tar", "tf", paths[0]], capture_output=True, text=True, check=True).stdout.split()
    assert names[:2] == ["0000000000.npy", "0000000000.json"]


def test_the_same_input_gives_the_same_bytes(tmp_path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    assert [hash_file(p) for p in sorted(a.iterdir())] == [hash_file(p) for p in sorted(b.iterdir())]
    assert Dataset.open(a).identity == Dataset.open(b).identity
    for entry in Dataset.open(a).manifest.files:
        assert hash_file(a / entry.file) == entry.sha256


def test_wide_vocabularies_take_uint32(tmp_path) -> None:
    class Wide(ByteTokenizer):
        vocab_size = 70_000

    with ShardWriter(tmp_path / "set", Wide()) as writer:
        writer.add(np.array([1, 69_999]), n_bytes=2, id="a")
    dataset = Dataset.open(tmp_path / "set")
    assert dataset.read(0, 0, 2).tolist() == [1, 69_999] and dataset.manifest.dtype == "<u4"


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / MANIFEST_FILE
    path.write_bytes(dump_sealed(json.loads(path.read_bytes()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def replace_index(folder: Path) -> None:
    data = bytearray((folder / INDEX_FILE).read_bytes())
    data[-1] = 77  # the last document's shard
    (folder / INDEX_FILE).write_bytes(data)


DAMAGE = {
    "holds no manifest.json": lambda f: (f / MANIFEST_FILE).unlink(),
    "shard-00001.tar: has 20470 bytes, not the 20480": lambda f: cut(f / "shard-00001.tar"),
    "shard-00002.tar: can't be read": lambda f: (f / "shard-00002.tar").unlink(),
    "documents.idx: has": lambda f: cut(f / INDEX_FILE),
    "documents.idx: does not match": replace_index,
    "documents.idx: is not an index": lambda f: (f / INDEX_FILE).write_bytes(b"x" * (f / INDEX_FILE).stat().st_size),
    "format version 9 is not 2": lambda f: edit_manifest(f, format_version=9),
    "can't be read": lambda f: (f / MANIFEST_FILE).write_text('{"half'),
    "tokens: Input should be a valid integer": lambda f: edit_manifest(f, tokens="many"),
    "does not match manifest.json": lambda f: edit_manifest(f, tokens=5),
    "dtype can't be right": lambda f: edit_manifest(f, dtype="|O"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_named_in_one_line(tmp_path, message) -> None:
    folder = write(tmp_path / "set")
    DAMAGE[message](folder)
    with pytest.raises(ConfigError) as error:
        Dataset.open(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_folders_and_parents_of_datasets(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no such dataset folder; write one with infini-data encode"):
        Dataset.open(tmp_path / "nothing")
    write(tmp_path / "set")
    with pytest.raises(ConfigError, match="give one of .*/set"):
        Dataset.open(tmp_path)


def test_a_damaged_document_is_told(tmp_path) -> None:
    folder = write(tmp_path / "set")
    dataset = Dataset.open(folder)
    with (folder / "shard-00000.tar").open("r+b") as file:
        file.seek(int(dataset._index[2]["data_offset"]) + 20)
        file.write(b"\xff\xff")  # token 10 is not in the vocabulary
        file.seek(int(dataset._index[1]["data_offset"]) - NPY_HEADER_BYTES + 12)
        file.write(b"\x00")
        file.seek(int(dataset._index[0]["json_offset"]))
        file.write(b"]")
    dataset = Dataset.open(folder)
    for call in (lambda: dataset.read(2, 0, 10), lambda: dataset.read(1, 0, 1), lambda: dataset.metadata(0)):
        with pytest.raises(CorruptDocumentError):
            call()
    assert dataset.read(5, 0, 64).tolist() == list(range(64))
    (folder / "shard-00001.tar").write_bytes(b"")
    with pytest.raises(CorruptDocumentError, match="ends before byte"):
        dataset.read(3, 0, 5)


def test_an_id_that_changed_inside_the_vocabulary_is_seen_at_the_first_read(tmp_path) -> None:
    """Whichever window of the document is read first."""
    folder = write(tmp_path / "set")
    with (folder / "shard-00001.tar").open("r+b") as file:
        file.seek(int(Dataset.open(folder)._index[3]["data_offset"]) + 2 * 4000)
        before = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([before ^ 1]))
    with pytest.raises(CorruptDocumentError, match="the data of document 3 is damaged"):
        Dataset.open(folder).read(3, 10, 20)


def test_an_interrupted_writer_leaves_nothing(tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "set", ByteTokenizer()) as writer:
        writer.add(np.zeros(10, int), n_bytes=10, id="a")
        raise KeyboardInterrupt
    with pytest.raises(ConfigError, match="no document to write"), ShardWriter(tmp_path / "set", ByteTokenizer()):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten_unasked(tmp_path) -> None:
    folder = write(tmp_path / "set")
    with pytest.raises(ConfigError, match="a dataset is there already"):
        write(folder)
    with pytest.raises(RuntimeError), ShardWriter(folder, ByteTokenizer(), overwrite=True):
        raise RuntimeError
    assert len(Dataset.open(folder)) == 6  # the old one is kept until the new one is whole
    write(folder, [2], overwrite=True)
    assert len(Dataset.open(folder)) == 1 and [p.name for p in tmp_path.iterdir()] == ["set"]
    (tmp_path / "other").mkdir()
    write(tmp_path / "other")  # an empty folder may be used
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not empty and not a dataset"):
        write(tmp_path / "home", overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        write(tmp_path / "home" / "letter.txt")
    with pytest.raises(ConfigError, match="can't be written"):
        write(tmp_path / "home" / "letter.txt" / "set")


def test_a_full_disk_is_told(tmp_path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with (
        pytest.raises(ConfigError, match="no space left on device"),
        ShardWriter(tmp_path / "set", ByteTokenizer()) as writer,
    ):
        next(tmp_path.iterdir()).joinpath("shard-00000.tar").symlink_to(full)
        writer.add(np.zeros(10**6, int), n_bytes=10, id="a")
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_lies_beside_the_shards(tmp_path) -> None:
    assert tokenizer_of(write(tmp_path / "bytes")).kind == "byte"
    tokenizer = write_cat(tmp_path)
    (tmp_path / "t.model").unlink()
    found = tokenizer_of(tmp_path / "set")
    n_tokens = int(Dataset.open(tmp_path / "set").lengths_tokens[0])
    assert found.sha256 == tokenizer.sha256
    assert found.decode(Dataset.open(tmp_path / "set").read(0, 0, n_tokens)) == "the cat"
    assert dataclasses.asdict(Dataset.open(tmp_path / "set").manifest.tokenizer)["file"] == "tokenizer.model"
    (tmp_path / "set" / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ConfigError, match="is not the one the dataset was encoded with"):
        tokenizer_of(tmp_path / "set")
    with pytest.raises(ConfigError, match="holds no manifest.json; give one of"):
        tokenizer_of(tmp_path)


def test_reading_data_needs_no_torch() -> None:
    """Login nodes and data workers have none."""
    modules = "infini_train.data.shards, infini_train.data.lanes, infini_train.data.tokenizer, data_tools.cli"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
