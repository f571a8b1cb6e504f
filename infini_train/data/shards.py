"""A dataset on disk: tar shards of token ids (WebDataset), an index of documents, and a manifest. Imports no torch.

A shard holds two members per document: ``<key>.npy`` (1-D token ids without bos and eos) and ``<key>.json`` (metadata).
``documents.idx`` records where each document's ids begin, so any window of any document is one read of the file.
"""

import contextlib
import json
import os
import threading
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import numpy as np

from infini_train.config.errors import ConfigError
from infini_train.data.cache import RemoteFolder, check_space, is_url
from infini_train.data.manifest import (
    LOSS_START,
    NPY_HEADER_BYTES,
    FileEntry,
    Manifest,
    check_sizes,
    read_index,
    read_manifest,
    warn_unsealed,
)
from infini_train.data.shard_file import CHECKSUM, OWN_METADATA, has_checksum, metadata_checksum, npy_header
from infini_train.data.writer import ShardWriter
from infini_train.regular_files import open_regular

__all__ = ["CorruptDocumentError", "Dataset", "Manifest", "ShardWriter"]

_ONE_READ_BYTES = 1 << 16
_CHECKED_BYTES = 1 << 20  # at once
_OPEN_FILES = 64  # shards kept open by one dataset


class CorruptDocumentError(ValueError):
    """The stored data of one document is damaged."""


