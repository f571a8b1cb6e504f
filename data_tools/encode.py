"""Encode a corpus into a dataset of shards, or two: for training and for validation."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.documents import Document
from data_tools.formats import suffixes
from data_tools.job import JobOptions, all_older
from data_tools.join import RECORD_FILE, Joiner, join_split
from data_tools.plan import Plan, check_sources, make_plan
from data_tools.problems import LeftOut, SettingError
from data_tools.progress import elapsed_time
from data_tools.readers import Reader
from data_tools.sources import find_files
from data_tools.tasks import finished_tasks, run_tasks
from data_tools.workplace import Workplace, check_pair_target
from infini_train import __version__
from infini_train.config.errors import ConfigError
from infini_train.data.manifest import LOSS_START, MANIFEST_FILE, Manifest, read_manifest, token_dtype
from infini_train.data.pairs import PairForm
from infini_train.data.shard_file import ShardRun
from infini_train.data.tokenizer import Tokenizer, load_tokenizer
from infini_train.data.writer import check_target, explain_disk_errors

_BATCH_CHARS = 1_000_000  # encoded at once
_DOCUMENT_CHARS = 100  # added for each document: tiny ones take memory too


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(JobOptions):
    """How to encode; the results depend on `holdout`, `max_shard_bytes`, `read`, `form` and `max_tokens` alone."""

    holdout: float = 0.0  # share of the documents that becomes the validation set
    max_shard_bytes: int = 1 << 29
    form: PairForm = PairForm()  # of pairs, with `read.summary_field`
    max_tokens: int | None = None  # of a pair; a longer book is cut at its end

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.holdout < 1:
            template = "{holdout}: {given} is not a share; give a number from 0 up to (not including) 1"
            raise SettingError(template, given=self.holdout)
        if self.max_shard_bytes < 1:
            raise SettingError("{max_shard_bytes}: must be positive")
        if self.read.summary_field is None and (self.form != PairForm() or self.max_tokens is not None):
            raise SettingError("{prompt}, {separator} and {max_tokens}: are for pairs; name their {summary_field}")


def is_held_out(document_id: str, share: float) -> bool:
    """Whether a document is for validation: by its id alone, so that it stays there when the corpus grows."""
    return int.from_bytes(hashlib.sha256(document_id.encode("utf-8", "replace")).digest()[:8], "big") < share * 2**64


def encode_corpus(
    sources: Iterable[str], tokenizer: str, out: Path | str, options: EncodeOptions | None = None
) -> tuple[dict[Path, Manifest], LeftOut]:
    """Write the documents of the sources to `out`, or with a holdout to `out`/train and `out`/validation.

    With a holdout and two or more documents both get at least one. The work goes into a hidden folder beside `out`; a
    run that was stopped, or killed at any moment, leaves its finished tasks there, and the same call does the rest.

    Args:
        sources: as in `find_files`.
        tokenizer: as in `load_tokenizer`.
        out: the folder to write.
        options: how.

    Returns:
        The manifest of each dataset written (none if other parts are not finished), and what was left out.

    Raises:
        ConfigError: `out` holds something else, the disk is full, the documents can't be read, or the unfinished work
            is another command's.
    """
    options, out, sources = options or EncodeOptions(), Path(out), [str(source) for source in sources]
    model = load_tokenizer(tokenizer)
    folders = [out / "train", out / "validation"] if options.holdout else [out]
    try:
        left_out = _encode(sources, tokenizer, model, out, options)
    except (ConfigError, FileNotFoundError):
        # The other parts have finished without this one: it has no task, or was restarted after its last one.
        if options.part is None or options.overwrite or not _is_there(folders, sources, model):
            raise
        left_out = LeftOut()
    if left_out is None:
        return {}, LeftOut()
    return {folder: read_manifest(folder) for folder in folders}, left_out


def _encode(sources: list[str], tokenizer: str, model: Tokenizer, out: Path, options: EncodeOptions) -> LeftOut | None:
    """What was left out; None if other parts are not finished."""
    command = {
        "tokenizer": model.sha256,
        "holdout": options.holdout,
        "shard_mb": options.max_shard_bytes / 1e6,
        **json.loads(json.dumps(dataclasses.asdict(options.read))),  # with lists, as it will be read
        **dataclasses.asdict(options.form),
        "max_tokens": options.max_tokens,
        "version of infini-data": __version__,
    }
    workplace = Workplace(out, restart=options.restart, part=options.part)
    (check_pair_target if options.holdout else check_target)(out, options.overwrite)
    with workplace as folder:
        plan = make_plan(folder, sources, command, options.max_shard_bytes, options.read.format)
        work = EncodeWork(folder, tokenizer, options)
        run_tasks(folder, plan, work, workers=options.workers, part=options.part, label="encode")
        if len(finished_tasks(folder)) < len(plan):
            return None
        left_out = options.new_left_out()
        with workplace.last_step() as is_mine, explain_disk_errors(out), elapsed_time("join the shards"):
            if is_mine:
                check_sources(folder)
                joiner = Joiner(folder, len(plan), model, options.max_shard_bytes)
                joiner.add_left_out(left_out)
                _check_documents(joiner, workplace, options, left_out)
                if options.holdout:
                    join_split(joiner, workplace.result, left_out)
                else:
                    joiner.move("data", workplace.result, left_out)
                workplace.publish()
    return left_out


def _is_there(folders: list[Path], sources: list[str], tokenizer: Tokenizer) -> bool:
    """Whether the datasets exist, made from these sources as they are now, with this tokenizer."""
    if not all((folder / MANIFEST_FILE).is_file() for folder in folders):
        return False
    manifests = [read_manifest(folder) for folder in folders]
    made_ns = min((folder / MANIFEST_FILE).stat().st_mtime_ns for folder in folders)
    found = list(find_files(sources))
    same_tokenizer = all(manifest.tokenizer.sha256 == tokenizer.sha256 for manifest in manifests)
    names = {file.source for file in found}
    same_names = {source.name for each in manifests for source in each.sources} == names
    return same_tokenizer and same_names and all_older(found, made_ns)


def _check_documents(joiner: Joiner, workplace: Workplace, options: EncodeOptions, left_out: LeftOut) -> None:
    """Raises unless there are enough documents; what was done is then of no use."""
    documents = sum(joiner.count(name) for name in set_names(options.holdout))
    if documents > bool(options.holdout):
        return
    workplace.discard()
    if documents:
        raise SettingError("{holdout}: needs two documents or more; give more text, or leave it out")
    found = "; ".join(left_out.lines())
    raise ConfigError(f"no documents found{f' ({found})' if found else ''}; a folder is searched for {suffixes()}")


def set_names(holdout: float) -> tuple[str, ...]:
    """The datasets that a task writes shards for."""
    return ("train", "validation") if holdout else ("data",)


class EncodeWork:
    """The work of one task: its documents as shards, their index, and a record of what there is."""

    def __init__(self, folder: Path, tokenizer: str, options: EncodeOptions) -> None:
        self.folder = folder
        self.tokenizer_name = tokenizer
        self.options = options

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded once in each process."""
        return load_tokenizer(self.tokenizer_name)

    @cached_property
    def plan(self) -> Plan:
        """Read once in each process."""
        return Plan(self.folder)

    def __call__(self, task: int, folder: Path, threads: int, advance: Callable[[int], None]) -> None:
        options, left_out = self.options, self.options.new_left_out()
        reader = Reader(options.read, left_out, advance)
        found = chain.from_iterable(reader.documents(part) for part in self.plan.ranges(task))
        with contextlib.ExitStack() as stack:
            runs = {}
            for name in set_names(options.holdout):
                index = stack.enter_context((folder / f"{name}.idx").open("wb"))
                dtype = token_dtype(self.tokenizer.vocab_size)
                runs[name] = ShardRun(folder, name, index, dtype, options.max_shard_bytes)
                stack.callback(runs[name].abandon)
            if options.read.summary_field is None:
                encoded = encode_documents(found, self.tokenizer, left_out, threads)
            else:
                encoded = encode_pairs(found, self.tokenizer, options)
            for document, tokens, n_bytes in encoded:
                name = "validation" if options.holdout and is_held_out(document.id, options.holdout) else "train"
                runs[name if options.holdout else "data"].add(
                    tokens, n_bytes=n_bytes, id=document.id, source=document.source, metadata=document.metadata
                )
            for run in runs.values():
                run.close_shard()
        record = {name: _describe(run) for name, run in runs.items()}
        text = json.dumps({**record, "left_out": left_out.to_json()})
        (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")


def _describe(run: ShardRun) -> dict[str, list[dict[str, Any]]]:
    return {
        "shards": [dataclasses.asdict(shard) for shard in run.shards],
        "sources": [dataclasses.asdict(source) for source in run.sources.values()],
    }


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, left_out: LeftOut, threads: int = 1
) -> Iterator[tuple[Document, np.ndarray, int]]:
    """The documents, in order, with their token ids and the bytes of their text."""
    for batch in _batches(documents):
        if batch[0].tokens is not None:
            yield from _check_tokens(batch[0], tokenizer, left_out)
            continue
        ids = tokenizer.encode_many([document.text for document in batch], threads)
        for document, tokens in zip(batch, ids, strict=True):
            yield document, tokens, _utf8_bytes(document.text)


