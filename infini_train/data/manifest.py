"""The formats of a dataset's manifest.json and documents.idx: what they hold, and reading them. Imports no torch."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from infini_train.config.errors import ConfigError

FORMAT_VERSION = 1
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


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of the dataset."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardEntry(FileEntry):
    """A shard. `pairs` counts the documents whose loss is on their end alone (see `LOSS_START`)."""

    documents: int
    tokens: int
    pairs: int = 0


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
    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a dataset. `tokens` counts content tokens (no bos, eos), `bytes` the UTF-8 bytes of the text.

    `length_histogram[k]` counts the documents of 2^(k-1) to 2^k - 1 tokens (k = 0: none). `left_out` counts, by reason,
    documents of the sources that were left out. Both are empty in datasets of earlier versions.
    """

    format_version: int
    tool_version: str
    documents: int
    tokens: int
    bytes: int
    dtype: str
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    tokenizer: TokenizerEntry
    index: FileEntry
    shards: tuple[ShardEntry, ...]
    sources: tuple[SourceEntry, ...]
    length_histogram: tuple[int, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Index and shards."""
        return (self.index, *self.shards)


def hash_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The stored type of token ids: uint16 where they fit, else uint32; little endian."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest in a dataset's folder.

    Raises:
        ConfigError: no such folder, no manifest, or one of another version or form.
    """
    folder = Path(folder)
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        protocol, _, rest = str(folder).partition(":/")  # a URL that has become a path
        if protocol.isalnum() and rest:
            raise ConfigError(f"{protocol}://{rest}: only training and evaluation read datasets at URLs; copy it first")
        raise ConfigError(f"{folder}: no such dataset folder; write one with infini-data encode")
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        inner = sorted(str(p.parent) for p in folder.glob(f"*/{MANIFEST_FILE}"))
        hint = f"give one of {', '.join(inner)}" if inner else "is it a folder written by infini-data encode?"
        raise ConfigError(f"{folder}: holds no {MANIFEST_FILE}; {hint}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read ({error}); encode the dataset again") from error
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version != FORMAT_VERSION:
        raise ConfigError(f"{path}: format version {version} is not {FORMAT_VERSION}; encode the dataset again")
    try:  # JSON mode, since strict Python mode refuses dict -> dataclass
        manifest = pydantic.TypeAdapter(Manifest).validate_json(json.dumps(tree), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {field}: {first['msg']}; encode the dataset again") from error
    if not manifest.documents or manifest.dtype != token_dtype(manifest.vocab_size).str:
        raise ConfigError(f"{path}: documents or dtype can't be right; encode the dataset again")
    names = [manifest.tokenizer.file or INDEX_FILE, *(entry.file for entry in manifest.files)]
    if manifest.index.file != INDEX_FILE or any(Path(name).name != name for name in names):
        raise ConfigError(f"{path}: names a file outside the dataset's folder; encode the dataset again")
    return manifest


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Check that every file of the manifest is there at its full size.

    Raises:
        ConfigError: a file is missing or truncated; names the first.
    """
    for entry in manifest.files:
        path = folder / entry.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ConfigError(f"{path}: can't be read ({error.strerror}); copy the dataset again") from error
        if size != entry.bytes:
            raise ConfigError(
                f"{path}: has {size} bytes, not the {entry.bytes} of the manifest; copy the dataset again"
            )


def read_index(folder: Path, manifest: Manifest) -> np.ndarray:
    """The records of documents.idx, memory-mapped and checked against the manifest.

    Raises:
        ConfigError: of another version, or not the index of this manifest.
    """
    path = folder / INDEX_FILE
    with path.open("rb") as file:
        header = np.frombuffer(file.read(INDEX_HEADER.itemsize), INDEX_HEADER)[0]
    if header["magic"] != INDEX_MAGIC:
        raise ConfigError(f"{path}: is not an index of documents; encode the dataset again")
    if (header["version"], header["record_bytes"]) != (FORMAT_VERSION, INDEX_RECORD.itemsize):
        raise ConfigError(f"{path}: version {header['version']} is not {FORMAT_VERSION}; encode the dataset again")
    mismatch = ConfigError(f"{path}: does not match {MANIFEST_FILE}; copy the dataset again, or encode it again")
    if manifest.index.bytes != INDEX_HEADER.itemsize + manifest.documents * INDEX_RECORD.itemsize:
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
    return index
