"""The manifest's seal: any changed value is refused, files of other kinds don't hang, older datasets are still read."""

import copy
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run
from infini_train.data.manifest import MANIFEST_FILE, is_spelled_as_written, read_manifest, warn_unsealed
from infini_train.data.sealed import CHECKSUM, MAX_BYTES, dump_sealed
from infini_train.data.shards import Dataset, ShardWriter
from infini_train.data.source import open_source
from infini_train.data.tokenizer import ByteTokenizer, tokenizer_of
from tests.data.cat import write_cat


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "set", ByteTokenizer(), max_shard_bytes=4_000) as writer:
        for i in range(4):
            writer.add(np.full(900, i), n_bytes=900, id=f"d{i}", source="b\udce9", metadata={"loss_start": i})
    return tmp_path / "set"


def load(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST_FILE).read_bytes())


def reseal(folder: Path, **changes: Any) -> None:
    """As somebody would who knows the format."""
    (folder / MANIFEST_FILE).write_bytes(dump_sealed(load(folder) | changes))


def unseal(folder: Path) -> None:
    """As earlier versions wrote it."""
    tree = {**load(folder), "format_version": 1}
    del tree[CHECKSUM]
    (folder / MANIFEST_FILE).write_text(json.dumps(tree, indent=1) + "\n")


