"""Writes a dataset into a hidden folder that is renamed at the end; same input, same bytes. Imports no torch."""

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from infini_train import __version__
from infini_train.atomic_files import sync_path
from infini_train.config.errors import ConfigError
from infini_train.data.manifest import (
    FORMAT_VERSION,
    INDEX_FILE,
    INDEX_HEADER,
    INDEX_MAGIC,
    INDEX_RECORD,
    INDEX_VERSION,
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    ShardEntry,
    SourceEntry,
    TokenizerEntry,
    dump_manifest,
    hash_file,
    token_dtype,
)
from infini_train.data.shard_file import ShardRun
from infini_train.data.tokenizer import Tokenizer

_ASIDE = ".partial-"  # in the name of the hidden folder that is written first
_ROWS_AT_ONCE = 1 << 16  # of an index
_OLD = "-old"  # and at its end: what is being replaced


class TargetExistsError(ConfigError):
    """A result is there already, and the caller has not asked to overwrite it."""


@contextlib.contextmanager
def explain_disk_errors(folder: Path) -> Iterator[None]:
    """An OSError becomes a ConfigError that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(f"{folder}: no space left on device; free some, or write to another folder") from error
        raise ConfigError(f"{folder}: can't be written: {error.strerror or error}") from error


def check_target(folder: Path, overwrite: bool) -> None:
    """The folder may be written: it is new, empty, or a dataset that may be overwritten.

    Raises:
        TargetExistsError: it holds a dataset, and `overwrite` is off.
        ConfigError: it holds something else.
    """
    with explain_disk_errors(folder):
        if not folder.is_dir():
            if folder.exists():
                raise ConfigError(f"{folder}: is a file; give a folder")
            return
        if not any(folder.iterdir()):
            return
    if not (folder / MANIFEST_FILE).is_file():
        raise ConfigError(f"{folder}: is not empty and not a dataset; choose another folder")
    if not overwrite:
        raise TargetExistsError(f"{folder}: a dataset is there already; choose another folder")


def remove_stale(folder: Path | str) -> None:
    """Delete what killed writers of this dataset have left beside it.

    A writer holds a lock on its index as long as it lives. A folder whose lock can't be tested (a file system without
    locks) stays. So does a dataset that was moved aside, unless its successor is in its place.
    """
    folder = Path(os.path.abspath(folder))
    with contextlib.suppress(OSError):
        for aside in [path for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}{_ASIDE}")]:
            if aside.name.endswith(_OLD):
                stale = folder.exists()
            else:
                stale = not (aside / INDEX_FILE).exists() or _can_lock(aside / INDEX_FILE)
            if stale:
                shutil.rmtree(aside, ignore_errors=True)


def _can_lock(path: Path) -> bool:
    """Whether no other process holds the lock of this file."""
    try:
        with path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def open_index(folder: Path) -> BinaryIO:
    """The index of a new dataset, where its first record goes; the header is written by `finish_dataset`."""
    index = (folder / INDEX_FILE).open("wb")
    index.write(bytes(INDEX_HEADER.itemsize))
    return index


@contextlib.contextmanager
def write_aside(folder: Path, *, overwrite: bool) -> Iterator[tuple[Path, BinaryIO]]:
    """An empty folder and, in it, the open index of a dataset; the block ends with `finish_dataset`.

    If the block succeeds, the folder is renamed to its place; otherwise it is removed.

    Raises:
        ConfigError: the place holds something else, or can't be written.
    """
    check_target(folder, overwrite)
    remove_stale(folder)
    target = Path(os.path.abspath(folder))  # has a name and a parent, also for . or a/..
    aside = target.parent / f".{target.name}{_ASIDE}{uuid.uuid4().hex[:8]}"
    try:
        with explain_disk_errors(folder):
            target.parent.mkdir(parents=True, exist_ok=True)
            aside.mkdir()
            index = open_index(aside)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield aside, index
        finally:
            with contextlib.suppress(OSError):  # closing writes what is buffered
                index.close()
        with explain_disk_errors(folder):
            replace_folder(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def finish_dataset(
    folder: Path,
    index: BinaryIO,
    tokenizer: Tokenizer,
    shards: Iterable[ShardEntry],
    sources: Iterable[SourceEntry],
    left_out: Mapping[str, int] | None = None,
) -> Manifest:
    """Add tokenizer and manifest to a folder that holds shards, complete its index, and sync all of it to the disk.

    Raises:
        OSError: the disk is full, say.
    """
    shards, sources = tuple(shards), tuple(sources)
    documents, index_path = sum(shard.documents for shard in shards), folder / INDEX_FILE
    index.seek(0)
    index.write(np.array((INDEX_MAGIC, INDEX_VERSION, INDEX_RECORD.itemsize, documents), INDEX_HEADER).tobytes())
    index.flush()  # closing it would give up a lock
    if tokenizer.file_name is not None:
        (folder / tokenizer.file_name).write_bytes(tokenizer.model_bytes)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tool_version=__version__,
        documents=documents,
        tokens=sum(shard.tokens for shard in shards),
        bytes=sum(source.bytes for source in sources),
        dtype=token_dtype(tokenizer.vocab_size).str,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        tokenizer=TokenizerEntry(kind=tokenizer.kind, file=tokenizer.file_name, sha256=tokenizer.sha256),
        index=FileEntry(file=INDEX_FILE, bytes=index_path.stat().st_size, sha256=hash_file(index_path)),
        shards=shards,
        sources=sources,
        length_histogram=length_histogram(index_path),
        left_out=dict(left_out or {}),
    )
    (folder / MANIFEST_FILE).write_bytes(dump_manifest(manifest))
    for path in (*(path for path in folder.iterdir() if path.suffix != ".tar"), folder):  # shards are on the disk
        sync_path(path)
    return manifest


def length_histogram(index: Path) -> tuple[int, ...]:
    """Documents by the number of binary digits of their length in tokens; as in the manifest."""
    counts = np.zeros(65, np.int64)
    with index.open("rb") as file:
        file.seek(INDEX_HEADER.itemsize)
        while (rows := np.fromfile(file, INDEX_RECORD, _ROWS_AT_ONCE)).size:
            exponents = np.frexp(rows["n_tokens"].astype(np.float64))[1]
            counts += np.bincount(exponents, minlength=counts.size)
    return tuple(np.trim_zeros(counts, "b").tolist())


def replace_folder(finished: Path, target: Path) -> None:
    """Rename a finished folder to its place; what is there is moved aside first, then deleted."""
    old = target.with_name(f".{target.name}{_ASIDE}{uuid.uuid4().hex[:8]}{_OLD}")
    if target.exists():
        target.rename(old)
    try:
        finished.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
    sync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)


class ShardWriter:
    """A context manager that writes a dataset. The folder appears whole if the block succeeds, otherwise not at all.

    Args:
        folder: the dataset to write; new, empty, or (with `overwrite`) a dataset to replace.
        tokenizer: made the ids; its model is copied beside the shards.
        max_shard_bytes: a shard is closed before it grows over this size (one larger document gets its own).
        overwrite: replace a dataset that is there.

    Raises:
        ConfigError: the folder can't be written or holds something else; the disk is full; no document was added.
    """

    def __init__(
        self, folder: Path | str, tokenizer: Tokenizer, *, max_shard_bytes: int = 1 << 29, overwrite: bool = False
    ) -> None:
        self.folder = Path(folder)  # as given: messages show it
        self.tokenizer = tokenizer
        self.max_shard_bytes = max_shard_bytes
        self._overwrite = overwrite
        check_target(self.folder, overwrite)

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        aside, self._index = self._stack.enter_context(write_aside(self.folder, overwrite=self._overwrite))
        dtype = token_dtype(self.tokenizer.vocab_size)
        self._run = ShardRun(aside, "shard", self._index, dtype, self.max_shard_bytes)
        self._stack.push(self._close)  # before the folder is renamed
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(
        self, tokens: np.ndarray, *, n_bytes: int, id: str, source: str = "", metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Append a document: as `ShardRun.add`."""
        assert tokens.ndim == 1
        assert tokens.size == 0 or 0 <= int(tokens.min()) <= int(tokens.max()) < self.tokenizer.vocab_size
        with explain_disk_errors(self.folder):
            self._run.add(tokens, n_bytes=n_bytes, id=id, source=source, metadata=metadata)

    @property
    def documents(self) -> int:
        """How many were added."""
        return self._run.documents

    def _close(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                if not self._run.documents:
                    raise ConfigError(f"{self.folder}: there is no document to write; check the sources")
                with explain_disk_errors(self.folder):
                    self._run.close_shard()
                    run = self._run
                    finish_dataset(run.folder, self._index, self.tokenizer, run.shards, run.sources.values())
        finally:
            self._run.abandon()