def encode_pairs(
    documents: Iterable[Document], tokenizer: Tokenizer, options: EncodeOptions
) -> Iterator[tuple[Document, np.ndarray, int]]:
    """The documents with the ids of book and summary together; the metadata say where the summary begins."""
    for document in documents:
        if document.summary is None:
            raise ConfigError(f"{document.id}: has no fields, so no {options.read.summary_field!r}; give JSON lines")
        try:
            tokens, start = options.form.encode(tokenizer, document.text, document.summary, options.max_tokens)
        except ConfigError as error:
            raise ConfigError(f"{document.id}: {error}") from error
        metadata = {**document.metadata, LOSS_START: start}
        yield document._replace(metadata=metadata), tokens, _utf8_bytes(tokenizer.decode(tokens))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents to encode together; one that is stored as tokens stands alone."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        if batch and (document.tokens is not None or size + len(document.text) > _BATCH_CHARS):
            yield batch
            batch, size = [], 0
        batch.append(document)
        size = size + len(document.text) + _DOCUMENT_CHARS if document.tokens is None else _BATCH_CHARS
    if batch:
        yield batch


def _check_tokens(
    document: Document, tokenizer: Tokenizer, left_out: LeftOut
) -> Iterator[tuple[Document, np.ndarray, int]]:
    """The stored ids without the end-of-text id that Megatron appends; decoding them gives the size of the text."""
    tokens = document.tokens
    assert tokens is not None
    if tokens.size and tokens[-1] == tokenizer.eos_id:
        tokens = tokens[:-1]
    if not tokens.size:
        left_out.documents["empty documents"] += 1
    elif int(tokens.min()) < 0 or int(tokens.max()) >= tokenizer.vocab_size:
        wrong = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
        problem = f"holds id {wrong}, outside of the tokenizer's vocabulary of {tokenizer.vocab_size}"
        left_out.bad(document.id, problem, "give the tokenizer of these ids")
    else:
        yield document, tokens, _utf8_bytes(tokenizer.decode(tokens))


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))