def places(node: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values and containers."""
    for key in node if isinstance(node, dict) else range(len(node)):
        yield (*before, key)
        if isinstance(node[key], dict | list):
            yield from places(node[key], (*before, key))


def changed(tree: dict[str, Any], place: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """The tree with this value changed, left out, renamed, or given twice."""
    *path, last = place
    for way in ("change", "remove", "rename", "twice"):
        new = copy.deepcopy(tree)
        node: Any = new
        for key in path:
            node = node[key]
        value = node[last]
        if way == "change":
            node[last] = value + 1 if isinstance(value, int) else "x" if value is None else f"{value}x"
        elif way == "remove":
            del node[last]
        elif way == "rename" and isinstance(node, dict):
            node[f"{last}x"] = node.pop(last)
        elif way == "twice" and isinstance(node, list):
            node.insert(last, value)
        else:
            continue
        yield new


def test_any_changed_value_is_refused(folder) -> None:
    tree, path = load(folder), folder / MANIFEST_FILE
    trees = [new for place in places(tree) for new in changed(tree, place)]
    assert len(trees) > 150 and {"eos_id", "pad_id", "vocab_size", "left_out", CHECKSUM} <= tree.keys()
    for new in trees:
        path.write_text(json.dumps(new))
        with pytest.raises(ConfigError, match=r"manifest.json: (is not as it was written|format version . is not)"):
            read_manifest(folder)
    path.write_text(json.dumps(tree))
    assert len(Dataset.open(folder)) == 4, "spaces are no values"
    assert not is_spelled_as_written(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_id": 259}, "eos_id: 259 is outside of the vocabulary"),
        ({"bos_id": -5}, "bos_id: Input should be greater than or equal to 0"),
        ({"documents": 10**30}, "documents: Input should be less than 9223372036854775808"),
        ({"documents": True}, "documents: Input should be a valid integer"),
        ({"colour": 1}, "colour: unknown field; copy the dataset again"),
        ({"tool_version": "\ud800"}, "manifest.json: Invalid JSON: "),
        ({"format_version": [2]}, "format version . is not 2"),
        ({"format_version": 1}, "checksum: unknown field"),
        ({"tokenizer": {"kind": "byte", "file": "a\0b", "sha256": "0"}}, "names a file outside the dataset's folder"),
        ({"tokenizer": {"kind": "byte", "file": "..", "sha256": "0"}}, "names a file outside the dataset's folder"),
    ],
)
def test_values_that_no_dataset_has_are_refused(folder, changes, message) -> None:
    reseal(folder, **changes)
    with pytest.raises(ConfigError, match=message) as error:
        Dataset.open(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [{"eos_id": 32}, {"bos_id": 0}, {"pad_id": 1}, {"vocab_size": 300}])
def test_ids_are_compared_with_the_tokenizer(folder, changes) -> None:
    """The right values are in the tokenizer's own file."""
    reseal(folder, **changes)
    (name,) = changes
    with pytest.raises(ConfigError, match=rf"set: {name} is {changes[name]} in manifest.json and \d+ in the tokenizer"):
        tokenizer_of(folder)


def test_ids_of_a_sentencepiece_model_are_compared_too(tmp_path) -> None:
    write_cat(tmp_path)
    assert tokenizer_of(tmp_path / "set").eos_id == 2
    reseal(tmp_path / "set", eos_id=1)
    with pytest.raises(ConfigError, match="set: eos_id is 1 in manifest.json and 2 in the tokenizer"):
        tokenizer_of(tmp_path / "set")


def test_what_is_no_small_regular_file_is_refused_at_once(folder) -> None:
    path = folder / MANIFEST_FILE
    for content, problem in (
        (b"[" * 100_000, "nested too deeply"),
        (b'{"format_version": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deeply"),
        (b"[]", "is not a JSON object"),
        (b'{"format_version": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"format_version": \xff}', "is not valid JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=f"manifest.json: can't be read .*{problem}"):
            read_manifest(folder)
    os.truncate(path, MAX_BYTES + 1)
    with pytest.raises(ConfigError, match="holds more than 64,000,000 bytes"):
        read_manifest(folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="is a named pipe, not a file"):
        read_manifest(folder)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="is a device, not a file"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["shard-00001.tar", "documents.idx"])
def test_a_pipe_in_the_place_of_another_file_is_refused_at_once(folder, name) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ConfigError, match=rf"{name}: can't be read \(is a named pipe, not a file\)"):
        Dataset.open(folder)


def test_datasets_of_earlier_versions_are_read_with_one_word(folder, caplog) -> None:
    sealed = Dataset.open(folder)
    unseal(folder)
    warn_unsealed.cache_clear()
    with caplog.at_level(logging.WARNING):
        datasets = [Dataset.open(folder) for _ in range(2)]
    assert [len(dataset) for dataset in datasets] == [4, 4]
    assert [record.getMessage() for record in caplog.records] == [
        f"warning: {folder}: is of an earlier version, and its manifest has no checksum;"
        " infini-data verify checks all of it, and can add one"
    ]
    assert datasets[0].identity == sealed.identity


def test_the_identity_is_of_all_that_training_reads(folder) -> None:
    before = read_manifest(folder)
    for changes in ({"tool_version": "9"}, {"left_out": {"empty": 3}}, {"sources": []}):
        reseal(folder, **changes)
        assert read_manifest(folder).identity == before.identity
    shards = load(folder)["shards"]
    index = load(folder)["index"]
    for changes in (
        {"eos_id": 3},
        {"vocab_size": 300},
        {"shards": [{**shard, "pairs": 0} for shard in shards]},
        {"index": {**index, "sha256": "0" * 64}},
    ):
        reseal(folder, **changes)
        assert read_manifest(folder).identity != before.identity
        assert read_manifest(folder).documents_sha256 == before.documents_sha256
        reseal(folder, **{name: value for name, value in vars(before).items() if name in ("eos_id", "vocab_size")})
        reseal(folder, shards=shards, index=index)


@pytest.mark.parametrize(
    "settings",
    [
        ["data.train={folder}"],
        ["data={{train: null, mixture: [{{folder: {folder}, weight: 2, epochs: 5000}}]}}"],
        ["data.train={folder}", "data.curriculum=[{{tokens: 9, max_document_tokens: 5}}]"],
    ],
)
def test_runs_of_earlier_versions_find_their_data(folder, settings) -> None:
    """What they stored: a hash of the tokenizer's and the shards' hashes, and of the settings of a mixture."""
    import hashlib

    def sha256(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    manifest = read_manifest(folder)
    shards = sha256(" ".join([manifest.tokenizer.sha256, *(shard.sha256 for shard in manifest.shards)]))
    earlier = {
        1: shards,
        2: sha256(f"{shards} 2.0 5000"),
        3: sha256(f"{shards} 1.0 None\n9 5"),
    }[1 + ("mixture" in settings[0]) + 2 * (len(settings) == 2)]
    source = open_source(load_run("debug", [setting.format(folder=folder) for setting in settings]))
    assert source.identity != earlier
    assert source.upgrade_identity(earlier) == source.identity
    assert source.upgrade_identity("0" * 64) == "0" * 64
