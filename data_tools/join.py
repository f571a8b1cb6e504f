"""The last step of encoding: the shards of all tasks become a dataset. Repeated after a kill, it gives the same."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.problems import LeftOut
from data_tools.task_files import check_files
from data_tools.tasks import task_folder
from infini_train.config.errors import ConfigError
from infini_train.data.manifest import INDEX_RECORD, ShardEntry, SourceEntry, hash_file, token_dtype
from infini_train.data.shard_file import OWN_METADATA, ShardRun
from infini_train.data.tokenizer import Tokenizer
from infini_train.data.writer import ShardWriter, finish_dataset, open_index

RECORD_FILE = "record.json"


class StoredDocument(NamedTuple):
    """A document as a shard holds it."""

    tokens: np.ndarray
    metadata: dict[str, Any]


class _StoredShard(NamedTuple):
    path: Path
    entry: ShardEntry
    rows: np.ndarray  # INDEX_RECORD, its documents


def add_sources(total: dict[str, SourceEntry], more: Iterable[SourceEntry], sign: int = 1) -> None:
    """Add counts (or take them away) by the name of the source."""
    for new in more:
        old = total.get(new.name, SourceEntry(name=new.name, documents=0, tokens=0, bytes=0))
        total[new.name] = SourceEntry(
            name=new.name,
            documents=old.documents + sign * new.documents,
            tokens=old.tokens + sign * new.tokens,
            bytes=old.bytes + sign * new.bytes,
        )


def add_documents(run: ShardRun | ShardWriter, documents: Iterable[StoredDocument]) -> None:
    """Append documents that another shard holds."""
    for tokens, metadata in documents:
        rest = {key: value for key, value in metadata.items() if key not in OWN_METADATA}
        own = {key: metadata[key] for key in ("id", "source", "n_bytes")}
        run.add(tokens, metadata=rest, **own)


class Joiner:
    """Makes datasets from the finished tasks in a folder.

    Args:
        folder: holds the tasks.
        tasks: their number.
        tokenizer: made the ids.
        max_shard_bytes: of shards that are rewritten.

    Raises:
        ConfigError: what a task has written is damaged.
    """

    def __init__(self, folder: Path, tasks: int, tokenizer: Tokenizer, max_shard_bytes: int) -> None:
        self.folder = folder
        self.tasks = tasks
        self.tokenizer = tokenizer
        self.max_shard_bytes = max_shard_bytes
        self._dtype = token_dtype(tokenizer.vocab_size)
        for task in range(tasks):
            check_files(task_folder(folder, task))

    def add_left_out(self, total: LeftOut) -> None:
        """Add up what the tasks left out.

        Raises:
            ConfigError: together there are too many bad records.
        """
        for record in self._records():
            total.add(LeftOut.from_json(record["left_out"]))

    def count(self, name: str) -> int:
        """Number of documents in all tasks' shards of this name."""
        return sum(shard["documents"] for record in self._records() for shard in record[name]["shards"])

    def documents(self, name: str) -> Iterator[StoredDocument]:
        """What these shards hold, in order."""
        return chain.from_iterable(self._read(shard) for shard in self._shards(name))

    def write(self, documents: Iterable[StoredDocument], out: Path) -> None:
        """A dataset of these documents, in shards of its own.

        Raises:
            ConfigError: a shard is damaged.
            OSError: the disk is full, say.
        """
        out.mkdir(parents=True, exist_ok=True)
        with open_index(out) as index:
            run = ShardRun(out, "shard", index, self._dtype, self.max_shard_bytes)
            add_documents(run, documents)
            run.close_shard()
            finish_dataset(out, index, self.tokenizer, run.shards, run.sources.values())

    def move(self, name: str, out: Path, left_out: LeftOut, *, without_first: bool = False) -> None:
        """A dataset of the tasks' shards, renamed; one of them is rewritten if its first document is not wanted.

        Raises:
            ConfigError: a shard is damaged.
            OSError: the disk is full, say.
        """
        out.mkdir(parents=True, exist_ok=True)
        entries: list[ShardEntry] = []
        sources: dict[str, SourceEntry] = {}
        for record in self._records():
            add_sources(sources, (SourceEntry(**source) for source in record[name]["sources"]))
        shards = self._shards(name)
        with open_index(out) as index:
            if without_first:
                first, *rest = self._read(next(shards))
                run = ShardRun(out, "shard", index, self._dtype, self.max_shard_bytes)
                add_documents(run, rest)
                run.close_shard()
                entries = run.shards
                add_sources(sources, [_count_of(first)], -1)
            for shard in shards:
                file = f"shard-{len(entries):05d}.tar"
                if shard.path.exists():  # else an earlier attempt has moved it
                    os.replace(shard.path, out / file)
                _check_size(out / file, shard)
                shard.rows["shard"] = len(entries)
                index.write(shard.rows.tobytes())
                entries.append(dataclasses.replace(shard.entry, file=file))
            kept = [source for source in sources.values() if source.documents]
            finish_dataset(out, index, self.tokenizer, entries, kept, left_out.documents)

    def _records(self) -> Iterator[dict[str, Any]]:
        for task in range(self.tasks):
            yield json.loads((task_folder(self.folder, task) / RECORD_FILE).read_bytes())

    def _shards(self, name: str) -> Iterator[_StoredShard]:
        for task, record in enumerate(self._records()):
            place = task_folder(self.folder, task)
            with (place / f"{name}.idx").open("rb") as index:
                for shard in record[name]["shards"]:
                    entry = ShardEntry(**shard)
                    rows = np.fromfile(index, INDEX_RECORD, entry.documents)
                    yield _StoredShard(place / entry.file, entry, rows)

    def _read(self, shard: _StoredShard) -> Iterator[StoredDocument]:
        _check_size(shard.path, shard)
        if hash_file(shard.path) != shard.entry.sha256:  # else the documents would get new, right checksums
            raise _damaged(shard)
        with shard.path.open("rb") as file:
            for row in shard.rows:
                file.seek(int(row["data_offset"]))
                tokens = np.frombuffer(file.read(int(row["n_tokens"]) * self._dtype.itemsize), self._dtype)
                file.seek(int(row["json_offset"]))
                yield StoredDocument(tokens, json.loads(file.read(int(row["json_bytes"]))))


def _check_size(path: Path, shard: _StoredShard) -> None:
    """Raises unless a shard is there, at its place now."""
    if not path.is_file() or path.stat().st_size != shard.entry.bytes:
        raise _damaged(shard)


def _damaged(shard: _StoredShard) -> ConfigError:
    task = shard.path.parent
    return ConfigError(
        f"{shard.path}: is damaged or missing; remove {task} and rerun the command, which makes it again"
    )


def _count_of(document: StoredDocument) -> SourceEntry:
    metadata = document.metadata
    return SourceEntry(name=metadata["source"], documents=1, tokens=document.tokens.size, bytes=metadata["n_bytes"])


def join_split(joiner: Joiner, out: Path, left_out: LeftOut) -> None:
    """The datasets `out`/train and `out`/validation, of two documents or more.

    Validation sets are small: the documents of all tasks are written into shards of their own. If all documents would
    go to one set, the first goes to the other.
    """
    train, validation = joiner.count("train"), joiner.count("validation")
    assert train + validation > 1
    held_out = joiner.documents("validation")
    if not validation:
        held_out = islice(joiner.documents("train"), 1)
    elif not train:
        held_out = islice(held_out, 1, None)
    joiner.write(held_out, out / "validation")
    if train:
        joiner.move("train", out / "train", left_out, without_first=not validation)
    else:
        joiner.write(islice(joiner.documents("validation"), 1), out / "train")
