"""Checks that a dataset is what was written: every hash, and every document of every shard."""

import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from data_tools.progress import byte_bar
from infini_train.atomic_files import write_atomic
from infini_train.data.manifest import (
    INDEX_FILE,
    LOSS_START,
    MANIFEST_FILE,
    NPY_HEADER_BYTES,
    Manifest,
    check_sizes,
    dump_manifest,
    hash_file,
    is_spelled_as_written,
    read_index,
    read_manifest,
)
from infini_train.data.shard_file import as_utf8, document_checksum, npy_header
from infini_train.data.tokenizer import tokenizer_of
from infini_train.data.writer import explain_disk_errors, length_histogram
from infini_train.regular_files import open_regular

_SHOWN = 5  # damaged documents of a shard


class _Checked(NamedTuple):
    """What a shard holds, and what is wrong with it."""

    problems: list[str]
    sources: dict[str, np.ndarray]  # documents, tokens, bytes
    pairs: int


def verify(folder: Path | str, workers: int = 1) -> list[str]:
    """What is wrong with a dataset, a line each, with the shard and the document; nothing if all is well.

    Raises:
        ConfigError: it can't even be opened: no manifest or a changed one, or the index, the tokenizer or a file's size
            doesn't match.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    index = read_index(folder, manifest)
    tokenizer_of(folder)
    problems = list(_check_counts(folder, manifest, index))
    if manifest.is_sealed and not is_spelled_as_written(folder):
        problems.append(f"{folder / MANIFEST_FILE}: holds the right values, but not the bytes that were written")
    bounds = np.searchsorted(index["shard"], np.arange(len(manifest.shards) + 1))
    total = sum(shard.bytes for shard in manifest.shards)
    sources: dict[str, np.ndarray] = {}
    with (
        ThreadPoolExecutor(workers) as pool,
        byte_bar("verify", total) as advance,
    ):
        checks = [
            pool.submit(_check_shard, folder, manifest, number, index[first:last], int(first))
            for number, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        ]
        for check, shard in zip(checks, manifest.shards, strict=True):
            checked = check.result()
            problems += checked.problems
            for name, counts in checked.sources.items():
                sources[name] = sources.get(name, 0) + counts
            if not checked.problems and checked.pairs != shard.pairs:
                problems.append(f"{folder / shard.file}: holds {checked.pairs} pairs, {shard.pairs} in the manifest")
            advance(shard.bytes)
    said = {each.name: [each.documents, each.tokens, each.bytes] for each in manifest.sources}
    if not problems and {name: counts.tolist() for name, counts in sources.items()} != said:
        problems.append(f"{folder}: the counts of the sources are not those of their documents")
    return problems


def seal(folder: Path | str) -> bool:
    """Give the manifest of a dataset that is all right a checksum.

    Returns:
        Whether it had none.

    Raises:
        ConfigError: it can't be written.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if not manifest.is_sealed:
        with explain_disk_errors(folder):
            write_atomic(folder / MANIFEST_FILE, dump_manifest(manifest))
    return not manifest.is_sealed


def _check_counts(folder: Path, manifest: Manifest, index: np.ndarray) -> Iterator[str]:
    """Counts that must agree with the index."""
    if (np.diff(index["shard"].astype(np.int64)) < 0).any():
        yield f"{folder / INDEX_FILE}: its documents are not in the order of the shards"
    tokens = np.bincount(index["shard"], index["n_tokens"], len(manifest.shards))
    for shard, found in zip(manifest.shards, tokens, strict=True):
        if int(found) != shard.tokens:
            yield f"{folder / shard.file}: has {int(found)} tokens in the index, {shard.tokens} in the manifest"
    if manifest.length_histogram and manifest.length_histogram != length_histogram(folder / INDEX_FILE):
        yield f"{folder}: the histogram of lengths is not that of the documents"


def _check_shard(folder: Path, manifest: Manifest, number: int, rows: np.ndarray, first: int) -> _Checked:
    shard = manifest.shards[number]
    path = folder / shard.file
    found = _Checked([], {}, 0)
    pairs = 0
    try:
        is_whole = hash_file(path) == shard.sha256
        with open_regular(path) as file:
            for place, row in enumerate(rows):
                note = _check_document(file, row, manifest)
                if isinstance(note, str):
                    found.problems.append(
                        f"{path}: document {place} of the shard ({first + place} of the dataset): {note}"
                    )
                    continue
                pairs += LOSS_START in note
                counts = found.sources.setdefault(as_utf8(str(note["source"])), np.zeros(3, np.int64))
                counts += (1, int(row["n_tokens"]), int(row["n_bytes"]))
    except OSError as error:
        return _Checked([f"{path}: can't be read: {error.strerror}"], {}, 0)
    if len(found.problems) > _SHOWN:
        found.problems[_SHOWN:] = [f"{path}: {len(found.problems) - _SHOWN} more documents are damaged"]
    if not is_whole and not found.problems:
        found.problems.append(f"{path}: is damaged (its hash differs), but in no document")
    return found._replace(pairs=pairs)


def _check_document(file: IO[bytes], row: np.ndarray, manifest: Manifest) -> dict[str, Any] | str:
    """The metadata of a document, or what is wrong with it."""
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
        if not 0 <= metadata.get(LOSS_START, 0) <= n_tokens or "source" not in metadata:
            return "its metadata can't be right"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "its metadata is damaged"
    return metadata
