"""Datasets at URLs: files come once, whole and verified, and nothing half-fetched is ever read."""

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from fsspec.implementations.local import LocalFileSystem

from infini_train.config.data import DataConfig, MixturePart
from infini_train.config.errors import ConfigError
from infini_train.data import cache, source
from infini_train.data.sealed import MAX_BYTES, dump_sealed
from infini_train.data.shards import Dataset, ShardWriter
from infini_train.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, tokenizer_of


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "far", ByteTokenizer(), max_shard_bytes=4_000) as writer:
        for i in range(30):
            writer.add(np.full(100 + i, i), n_bytes=100 + i, id=f"d{i}")
    return tmp_path / "far"


def test_a_url_is_read_like_a_folder_and_shards_come_when_they_are_needed(remote, tmp_path) -> None:
    url, near = f"file://{remote}", tmp_path / "near"
    here, there = Dataset.open(remote), Dataset.open(url, near)
    assert there.identity == here.identity and len(here.manifest.shards) > 3
    assert not list(near.rglob("*.tar"))
    assert np.array_equal(there.read(29, 3, 90), here.read(29, 3, 90))
    assert len(list(near.rglob("*.tar"))) == 1
    for document in range(30):
        assert np.array_equal(there.read(document, 0, 100), here.read(document, 0, 100))
    shutil.rmtree(remote / "shard-00000.tar", ignore_errors=True)
    (remote / "shard-00000.tar").unlink()
    assert np.array_equal(Dataset.open(url, near).read(0, 0, 100), np.full(100, 0))


def test_readers_side_by_side_fetch_a_shard_once(remote, tmp_path) -> None:
    datasets = [Dataset.open(f"file://{remote}", tmp_path / "near") for _ in range(4)]
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda d=d: found.extend(d.read(i, 0, 90) for i in range(30))) for d in datasets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 120
    assert not list((tmp_path / "near").rglob("*.partial"))


def test_what_can_go_wrong_is_one_line(remote, tmp_path) -> None:
    near = tmp_path / "near"
    with pytest.raises(ConfigError, match=r"data.cache_dir: file://\S+ needs one: a folder with room"):
        Dataset.open(f"file://{remote}")
    with pytest.raises(ConfigError, match=r"nosuch://x/y: can't be opened: Protocol not known"):
        Dataset.open("nosuch://x/y", near)
    with pytest.raises(ConfigError, match=r"file://\S+/missing/manifest.json: can't be fetched: No such file"):
        Dataset.open(f"file://{remote}/missing", near)
    dataset = Dataset.open(f"file://{remote}", near)
    shard = remote / dataset.manifest.shards[1].file
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ConfigError, match=r"shard-00001.tar: is not the file of the manifest; copy the dataset again"):
        for document in range(30):
            dataset.read(document, 0, 50)
    assert not list(near.rglob("shard-00001.tar")) and not list(near.rglob("*.partial"))


def test_a_dataset_written_again_is_fetched_again(remote, tmp_path) -> None:
    Dataset.open(f"file://{remote}", tmp_path / "near").read(0, 0, 9)
    with ShardWriter(remote, ByteTokenizer(), overwrite=True) as writer:
        writer.add(np.full(100, 77), n_bytes=100, id="new")
    again = Dataset.open(f"file://{remote}", tmp_path / "near")
    assert again.read(0, 0, 9).tolist() == [77] * 9


def test_a_network_that_is_away_for_a_moment_is_waited_for(remote, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "RETRY_AFTER_S", (0.01, 0.01))
    dataset = Dataset.open(f"file://{remote}", tmp_path / "near")
    files = LocalFileSystem.open
    failures = [ConnectionResetError("reset by peer"), TimeoutError("timed out")]

    def fail_first(*arguments, **options):
        if failures:
            raise failures.pop()
        return files(*arguments, **options)

    monkeypatch.setattr(LocalFileSystem, "open", fail_first)
    assert dataset.read(0, 0, 5).tolist() == [0] * 5 and not failures
    failures += [TimeoutError("timed out")] * 3
    with pytest.raises(OSError, match=r"shard-000\d\d.tar: can't be fetched to .*: timed out"):
        dataset.read(29, 0, 5)
    assert dataset.name(29) == "29", "a name is not worth a shard"
    assert dataset.name(0) == "d0"


def test_a_manifest_that_names_files_elsewhere_is_refused(remote, tmp_path) -> None:
    path = remote / "manifest.json"
    tree = json.loads(path.read_text())
    tree["tokenizer"] |= {"kind": "sentencepiece", "file": "../../stolen.sh"}
    path.write_bytes(dump_sealed(tree))
    with pytest.raises(ConfigError, match="names a file outside the dataset's folder"):
        Dataset.open(f"file://{remote}", tmp_path / "near")
    assert not list(tmp_path.rglob("stolen*"))


def test_room_is_needed_for_all_parts_together(remote, tmp_path, monkeypatch) -> None:
    """Each alone would fit."""
    with ShardWriter(tmp_path / "more", ByteTokenizer()) as writer:
        writer.add(np.full(3000, 1), n_bytes=3000, id="m")
    near = tmp_path / "near"
    mixture = [{"folder": f"file://{remote}"}, {"folder": f"file://{tmp_path / 'more'}"}]
    data = DataConfig(mixture=tuple(MixturePart(**part) for part in mixture), cache_dir=str(near))
    needed = [Dataset.open(part["folder"], tmp_path / "probe").missing_bytes() for part in mixture]
    free = max(needed) + 5_000
    assert free < sum(needed)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: usage._replace(free=free))
    with pytest.raises(ConfigError, match=r"data.cache_dir: \S+near has .* GB free, and file://\S+, file://\S+ need"):
        source._open_datasets(data)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: usage._replace(free=sum(needed)))
    assert len(source._open_datasets(data)) == 2


