"""Shards: tar files (WebDataset) with two members per document, and the records of an index. Imports no torch."""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from infini_train.data.manifest import INDEX_RECORD, LOSS_START, NPY_HEADER_BYTES, ShardEntry, SourceEntry

OWN_METADATA = ("id", "source", "n_bytes", "n_tokens", "crc32")  # written for each document
CHECKSUM = "crc32"
_END_BYTES = 2 * tarfile.BLOCKSIZE  # of zeros, then padding to whole records


class ShardRun:
    """Writes documents into shards PREFIX-00000.tar, PREFIX-00001.tar, ... and counts them by source.

    Args:
        folder: to write the shards to.
        prefix: of their names.
        index: receives a record (INDEX_RECORD) for each document; its field shard counts from 0.
        dtype: stored type of the ids.
        max_shard_bytes: a shard is closed before it exceeds this size (a larger document gets its own).
    """

    def __init__(self, folder: Path, prefix: str, index: BinaryIO, dtype: np.dtype[Any], max_shard_bytes: int) -> None:
        self.folder = folder
        self.prefix = prefix
        self.max_shard_bytes = max_shard_bytes
        self.shards: list[ShardEntry] = []
        self.sources: dict[str, SourceEntry] = {}
        self.documents = 0
        self._dtype = dtype
        self._index = index
        self._open: _Shard | None = None

    def add(
        self, tokens: np.ndarray, *, n_bytes: int, id: str, source: str = "", metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Append a document.

        Args:
            tokens: content token ids, 1-D, without bos and eos.
            n_bytes: UTF-8 bytes of its text.
            id: names the document in its source.
            source: names the source.
            metadata: other JSON values to keep (a title, say); with `LOSS_START` the document is one of a pair.

        Raises:
            OSError: the disk is full, say.
        """
        tokens = np.ascontiguousarray(tokens, self._dtype)
        own = {"id": id, "source": source, "n_bytes": n_bytes, "n_tokens": tokens.size}
        note = _encode_note({**strict_json(dict(metadata or {})), **own}, tokens)
        size = NPY_HEADER_BYTES + tokens.nbytes + len(note) + 4 * tarfile.BLOCKSIZE
        if self._open is not None and self._open.size + size > self.max_shard_bytes:
            self.close_shard()
        if self._open is None:
            self._open = _Shard(self.folder / f"{self.prefix}-{len(self.shards):05d}.tar")
        data_offset, json_offset = self._open.add(tokens, note, is_pair=LOSS_START in (metadata or {}))
        row = (data_offset, tokens.size, n_bytes, json_offset, len(note), len(self.shards))
        self._index.write(np.array(row, INDEX_RECORD).tobytes())
        self.documents += 1
        source = as_utf8(source)
        old = self.sources.get(source, SourceEntry(name=source, documents=0, tokens=0, bytes=0))
        self.sources[source] = SourceEntry(
            name=source, documents=old.documents + 1, tokens=old.tokens + tokens.size, bytes=old.bytes + n_bytes
        )

    def close_shard(self) -> None:
        """Finish the open shard, if there is one; the next document goes to a new one."""
        if self._open is not None:
            self.shards.append(self._open.close())
            self._open = None

    def abandon(self) -> None:
        """Close the open file as it is."""
        if self._open is not None:
            with contextlib.suppress(OSError):  # closing writes what is buffered
                self._open.file.close()


@functools.lru_cache(maxsize=1 << 14)
def npy_header(dtype: np.dtype[Any], size: int) -> bytes:
    """The header before the ids in a .npy file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": (size,)})
    assert len(header.getvalue()) == NPY_HEADER_BYTES
    return header.getvalue()


def _encode_note(note: Mapping[str, Any], tokens: np.ndarray) -> bytes:
    return encode_metadata({**note, CHECKSUM: document_checksum(note, tokens)})


def strict_json(value: Any) -> Any:
    """The JSON value with text for the numbers that JSON can't spell: NaN, Infinity and -Infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: strict_json(each) for key, each in value.items()}
    return [strict_json(each) for each in value] if isinstance(value, (list, tuple)) else value


def encode_metadata(note: Mapping[str, Any]) -> bytes:
    """As JSON, which can hold half a surrogate pair (from a file's name, say), as UTF-8 can't."""
    return json.dumps(note, ensure_ascii=False).encode("utf-8", "backslashreplace")


def as_utf8(name: str) -> str:
    """An id or a source as datasets name it: with backslashes for half a surrogate pair (from a file's name, say)."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def document_checksum(metadata: Mapping[str, Any], tokens: np.ndarray) -> int:
    """crc32 of the ids as they are stored and of the metadata without the checksum itself."""
    return metadata_checksum(metadata, zlib.crc32(tokens.view(np.uint8).data))


def metadata_checksum(metadata: Mapping[str, Any], ids_crc32: int) -> int:
    """The same, for ids that have this crc32."""
    note = {key: value for key, value in metadata.items() if key != CHECKSUM}
    return zlib.crc32(encode_metadata(note), ids_crc32)


def has_checksum(note: bytes, ids_crc32: int) -> bool:
    """Whether stored metadata end with the right checksum, found without parsing them; false proves nothing."""
    rest, _, last = note.rpartition(f', "{CHECKSUM}": '.encode())
    return last == b"%d}" % zlib.crc32(rest + b"}", ids_crc32)


class _Shard:
    """One tar file. Time 0 and owner 0: the same documents give the same bytes."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb", buffering=1 << 20)
        self.size = 0
        self._path = path
        self._hash = hashlib.sha256()
        self._documents = self._tokens = self._pairs = 0

    def add(self, tokens: np.ndarray, note: bytes, *, is_pair: bool) -> tuple[int, int]:
        """Append a document's members; returns the offsets of its first token id and of its metadata."""
        key = f"{self._documents:010d}"
        header = npy_header(tokens.dtype, tokens.size)
        data_offset = self._add_member(f"{key}.npy", header, tokens.view(np.uint8).data)
        json_offset = self._add_member(f"{key}.json", note)
        self._documents += 1
        self._tokens += tokens.size
        self._pairs += is_pair
        return data_offset + NPY_HEADER_BYTES, json_offset

    def close(self) -> ShardEntry:
        padding = -(self.size + _END_BYTES) % tarfile.RECORDSIZE
        self._write(bytes(_END_BYTES + padding))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return ShardEntry(
            file=self._path.name,
            bytes=self.size,
            sha256=self._hash.hexdigest(),
            documents=self._documents,
            tokens=self._tokens,
            pairs=self._pairs,
        )

    def _add_member(self, name: str, *chunks: bytes | memoryview) -> int:
        """Append a file of these bytes; returns the offset of the first."""
        member = tarfile.TarInfo(name)
        member.size = sum(len(chunk) for chunk in chunks)
        self._write(member.tobuf(tarfile.GNU_FORMAT))
        offset = self.size
        for chunk in chunks:
            self._write(chunk)
        self._write(bytes(-member.size % tarfile.BLOCKSIZE))
        return offset

    def _write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self._hash.update(data)
        self.size += len(data)
