"""What a dataset holds, as text for people."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from data_tools.problems import SettingError
from infini_train.command_errors import escape
from infini_train.config.errors import ConfigError
from infini_train.data.manifest import TokenizerEntry
from infini_train.data.shard_file import strict_json
from infini_train.data.shards import CorruptDocumentError, Dataset
from infini_train.data.tokenizer import tokenizer_of

_SHOWN_TOKENS = 200
_QUANTILES = {"shortest": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}


def summarise(folder: Path | str) -> str:
    """Counts, lengths and sources of a dataset.

    Raises:
        ConfigError: as `Dataset.open`.
    """
    dataset = Dataset.open(folder)
    manifest, lengths = dataset.manifest, dataset.lengths_tokens
    shard_bytes = sum(shard.bytes for shard in manifest.shards)
    quantiles = np.quantile(lengths, list(_QUANTILES.values()), method="nearest")
    lines = [
        f"documents     {manifest.documents:,}",
        f"tokens        {manifest.tokens:,} (without bos and eos)",
        f"text          {manifest.bytes:,} bytes, {manifest.bytes / max(manifest.tokens, 1):.2f} bytes a token",
        f"shards        {len(manifest.shards)}, {shard_bytes:,} bytes, {np.dtype(manifest.dtype).name}",
        f"tokenizer     {describe(manifest.tokenizer)}, vocabulary {manifest.vocab_size:,}",
        f"hash          {dataset.identity}",
        "tokens a document",
        *(f"  {name:<11} {int(n):,}" for name, n in zip(_QUANTILES, quantiles, strict=True)),
        f"  {'mean':<11} {lengths.mean():,.1f}",
        "sources",
    ]
    for source in sorted(manifest.sources, key=lambda s: -s.tokens):
        share = source.tokens / max(manifest.tokens, 1)
        lines.append(f"  {escape(source.name)}: {source.documents:,} documents, {source.tokens:,} tokens ({share:.1%})")
    return "\n".join(lines)


def describe(tokenizer: TokenizerEntry) -> str:
    """Kind and short hash."""
    return f"{tokenizer.kind} {tokenizer.sha256[:12]}"


def show_document(folder: Path | str, document: int, shard: int | None = None) -> str:
    """The metadata and the beginning of the text of a document, numbered in the dataset or in one of its shards.

    Raises:
        SettingError: no such document or shard.
        ConfigError: as `Dataset.open`; the document's data is damaged.
    """
    dataset = Dataset.open(folder)
    number, place, first = len(dataset), str(folder), 0
    if shard is not None:
        shards = dataset.manifest.shards
        if not 0 <= shard < len(shards):
            template = "{shard}: {given} is not there; {folder} holds shards 0 to {last}"
            raise SettingError(template, given=shard, folder=folder, last=len(shards) - 1)
        number, place = shards[shard].documents, shards[shard].file
        first = sum(before.documents for before in shards[:shard])
    if not 0 <= document < number:
        template = "{document}: {given} is not there; {place} holds documents 0 to {last}"
        raise SettingError(template, given=document, place=place, last=number - 1)
    document += first
    n_tokens = int(dataset.lengths_tokens[document])
    try:
        metadata = dataset.metadata(document)
        text = tokenizer_of(folder).decode(dataset.read(document, 0, min(n_tokens, _SHOWN_TOKENS)))
    except CorruptDocumentError as error:
        raise ConfigError(f"{error}; copy the dataset again, or encode it again") from error
    more = f"\n... ({n_tokens - _SHOWN_TOKENS:,} more tokens)" if n_tokens > _SHOWN_TOKENS else ""
    return f"{json.dumps(strict_json(metadata), ensure_ascii=False, indent=1)}\n\n{text}{more}"


def to_json(folder: Path | str) -> str:
    """The manifest for programs."""
    return json.dumps(dataclasses.asdict(Dataset.open(folder).manifest), indent=1, ensure_ascii=False)
