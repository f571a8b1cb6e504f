"""The formats of a dataset's manifest.json and documents.idx: what they hold, and reading them. Imports no torch."""

import dataclasses
import functools
import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
import pydantic

from infini_train.config.errors import ConfigError
from infini_train.data.sealed import (
    CHECKSUM,
    MAX_BYTES,
    dump_json,
    dump_sealed,
    has_right_checksum,
    parse_object,
)
from infini_train.environment import world
from infini_train.regular_files import open_regular, read_regular, require_regular

LOG = logging.getLogger(__name__)
FORMAT_VERSION = 2  # of the manifest: sealed with a checksum
UNSEALED_VERSION = 1  # the same fields without one; still read
INDEX_VERSION = 1
INDEX_FILE = "documents.idx"
MANIFEST_FILE = "manifest.json"
INDEX_MAGIC = b"INFIDOCS"
INDEX_HEADER = np.dtype([("magic", "S8"), ("version", "<u4"), ("record_bytes", "<u4"), ("documents", "<u8")])
INDEX_RECORD = np.dtype(
    [
        ("data_offset", "<u8"),  # of the first token id, in bytes from the start of the shard
        ("n_tokens", "<u8"),
        ("n_bytes", "<u8"),  # of the text in UTF-8
        ("json_offset", "<u8"),
        ("json_bytes", "<u4"),
        ("shard", "<u4"),
    ]
)
LOSS_START = "loss_start"  # in a document's metadata: the first content token that counts in the loss
NPY_HEADER_BYTES = 128  # numpy pads the header of a 1-D array to this size, whatever its length
_AGAIN = "copy the dataset again, or encode it again"
Count = Annotated[int, pydantic.Field(ge=0, lt=2**63)]


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of the dataset."""

    file: str
    bytes: Count
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardEntry(FileEntry):
    """A shard. `pairs` counts the documents whose loss is on their end alone (see `LOSS_START`)."""

    documents: Count
    tokens: Count
    pairs: Count = 0


@dataclass(frozen=True, kw_only=True)
class TokenizerEntry:
    """The tokenizer; `file` is in the dataset's folder (null for kind byte)."""

    kind: str
    file: str | None
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SourceEntry:
    """Totals of one source."""

    name: str
    documents: Count
    tokens: Count
    bytes: Count


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a dataset. `tokens` counts content tokens (no bos, eos), `bytes` the UTF-8 bytes of the text.

    `length_histogram[k]` counts the documents of 2^(k-1) to 2^k - 1 tokens (k = 0: none). `left_out` counts, by reason,
    documents of the sources that were left out. Both are empty in datasets of earlier versions.
    """

    format_version: int
    tool_version: str
    documents: Count
    tokens: Count
    bytes: Count
    dtype: str
    vocab_size: Count
    bos_id: Count
    eos_id: Count
    pad_id: Count
    tokenizer: TokenizerEntry
    index: FileEntry
    shards: tuple[ShardEntry, ...]
    sources: tuple[SourceEntry, ...]
    length_histogram: tuple[Count, ...] = ()
    left_out: dict[str, Count] = field(default_factory=dict)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Index and shards."""
        return (self.index, *self.shards)

    @property
    def special_ids(self) -> tuple[int, int, int]:
        """Of bos, eos and pad."""
        return self.bos_id, self.eos_id, self.pad_id

    @property
    def is_sealed(self) -> bool:
        """Whether a checksum covers it; not in datasets of earlier versions."""
        return self.format_version == FORMAT_VERSION

    @property
    def documents_sha256(self) -> str:
        """Hash of the tokenizer's and the shards' hashes."""
        parts = [self.tokenizer.sha256, *(shard.sha256 for shard in self.shards)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @property
    def identity(self) -> str:
        """Hash of all that training reads: tokenizer, special ids, vocabulary, index, shards, and which hold pairs.

        Not of what only tells about the documents (sources, what was left out), nor of the version that wrote them.
        """
        pairs = [shard.pairs for shard in self.shards]
        parts = [self.documents_sha256, self.index.sha256, self.vocab_size, *self.special_ids, *pairs]
        return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with open_regular(path) as file:
        return hash_stream(file)


def hash_stream(file: IO[bytes]) -> str:
    """sha256 of what an open file holds from here on, in hexadecimal."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The stored type of token ids: uint16 where they fit, else uint32; little endian."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def dump_manifest(manifest: Manifest) -> bytes:
    """The content of manifest.json, sealed.

    Raises:
        ConfigError: it would be too large to be read.
    """
    tree = {**dataclasses.asdict(manifest), "format_version": FORMAT_VERSION}
    data = dump_sealed(tree)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{MANIFEST_FILE}: would take more than {MAX_BYTES:,} bytes; write larger shards")
    return data


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest in a dataset's folder.

    Raises:
        ConfigError: no such folder, no manifest, one of another version or form, or not as it was written.
    """
    folder = Path(folder)
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        protocol, _, rest = str(folder).partition(":/")  # a URL that has become a path
        if protocol.isalnum() and rest:
            raise ConfigError(f"{protocol}://{rest}: only training and evaluation read datasets at URLs; copy it first")
        raise ConfigError(f"{folder}: no such dataset folder; write one with infini-data encode")
    try:
        data = read_regular(path, MAX_BYTES)
    except FileNotFoundError:
        inner = sorted(str(p.parent) for p in folder.glob(f"*/{MANIFEST_FILE}"))
        hint = f"give one of {', '.join(inner)}" if inner else "is it a folder written by infini-data encode?"
        raise ConfigError(f"{folder}: holds no {MANIFEST_FILE}; {hint}") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}); {_AGAIN}") from error
    return parse_manifest(data, str(path))


