"""Writing a dataset: aside first, renamed at the end, the same bytes for the same input. Imports no torch."""

import contextlib
import dataclasses
import errno
import fcntl
import io
import json
import os
import shutil
import tarfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from infini_train import __version__
from infini_train.config import ConfigError
from infini_train.data.manifest import (
    FORMAT_VERSION,
    INDEX_FILE,
    INDEX_HEADER,
    INDEX_MAGIC,
    INDEX_RECORD,
    MANIFEST_FILE,
    NPY_HEADER_BYTES,
    FileEntry,
    Manifest,
    ShardEntry,
    SourceEntry,
    TokenizerEntry,
    hash_file,
    token_dtype,
)
from infini_train.data.tokenizer import SentencePieceTokenizer, Tokenizer

TOKENIZER_FILE = "tokenizer.model"
_ASIDE = ".partial-"  # in the name of the hidden folder that is written first
_OLD = "-old"  # and at its end: the dataset that is being replaced


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
        raise ConfigError(f"{folder}: a dataset is there already; choose another folder, or pass --overwrite")


def remove_stale(folder: Path | str) -> None:
    """Deletes what killed writers of this dataset have left beside it.

    A writer holds a lock on its index as long as it lives. A folder whose lock can't be asked for (a file system
    without locks) stays. So does a dataset moved aside, unless its successor is in its place.
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


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardWriter:
    """Writes a dataset: a context manager. The folder appears whole when the block ends well, and not at all otherwise.

    Args:
        folder: the dataset to write; new, empty, or (with `overwrite`) a dataset to replace.
        tokenizer: the one that made the ids; its model is copied beside the shards.
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
        self._dtype = token_dtype(tokenizer.vocab_size)
        check_target(self.folder, overwrite)
        self._target = Path(os.path.abspath(folder))  # has a name and a parent, also for . or a/..
        self._aside = self._target.parent / f".{self._target.name}{_ASIDE}{uuid.uuid4().hex[:8]}"
        self._shards: list[ShardEntry] = []
        self._sources: dict[str, SourceEntry] = {}
        self._documents = self._tokens = self._bytes = self._shard_documents = self._shard_tokens = 0
        self._file: BinaryIO | None = None
        self._tar: tarfile.TarFile | None = None
        self._finished = False

    def __enter__(self) -> Self:
        with explain_disk_errors(self.folder):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._aside.mkdir()
            self._index = (self._aside / INDEX_FILE).open("wb")
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._index.write(bytes(INDEX_HEADER.itemsize))  # the count is known at the end
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
                self._move()
        finally:
            with contextlib.suppress(OSError):  # closing writes what is buffered; the folder goes away in any case
                self._index.close()
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()
            shutil.rmtree(self._aside, ignore_errors=True)

    def add(
        self, tokens: np.ndarray, *, n_bytes: int, id: str, source: str = "", metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Append a document.

        Args:
            tokens: content token ids, 1-D, without bos and eos.
            n_bytes: UTF-8 bytes of its text.
            id: names the document in its source.
            source: names the source.
            metadata: more JSON values to keep (a title, say).
        """
        assert tokens.ndim == 1 and not self._finished
        assert tokens.size == 0 or 0 <= int(tokens.min()) <= int(tokens.max()) < self.tokenizer.vocab_size
        own = {"id": id, "source": source, "n_bytes": n_bytes, "n_tokens": tokens.size}
        note = json.dumps({**(metadata or {}), **own}, ensure_ascii=False).encode()
        array = io.BytesIO()
        np.lib.format.write_array(array, tokens.astype(self._dtype), version=(1, 0), allow_pickle=False)
        data = array.getvalue()
        assert len(data) == NPY_HEADER_BYTES + tokens.size * self._dtype.itemsize
        with explain_disk_errors(self.folder):
            self._turn_over(len(data) + len(note) + 4 * tarfile.BLOCKSIZE)
            data_offset = self._add_member(f"{self._documents:010d}.npy", data) + NPY_HEADER_BYTES
            json_offset = self._add_member(f"{self._documents:010d}.json", note)
            row = (data_offset, tokens.size, n_bytes, json_offset, len(note), len(self._shards))
            self._index.write(np.array(row, INDEX_RECORD).tobytes())
        old = self._sources.get(source, SourceEntry(name=source, documents=0, tokens=0, bytes=0))
        self._sources[source] = SourceEntry(
            name=source, documents=old.documents + 1, tokens=old.tokens + tokens.size, bytes=old.bytes + n_bytes
        )
        self._documents += 1
        self._tokens += tokens.size
        self._bytes += n_bytes
        self._shard_documents += 1
        self._shard_tokens += tokens.size

    @property
    def documents(self) -> int:
        """How many were added."""
        return self._documents

    def finish(self) -> None:
        """Write all but the final rename; the end of the block does it too, but two datasets may want it at once."""
        if self._finished:
            return
        if not self._documents:
            raise ConfigError(f"{self.folder}: there is no document to write; check the sources")
        with explain_disk_errors(self.folder):
            self._close_shard()
            self._index.seek(0)
            header = (INDEX_MAGIC, FORMAT_VERSION, INDEX_RECORD.itemsize, self._documents)
            self._index.write(np.array(header, INDEX_HEADER).tobytes())
            self._index.flush()  # closing it would give up the lock
            file = self._copy_tokenizer()
            manifest = self._manifest(TokenizerEntry(kind=self.tokenizer.kind, file=file, sha256=self.tokenizer.sha256))
            text = json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False)
            (self._aside / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
            for path in (*self._aside.iterdir(), self._aside):
                sync(path)
        self._finished = True

    def _manifest(self, tokenizer: TokenizerEntry) -> Manifest:
        index = self._aside / INDEX_FILE
        return Manifest(
            format_version=FORMAT_VERSION,
            tool_version=__version__,
            documents=self._documents,
            tokens=self._tokens,
            bytes=self._bytes,
            dtype=self._dtype.str,
            vocab_size=self.tokenizer.vocab_size,
            bos_id=self.tokenizer.bos_id,
            eos_id=self.tokenizer.eos_id,
            pad_id=self.tokenizer.pad_id,
            tokenizer=tokenizer,
            index=FileEntry(file=INDEX_FILE, bytes=index.stat().st_size, sha256=hash_file(index)),
            shards=tuple(self._shards),
            sources=tuple(self._sources.values()),
        )

    def _copy_tokenizer(self) -> str | None:
        if not isinstance(self.tokenizer, SentencePieceTokenizer):
            return None
        (self._aside / TOKENIZER_FILE).write_bytes(self.tokenizer.model_bytes)
        return TOKENIZER_FILE

    def _add_member(self, name: str, data: bytes) -> int:
        """Append a file to the open shard; the offset of its data."""
        assert self._tar is not None and self._file is not None
        offset = self._file.tell() + tarfile.BLOCKSIZE
        member = tarfile.TarInfo(name)  # time 0, owner 0: the same input gives the same bytes
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))
        return offset

    def _turn_over(self, size: int) -> None:
        """Have a shard open that takes `size` more bytes."""
        if self._file is not None and self._file.tell() + size > self.max_shard_bytes:
            self._close_shard()
        if self._file is None:
            self._file = (self._aside / f"shard-{len(self._shards):05d}.tar").open("wb")
            self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT)

    def _close_shard(self) -> None:
        if self._file is None or self._tar is None:
            return
        self._tar.close()
        self._file.close()
        path = Path(self._file.name)
        entry = ShardEntry(
            file=path.name,
            bytes=path.stat().st_size,
            sha256=hash_file(path),
            documents=self._shard_documents,
            tokens=self._shard_tokens,
        )
        self._shards.append(entry)
        self._file = self._tar = None
        self._shard_documents = self._shard_tokens = 0

    def _move(self) -> None:
        """Rename the finished folder into its place; a dataset that is there is moved aside first, then deleted."""
        old = self._aside.with_name(f"{self._aside.name}{_OLD}")
        with explain_disk_errors(self.folder):
            if self._target.exists():
                self._target.rename(old)
            try:
                self._aside.rename(self._target)
            finally:
                if old.exists() and not self._target.exists():
                    old.rename(self._target)
            sync(self._target.parent)
        shutil.rmtree(old, ignore_errors=True)
