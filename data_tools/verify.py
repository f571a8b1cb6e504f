"""Checks that a dataset is what was written: every hash, and every document of every shard."""

import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_tools.progress import byte_bar
from infini_train.config.errors import ConfigError
from infini_train.data.manifest import (
    INDEX_FILE,
    NPY_HEADER_BYTES,
    Manifest,
    check_sizes,
    hash_file,
    read_index,
    read_manifest,
)
from infini_train.data.shard_file import document_checksum, npy_header
from infini_train.data.tokenizer import tokenizer_of

_SHOWN = 5  # damaged documents of a shard


def verify(folder: Path | str, workers: int = 1) -> list[str]:
    """What is wrong with a dataset, a line each, with the shard and the document; nothing if all is well.

    Raises:
        ConfigError: it can't even be opened: no manifest, or the index, the tokenizer or a file's size doesn't match.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    if hash_file(folder / INDEX_FILE) != manifest.index.sha256:
        raise ConfigError(f"{folder / INDEX_FILE}: is damaged (its hash differs); copy the dataset again")
    index = read_index(folder, manifest)
    tokenizer_of(folder)
    problems = list(_check_order(folder, manifest, index))
    bounds = np.searchsorted(index["shard"], np.arange(len(manifest.shards) + 1))
    total = sum(shard.bytes for shard in manifest.shards)
    with (
        ThreadPoolExecutor(workers) as pool,
        byte_bar("verify", total) as advance,
    ):
        checks = [
            pool.submit(_check_shard, folder, manifest, number, index[first:last], int(first))
            for number, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        ]
        for check, shard in zip(checks, manifest.shards, strict=True):
            problems += check.result()
            advance(shard.bytes)
    return problems


def _check_order(folder: Path, manifest: Manifest, index: np.ndarray) -> Iterator[str]:
    """Counts that must agree."""
    if (np.diff(index["shard"].astype(np.int64)) < 0).any():
        yield f"{folder / INDEX_FILE}: its documents are not in the order of the shards"
    tokens = np.bincount(index["shard"], index["n_tokens"], len(manifest.shards))
    for shard, found in zip(manifest.shards, tokens, strict=True):
        if int(found) != shard.tokens:
            yield f"{folder / shard.file}: has {int(found)} tokens in the index, {shard.tokens} in the manifest"
    for name in ("documents", "tokens", "bytes"):
        if sum(getattr(source, name) for source in manifest.sources) != getattr(manifest, name):
            yield f"{folder}: the {name} of the sources don't add up to those of the manifest"
    if manifest.length_histogram and sum(manifest.length_histogram) != manifest.documents:
        yield f"{folder}: the histogram of lengths doesn't count every document once"


def _check_shard(folder: Path, manifest: Manifest, number: int, rows: np.ndarray, first: int) -> list[str]:
    shard = manifest.shards[number]
    path, problems = folder / shard.file, []
    try:
        is_whole = hash_file(path) == shard.sha256
        with path.open("rb") as file:
            for place, row in enumerate(rows):
                if problem := _check_document(file, row, manifest):
                    problems.append(
                        f"{path}: document {place} of the shard ({first + place} of the dataset): {problem}"
                    )
    except OSError as error:
        return [f"{path}: can't be read: {error.strerror}"]
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"{path}: {len(problems) - _SHOWN} more documents are damaged"]
    if not is_whole and not problems:
        problems = [f"{path}: is damaged (its hash differs), but in no document"]
    return problems


def _check_document(file: BinaryIO, row: np.ndarray, manifest: Manifest) -> str | None:
    """What is wrong with a document."""
    dtype, n_tokens, start = np.dtype(manifest.dtype), int(row["n_tokens"]), int(row["data_offset"])
    file.seek(start - NPY_HEADER_BYTES - tarfile.BLOCKSIZE)
    head, header = file.read(tarfile.BLOCKSIZE), file.read(NPY_HEADER_BYTES)
    tokens = np.frombuffer(file.read(n_tokens * dtype.itemsize), dtype)
    file.seek(int(row["json_offset"]) - tarfile.BLOCKSIZE)
    json_head, note = file.read(tarfile.BLOCKSIZE), file.read(int(row["json_bytes"]))
    for data, size in ((head, NPY_HEADER_BYTES + tokens.nbytes), (json_head, len(note))):
        try:
            member = tarfile.TarInfo.frombuf(data, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            return f"a header of the tar is damaged ({error})"
        if member.size != size:
            return "a header of the tar gives another size"
    if header != npy_header(dtype, n_tokens):
        return "the header of its ids is damaged"
    if n_tokens and int(tokens.max()) >= manifest.vocab_size:
        return "it holds ids outside of the vocabulary"
    try:
        metadata = json.loads(note)
        if (metadata["n_tokens"], metadata["n_bytes"]) != (n_tokens, int(row["n_bytes"])):
            return "its metadata doesn't fit the index"
        if "crc32" in metadata and metadata["crc32"] != document_checksum(metadata, tokens):
            return "its checksum differs from its ids and metadata"
    except (ValueError, KeyError, TypeError):
        return "its metadata is damaged"
    return None