def parse_manifest(data: bytes, place: str) -> Manifest:
    """The manifest of these bytes.

    Args:
        data: of the file.
        place: where it lies; begins the errors.

    Raises:
        ConfigError: of another version or form, or not as it was written.
    """
    try:
        tree = parse_object(data)
    except ValueError as error:
        raise ConfigError(f"{place}: can't be read ({error}); {_AGAIN}") from error
    version = tree.get("format_version")
    if version not in (FORMAT_VERSION, UNSEALED_VERSION):
        shown = version if isinstance(version, int) else "?"
        raise ConfigError(f"{place}: format version {shown} is not {FORMAT_VERSION}; encode the dataset again")
    if version == FORMAT_VERSION:
        if not has_right_checksum(tree):
            raise ConfigError(f"{place}: is not as it was written (its checksum differs); {_AGAIN}")
        del tree[CHECKSUM]
    try:  # JSON mode, since strict Python mode refuses dict -> dataclass
        manifest = pydantic.TypeAdapter(Manifest).validate_json(json.dumps(tree), strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise ConfigError(f"{place}: {field}: unknown field; {_AGAIN}") from error
        raise ConfigError(f"{place}: {field and f'{field}: '}{first['msg']}; {_AGAIN}") from error
    _check_values(manifest, place)
    return manifest


def _check_values(manifest: Manifest, place: str) -> None:
    """Raises unless the values can be those of a dataset."""
    if not manifest.documents or manifest.dtype != token_dtype(manifest.vocab_size).str:
        raise ConfigError(f"{place}: documents or dtype can't be right; {_AGAIN}")
    for name, number in zip(("bos_id", "eos_id", "pad_id"), manifest.special_ids, strict=True):
        if number >= manifest.vocab_size:
            raise ConfigError(f"{place}: {name}: {number} is outside of the vocabulary; {_AGAIN}")
    names = [manifest.tokenizer.file or INDEX_FILE, *(entry.file for entry in manifest.files)]
    is_plain = all(Path(name).name == name and name not in ("", "..") and "\0" not in name for name in names)
    if manifest.index.file != INDEX_FILE or not is_plain:
        raise ConfigError(f"{place}: names a file outside the dataset's folder; {_AGAIN}")


@functools.cache
def warn_unsealed(place: str) -> None:
    """Says, once for each dataset and job, that a manifest of an earlier version has no checksum."""
    if world()[0] == 0:
        advice = "infini-data verify checks all of it, and can add one"
        LOG.warning("warning: %s: is of an earlier version, and its manifest has no checksum; %s", place, advice)


def is_spelled_as_written(folder: Path) -> bool:
    """Whether a sealed manifest has each byte that was written, and not only the same values."""
    data = read_regular(folder / MANIFEST_FILE, MAX_BYTES)
    return data == dump_json(parse_object(data))


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Check that every file of the manifest is there at its full size.

    Raises:
        ConfigError: a file is missing or truncated, or is no regular file; names the first.
    """
    for entry in manifest.files:
        path = folder / entry.file
        try:
            size = require_regular(path).st_size
        except OSError as error:
            raise ConfigError(f"{path}: can't be read ({error.strerror}); copy the dataset again") from error
        if size != entry.bytes:
            raise ConfigError(
                f"{path}: has {size} bytes, not the {entry.bytes} of the manifest; copy the dataset again"
            )


def read_index(folder: Path, manifest: Manifest) -> np.ndarray:
    """The records of documents.idx, memory-mapped and checked against the manifest.

    Raises:
        ConfigError: of another version, not the index of this manifest, or damaged.
    """
    path = folder / INDEX_FILE
    mismatch = ConfigError(f"{path}: does not match {MANIFEST_FILE}; copy the dataset again, or encode it again")
    with open_regular(path) as file:
        head, size = file.read(INDEX_HEADER.itemsize), os.fstat(file.fileno()).st_size
    if size != manifest.index.bytes or size < INDEX_HEADER.itemsize:
        raise mismatch
    header = np.frombuffer(head, INDEX_HEADER)[0]
    if header["magic"] != INDEX_MAGIC:
        raise ConfigError(f"{path}: is not an index of documents; encode the dataset again")
    if (header["version"], header["record_bytes"]) != (INDEX_VERSION, INDEX_RECORD.itemsize):
        raise ConfigError(f"{path}: version {header['version']} is not {INDEX_VERSION}; encode the dataset again")
    if size != INDEX_HEADER.itemsize + manifest.documents * INDEX_RECORD.itemsize:
        raise mismatch
    index = np.memmap(path, INDEX_RECORD, "r", INDEX_HEADER.itemsize, (manifest.documents,))
    if header["documents"] != manifest.documents or index["shard"].max() >= len(manifest.shards):
        raise mismatch
    sums = (int(index["n_tokens"].sum()), int(index["n_bytes"].sum()))
    documents = np.bincount(index["shard"], minlength=len(manifest.shards)).tolist()
    if sums != (manifest.tokens, manifest.bytes) or documents != [shard.documents for shard in manifest.shards]:
        raise mismatch
    shard_bytes = np.array([shard.bytes for shard in manifest.shards], np.uint64)[index["shard"]]
    data_stop = index["data_offset"] + index["n_tokens"] * np.uint64(np.dtype(manifest.dtype).itemsize)
    json_stop = index["json_offset"] + index["json_bytes"]
    if (
        (data_stop > shard_bytes).any()
        or (json_stop > shard_bytes).any()
        or (index["data_offset"] < NPY_HEADER_BYTES).any()
    ):
        raise mismatch
    if hash_file(path) != manifest.index.sha256:  # it is read from end to end anyway
        raise ConfigError(f"{path}: is damaged (its hash differs); copy the dataset again, or encode it again")
    return index