class Dataset:
    """A dataset opened for reading; memory stays constant, whatever is read. Safe to share between threads.

    Attributes:
        folder: the local folder.
        manifest: its contents.
        identity: hash of all that training reads; the same for the same documents in the same order.
        lengths_tokens: int64 (documents,), content tokens of each document.
        lengths_bytes: int64 (documents,), bytes of each document's text.
    """

    def __init__(self, folder: Path, manifest: Manifest, index: np.ndarray, remote: RemoteFolder | None = None) -> None:
        self.folder = folder
        self._remote = remote
        self.manifest = manifest
        self.identity = manifest.identity
        self.lengths_tokens = index["n_tokens"].astype(np.int64)
        self.lengths_bytes = index["n_bytes"].astype(np.int64)
        self._index = index
        self._is_checked = np.zeros(len(index), bool)
        self._dtype = np.dtype(manifest.dtype)
        self._files: OrderedDict[int, IO[bytes]] = OrderedDict()  # by shard, least recently used first
        self._lock = threading.Lock()

    @classmethod
    def open(cls, location: Path | str, cache_dir: Path | str | None = None) -> "Dataset":
        """Open a dataset, check its manifest, its index and its files' sizes (hashes: `infini-data verify`).

        Args:
            location: its folder, or the folder's URL.
            cache_dir: keeps the files of a URL; each shard is fetched when it is first read, and its hash checked.

        Raises:
            ConfigError: what is missing, truncated, or of another version, in one line.
        """
        if not is_url(str(location)):
            folder = Path(location)
            manifest = read_manifest(folder)
            if not manifest.is_sealed:
                warn_unsealed(str(location))
            check_sizes(folder, manifest)
            return cls(folder, manifest, read_index(folder, manifest))
        if cache_dir is None:
            raise ConfigError(f"data.cache_dir: {location} needs one: a folder with room for the whole dataset")
        remote = RemoteFolder(str(location), Path(cache_dir))
        manifest = remote.manifest
        if not manifest.is_sealed:
            warn_unsealed(remote.url)
        check_space(Path(cache_dir), {remote.url: remote.missing_bytes(manifest.files)})
        try:
            if manifest.tokenizer.file is not None:
                remote.open(manifest.tokenizer).close()
            remote.open(manifest.index).close()
        except OSError as error:
            place = "" if error.filename is None else f"data.cache_dir: {os.fsdecode(error.filename)}: "
            raise ConfigError(f"{place}{error.strerror}") from error
        return cls(remote.folder, manifest, read_index(remote.folder, manifest), remote)

    def __len__(self) -> int:
        return self.manifest.documents

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Content tokens [start, stop) of a document, 1-D in the stored type.

        The first read of a document reads all of it and its metadata, for their checksum; later ones nothing else.

        Raises:
            CorruptDocumentError: the document is damaged, or holds ids outside of the vocabulary.
        """
        record = self._index[document]
        n_tokens, offset = int(record["n_tokens"]), int(record["data_offset"])
        assert 0 <= start <= stop <= n_tokens, f"document {document} has no tokens [{start}, {stop})"
        shard, size = int(record["shard"]), self._dtype.itemsize
        if start * size <= _ONE_READ_BYTES:  # header and tokens at once
            data = self._read_bytes(shard, offset - NPY_HEADER_BYTES, NPY_HEADER_BYTES + stop * size)
            header, data = data[:NPY_HEADER_BYTES], data[NPY_HEADER_BYTES + start * size :]
        else:
            header = self._read_bytes(shard, offset - NPY_HEADER_BYTES, NPY_HEADER_BYTES)
            data = self._read_bytes(shard, offset + start * size, (stop - start) * size)
        if header != npy_header(self._dtype, n_tokens):
            raise CorruptDocumentError(f"{self.folder}: the data of document {document} is damaged")
        if not self._is_checked[document]:
            self._check(document)
            self._is_checked[document] = True
        tokens = np.frombuffer(data, self._dtype)
        if tokens.size and int(tokens.max()) >= self.manifest.vocab_size:
            raise CorruptDocumentError(f"{self.folder}: document {document} holds ids outside of the vocabulary")
        return tokens

    def _check(self, document: int) -> None:
        """Raises unless ids and metadata fit their checksum; shards of earlier versions have none."""
        record = self._index[document]
        begin, crc = int(record["data_offset"]), 0
        end = begin + int(record["n_tokens"]) * self._dtype.itemsize
        for offset in range(begin, end, _CHECKED_BYTES):
            data = self._read_bytes(int(record["shard"]), offset, min(_CHECKED_BYTES, end - offset))
            crc = zlib.crc32(data, crc)
        if not has_checksum(self._read_note(document), crc):
            metadata = self.metadata(document)
            if CHECKSUM in metadata and metadata[CHECKSUM] != metadata_checksum(metadata, crc):
                raise CorruptDocumentError(f"{self.folder}: the data of document {document} is damaged")

    def _read_note(self, document: int) -> bytes:
        """The stored metadata."""
        record = self._index[document]
        return self._read_bytes(int(record["shard"]), int(record["json_offset"]), int(record["json_bytes"]))

    def metadata(self, document: int) -> dict[str, Any]:
        """id, source, n_bytes, n_tokens of a document, and the other metadata from its source.

        Raises:
            CorruptDocumentError: the stored metadata is damaged.
        """
        try:
            metadata = json.loads(self._read_note(document))
        except (ValueError, RecursionError):
            metadata = None
        if not isinstance(metadata, dict) or not metadata.keys() >= set(OWN_METADATA) - {CHECKSUM}:
            raise CorruptDocumentError(f"{self.folder}: the metadata of document {document} is damaged")
        return metadata

    def loss_start(self, document: int) -> int:
        """The first content token that counts in the loss: 0, or in a (book, summary) pair the summary's first.

        Raises:
            CorruptDocumentError: the metadata of a document that may be a pair are damaged.
        """
        if not self.manifest.shards[int(self._index[document]["shard"])].pairs:
            return 0
        start = self.metadata(document).get(LOSS_START, 0)
        if not isinstance(start, int) or not 0 <= start <= int(self._index[document]["n_tokens"]):
            raise CorruptDocumentError(f"{self.folder}: the metadata of document {document} is damaged")
        return start

    def name(self, document: int) -> str:
        """Its id, or its number if the id can't be read or is not on this machine."""
        shard = self.manifest.shards[int(self._index[document]["shard"])]
        with contextlib.suppress(CorruptDocumentError, OSError):
            if (self.folder / shard.file).exists():
                return str(self.metadata(document).get("id", document))
        return str(document)

    def missing_bytes(self) -> int:
        """Bytes still to be fetched, if the dataset is at a URL."""
        return self._remote.missing_bytes(self.manifest.files) if self._remote is not None else 0

    def _open(self, entry: FileEntry) -> IO[bytes]:
        return self._remote.open(entry) if self._remote is not None else open_regular(self.folder / entry.file)

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def _read_bytes(self, shard: int, offset: int, size: int) -> bytes:
        with self._lock:  # pread needs no lock, but the file may be closed by another thread meanwhile
            if shard not in self._files:
                if len(self._files) >= _OPEN_FILES:
                    self._files.popitem(last=False)[1].close()
                self._files[shard] = self._open(self.manifest.shards[shard])
            self._files.move_to_end(shard)
            data = os.pread(self._files[shard].fileno(), size, offset)
        if len(data) != size:
            raise CorruptDocumentError(
                f"{self.folder / self.manifest.shards[shard].file}: ends before byte {offset + size}"
            )
        return data
