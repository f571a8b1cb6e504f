"""Datasets made from datasets, without encoding anything again: several merged, or one split in two."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_tools.encode import is_held_out
from data_tools.join import StoredDocument, add_documents, add_sources
from data_tools.problems import SettingError
from data_tools.progress import byte_bar, elapsed_time
from data_tools.tasks import finished_tasks
from data_tools.workplace import Workplace, check_pair_target
from infini_train.atomic_files import sync_path
from infini_train.config.errors import ConfigError
from infini_train.data.manifest import (
    Manifest,
    ShardEntry,
    SourceEntry,
    hash_file,
    read_index,
    read_manifest,
    warn_unsealed,
)
from infini_train.data.shards import CorruptDocumentError, Dataset, ShardWriter
from infini_train.data.tokenizer import tokenizer_of
from infini_train.data.writer import explain_disk_errors, finish_dataset, write_aside


def merge(folders: Sequence[Path | str], out: Path | str, *, overwrite: bool = False, link: bool = False) -> Manifest:
    """Write the documents of several datasets, one after the other, as one; its shards are copies of theirs.

    Args:
        folders: two datasets or more, of the same tokenizer.
        out: the folder to write.
        overwrite: replace a dataset that is there.
        link: make hard links instead of copies: instant, but on the same file system only.

    Raises:
        ConfigError: other tokenizers, damaged data, or `out` can't be written.
    """
    paths, out = [Path(folder) for folder in folders], Path(out)
    if len(paths) < 2:
        raise ConfigError("give two datasets or more to merge")
    manifests = [read_manifest(path) for path in paths]
    for path, manifest in zip(paths, manifests, strict=True):
        if not manifest.is_sealed:
            warn_unsealed(str(path))
        for name in ("vocab_size", "bos_id", "eos_id", "pad_id"):
            if getattr(manifest, name) != getattr(manifests[0], name):
                raise ConfigError(f"{path}: has another {name} than {paths[0]}; encode it with the same tokenizer")
        if manifest.tokenizer.sha256 != manifests[0].tokenizer.sha256:
            raise ConfigError(f"{path}: was encoded with another tokenizer than {paths[0]}; encode it again")
    shards: list[ShardEntry] = []
    sources: dict[str, SourceEntry] = {}
    left_out: dict[str, int] = {}
    total = sum(shard.bytes for manifest in manifests for shard in manifest.shards)
    with (
        write_aside(out, overwrite=overwrite) as (aside, index),
        byte_bar("merge", total) as advance,
        explain_disk_errors(out),
    ):
        for path, manifest in zip(paths, manifests, strict=True):
            rows = np.array(read_index(path, manifest))
            rows["shard"] += len(shards)
            index.write(rows.tobytes())
            add_sources(sources, manifest.sources)
            for reason, number in manifest.left_out.items():
                left_out[reason] = left_out.get(reason, 0) + number
            for shard in manifest.shards:
                entry = dataclasses.replace(shard, file=f"shard-{len(shards):05d}.tar")
                _copy(path / shard.file, aside / entry.file, entry, link)
                shards.append(entry)
                advance(shard.bytes)
        return finish_dataset(aside, index, tokenizer_of(paths[0]), shards, sources.values(), left_out)


def _copy(path: Path, target: Path, entry: ShardEntry, link: bool) -> None:
    if link:
        os.link(path, target)
    else:
        shutil.copyfile(path, target)
        sync_path(target)
    if hash_file(target) != entry.sha256:
        raise ConfigError(f"{path}: is damaged (its hash differs); see infini-data verify {path.parent}")


def split(
    folder: Path | str, out: Path | str, share: float, *, max_shard_bytes: int = 1 << 29, overwrite: bool = False
) -> tuple[Manifest, Manifest]:
    """Write `out`/train and `out`/validation: whole documents are held out by their ids, as in encoding.

    Raises:
        ConfigError: damaged data; one of the two would be empty; or a folder can't be written.
    """
    if not 0 < share < 1:
        raise SettingError("{holdout}: {given} is not a share between 0 and 1", given=share)
    dataset, tokenizer, out = Dataset.open(folder), tokenizer_of(folder), Path(out)
    check_pair_target(out, overwrite)
    workplace = Workplace(out)
    with workplace as place, contextlib.ExitStack() as stack:
        if finished_tasks(place):
            raise ConfigError(f"{place}: holds unfinished work of infini-data encode; finish it, or remove it")
        shutil.rmtree(workplace.result, ignore_errors=True)  # of a run that was killed
        train, validation = (
            stack.enter_context(ShardWriter(workplace.result / name, tokenizer, max_shard_bytes=max_shard_bytes))
            for name in ("train", "validation")
        )
        for document, n_tokens in enumerate(tqdm(dataset.lengths_tokens, desc="split", disable=None)):
            try:
                metadata = dataset.metadata(document)
                stored = StoredDocument(dataset.read(document, 0, int(n_tokens)), metadata)
            except CorruptDocumentError as error:
                raise ConfigError(f"{error}; copy the dataset again") from error
            writer = validation if is_held_out(metadata["id"], share) else train
            add_documents(writer, [stored])
        if not train.documents or not validation.documents:
            empty = "training" if not train.documents else "validation"
            raise SettingError("{holdout}: no document falls to {empty}; give another share", empty=empty)
        with elapsed_time("sync"):
            stack.close()
            workplace.publish()
    return read_manifest(out / "train"), read_manifest(out / "validation")
