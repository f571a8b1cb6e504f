"""Encode a corpus into a dataset of shards, or two: for training and for validation."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_tools.readers import Document
from infini_train.config import ConfigError
from infini_train.data.manifest import MANIFEST_FILE, Manifest, read_manifest
from infini_train.data.tokenizer import Tokenizer
from infini_train.data.writer import ShardWriter, explain_disk_errors, remove_stale

_BATCH_CHARS = 4_000_000  # encoded at once


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How to write."""

    holdout: float = 0.0  # share of the documents that becomes the validation set
    max_shard_bytes: int = 1 << 29
    overwrite: bool = False
    threads: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"--holdout: {self.holdout} is not a share; give a number from 0 up to (not including) 1")
        if self.max_shard_bytes < 1 or self.threads < 1:
            raise ConfigError("--shard-mb and --threads: must be positive")


def is_held_out(document_id: str, share: float) -> bool:
    """Whether a document is for validation: by its id alone, so that it stays there when the corpus grows."""
    return int.from_bytes(hashlib.sha256(document_id.encode("utf-8", "replace")).digest()[:8], "big") < share * 2**64


def encode_corpus(
    documents: Iterable[Document], tokenizer: Tokenizer, out: Path | str, options: EncodeOptions | None = None
) -> dict[Path, Manifest]:
    """Write the documents to `out`, or with a holdout to `out`/train and `out`/validation.

    With a holdout and two or more documents both get at least one. What a killed run to `out` has left is deleted.

    Returns:
        The manifest of each dataset written.

    Raises:
        ConfigError: the folder holds something else, the disk is full, or the documents can't be read.
    """
    options, out = options or EncodeOptions(), Path(out)
    folders = [out / "train", out / "validation"] if options.holdout else [out]
    for folder in (out, out / "train", out / "validation"):  # the killed run may have had another holdout
        remove_stale(folder)
    made = not out.exists()
    if options.holdout:
        _check_parent(out, options.overwrite)
    encoded = _encode(documents, tokenizer, options)
    try:
        with contextlib.ExitStack() as stack:
            writers = [
                stack.enter_context(
                    ShardWriter(folder, tokenizer, max_shard_bytes=options.max_shard_bytes, overwrite=options.overwrite)
                )
                for folder in folders
            ]
            if options.holdout:
                _write_split(encoded, writers[0], writers[1], options.holdout)
            else:
                for document, tokens in encoded:
                    _add(writers[0], document, tokens)
            for writer in writers:
                writer.finish()  # what can fail has been done for both before either is renamed
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise
    return {folder: read_manifest(folder) for folder in folders}


def _check_parent(out: Path, overwrite: bool) -> None:
    """With a holdout, `out` holds nothing but the two datasets."""
    with explain_disk_errors(out):
        names = {path.name for path in out.iterdir() if ".partial-" not in path.name} if out.is_dir() else set()
    if MANIFEST_FILE in names:
        raise ConfigError(f"{out}: is itself a dataset; choose another folder for the two of --holdout")
    if names - {"train", "validation"}:
        raise ConfigError(f"{out}: is not empty; choose another folder")
    if names and not overwrite:
        raise ConfigError(f"{out}: datasets are there already; choose another folder, or pass --overwrite")


def _write_split(
    encoded: Iterator[tuple[Document, np.ndarray]], train: ShardWriter, validation: ShardWriter, share: float
) -> None:
    """Each document to its set. The first one is written last, to the set that would be empty without it."""
    first = next(encoded, None)
    for document, tokens in encoded:
        _add(validation if is_held_out(document.id, share) else train, document, tokens)
    if first is None or not train.documents + validation.documents:
        raise ConfigError("--holdout: needs two documents or more; give more text, or leave it out")
    if train.documents and (not validation.documents or is_held_out(first[0].id, share)):
        _add(validation, *first)
    else:
        _add(train, *first)


def _add(writer: ShardWriter, document: Document, tokens: np.ndarray) -> None:
    n_bytes = len(document.text.encode("utf-8"))
    writer.add(tokens, n_bytes=n_bytes, id=document.id, source=document.source, metadata=document.metadata)


def _encode(
    documents: Iterable[Document], tokenizer: Tokenizer, options: EncodeOptions
) -> Iterator[tuple[Document, np.ndarray]]:
    """The documents with their tokens, in order."""
    with tqdm(unit="B", unit_scale=True, desc="encode", disable=None if options.progress else True) as bar:
        for batch in _batches(documents):
            ids = tokenizer.encode_many([document.text for document in batch], options.threads)
            yield from zip(batch, ids, strict=True)
            bar.update(sum(len(document.text) for document in batch))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