def copies(near: Path, name: str) -> Path:
    """The cached copy of a file."""
    (path,) = near.rglob(name)
    return path


def break_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def link(path: Path) -> None:
    """To a file with the right content: whoever planted it could change it later."""
    shutil.copyfile(path, path.with_name("elsewhere"))
    path.unlink()
    path.symlink_to(path.with_name("elsewhere"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [break_bit, cut, link, pipe])
@pytest.mark.parametrize("name", ["shard-00000.tar", "documents.idx", "tokenizer.model", "manifest.json"])
def test_a_damaged_copy_is_fetched_again_with_a_warning(remote_words, tmp_path, caplog, name, damage) -> None:
    url, near = f"file://{remote_words}", tmp_path / "near"
    Dataset.open(url, near).read(0, 0, 9)
    path = copies(near, name)
    damage(path)
    with caplog.at_level("WARNING"):
        dataset = Dataset.open(url, near)
        assert dataset.read(0, 0, 9).tolist() == Dataset.open(remote_words).read(0, 0, 9).tolist()
        assert tokenizer_of(dataset.folder).vocab_size == 14
    assert path.read_bytes() == (remote_words / name).read_bytes() and not path.is_symlink()
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [str(path)] * (name != "manifest.json")
    assert all(f"fetching it again from {url}" in record.getMessage() for record in caplog.records)


@pytest.fixture
def remote_words(tmp_path: Path) -> Path:
    """A dataset with a tokenizer's file."""
    with (tmp_path / "t.model").open("wb") as file:
        texts = iter(["the cat sat on the mat"] * 9)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts, model_writer=file, vocab_size=14, minloglevel=2
        )
    with ShardWriter(tmp_path / "words", SentencePieceTokenizer(tmp_path / "t.model")) as writer:
        writer.add(np.arange(14), n_bytes=20, id="a")
    return tmp_path / "words"


def test_a_copy_is_hashed_once_on_a_machine_and_again_when_it_changes(remote, tmp_path, monkeypatch) -> None:
    hashed = []
    hash_stream = cache.hash_stream

    def note(file) -> str:
        hashed.append(Path(os.readlink(f"/proc/self/fd/{file.fileno()}")).name)
        return hash_stream(file)

    monkeypatch.setattr(cache, "hash_stream", note)
    url, near = f"file://{remote}", tmp_path / "near"
    first = Dataset.open(url, near)
    first.read(0, 0, 9)
    first.close()
    first.read(0, 0, 9)
    assert hashed == [], "what was just fetched is right"
    second = Dataset.open(url, near)
    for _ in range(3):
        second.read(0, 0, 9)
        second.close()
    assert hashed == [], "what was just fetched is right for others, too"
    for kept in near.rglob(".*.checked"):
        kept.write_text("[" if kept.name.startswith(".shard") else '{"sha256": "another", "stamp": [1]}')
    third = Dataset.open(url, near)
    for _ in range(3):
        third.read(0, 0, 9)
        third.close()
    assert hashed == ["documents.idx", "shard-00000.tar"], "what is noted is nothing"
    break_bit(copies(near, "shard-00000.tar"))
    second.read(0, 0, 9)
    second.close()
    assert second.read(0, 0, 9).tolist() == [0] * 9
    assert hashed[2:] == ["shard-00000.tar"] * 2, "before and after taking the lock"


@pytest.mark.parametrize("name", [".shard-00000.tar.lock", ".shard-00000.tar.partial", ".documents.idx.lock"])
def test_a_link_planted_in_the_cache_is_not_written_through(remote, tmp_path, name) -> None:
    url, near = f"file://{remote}", tmp_path / "near"
    folder = Dataset.open(url, tmp_path / "probe").folder
    mine = near / folder.name
    mine.mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (mine / name).symlink_to(victim)
    try:
        Dataset.open(url, near).read(0, 0, 9)
    except (OSError, ConfigError) as error:
        assert "is a link; a file of its own is expected here" in str(error) and name.endswith(".lock")
    else:
        assert name.endswith(".partial")
    assert victim.read_text() == "precious"


def test_a_cache_that_can_not_be_used_is_one_line(remote, tmp_path) -> None:
    url, near = f"file://{remote}", tmp_path / "near"
    folder = Dataset.open(url, tmp_path / "probe").folder
    near.mkdir()
    (near / folder.name).symlink_to(tmp_path)
    with pytest.raises(ConfigError, match=r"^data.cache_dir: \S+ can't be written: is a link; remove it$"):
        Dataset.open(url, near)
    (near / folder.name).unlink()
    (near / folder.name / "documents.idx").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"^data.cache_dir: \S+documents.idx.*: Is a directory$"):
        Dataset.open(url, near)
    (near / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^data.cache_dir: \S+ can't be written: Not a directory$"):
        Dataset.open(url, near / "file")


def test_a_manifest_that_never_ends_is_not_read_to_its_end(remote, tmp_path) -> None:
    os.truncate(remote / "manifest.json", MAX_BYTES + 1)
    with pytest.raises(ConfigError, match=r"manifest.json: holds more than 64,000,000 bytes, which no manifest does"):
        Dataset.open(f"file://{remote}", tmp_path / "near")
    (remote / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^file://\S+/manifest.json: format version \? is not 2"):
        Dataset.open(f"file://{remote}", tmp_path / "near")
    assert not (tmp_path / "near").exists()
