"""Text documents from files: plain text, folder trees, JSON lines (plain, gzip, zstd) and Parquet; streamed."""

import contextlib
import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import pyarrow
import pyarrow.parquet
import zstandard

from infini_train.config import ConfigError

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
TABLE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_UNKNOWN_SUFFIXES = (".gz", ".zst", ".zip", ".xz", ".bz2", ".tar", ".7z")
_PARQUET_ROWS = 256  # read at once


class Document(NamedTuple):
    """A text with its name (`id`, within `source`) and what its source said about it."""

    id: str
    text: str
    source: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How to read. `id_field` None: the field "id" where there is one, else file and line."""

    text_field: str = "text"
    id_field: str | None = None
    keep_fields: tuple[str, ...] = ("title",)  # fields that go into the dataset's metadata
    on_bad_text: Literal["error", "skip"] = "error"


@dataclass
class Skipped:
    """What was left out while reading."""

    empty: int = 0
    bad_text: list[str] = field(default_factory=list)  # the first few places
    bad_texts: int = 0


class BadTextError(ConfigError):
    """Not valid UTF-8."""


def documents(
    sources: Iterable[Path | str], options: ReadOptions | None = None, skipped: Skipped | None = None
) -> Iterator[Document]:
    """The documents of the sources, in order; empty texts are left out and counted in `skipped`.

    Raises:
        ConfigError: no such path, nothing to read, broken data; the message names file and line.
    """
    options, skipped = options or ReadOptions(), skipped if skipped is not None else Skipped()
    paths = [Path(source) for source in sources]
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path}: no such file or folder")
    found = False
    for path in paths:
        name = path.name or path.resolve().name or "/"
        for file, file_id in _files(path, name):
            for document in _file_documents(file, file_id, name, options, skipped):
                if document.text:
                    found = True
                    yield document
                else:
                    skipped.empty += 1
    if not found:
        known = " ".join((*TEXT_SUFFIXES, *TABLE_SUFFIXES))
        raise ConfigError(f"{', '.join(map(str, paths))}: no documents found; a folder is searched for {known}")


def _files(path: Path, name: str) -> Iterator[tuple[Path, str]]:
    """Each file to read with the id of its document; a folder's hidden files and folders are left out."""
    if not path.is_dir():
        yield path, name
        return
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            if not file.startswith(".") and file.endswith((*TEXT_SUFFIXES, *TABLE_SUFFIXES)):
                found = Path(folder) / file
                yield found, f"{name}/{found.relative_to(path).as_posix()}"


def _file_documents(
    path: Path, file_id: str, source: str, options: ReadOptions, skipped: Skipped
) -> Iterator[Document]:
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet(path, file_id, source, options, skipped)
        elif path.name.endswith(TABLE_SUFFIXES):
            yield from _json_lines(path, file_id, source, options, skipped)
        elif path.name.endswith(_UNKNOWN_SUFFIXES):
            raise ConfigError(f"{path}: can't read this format; known: text, {' '.join(TABLE_SUFFIXES)}")
        else:
            with _bad_text(options, skipped):
                text = _decode(path.read_bytes(), str(path)).removeprefix("\ufeff")
                yield Document(file_id, text, source, {})
    except (OSError, EOFError, zstandard.ZstdError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error


@contextlib.contextmanager
def _bad_text(options: ReadOptions, skipped: Skipped) -> Iterator[None]:
    """Raises or counts a text that is not UTF-8."""
    try:
        yield
    except BadTextError as error:
        if options.on_bad_text == "error":
            raise
        skipped.bad_texts += 1
        if len(skipped.bad_text) < 5:
            skipped.bad_text.append(str(error))


def _decode(data: bytes, where: str, line: int | None = None) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = line if line is not None else data.count(b"\n", 0, error.start) + 1
        place = f"{where}:{line}: byte {error.start} is not valid UTF-8"
        raise BadTextError(f"{place}; re-encode it to UTF-8 (iconv), or pass --on-bad-text skip") from error


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(cast(io.RawIOBase, reader), 1 << 20)
    return path.open("rb")


def _json_lines(path: Path, file_id: str, source: str, options: ReadOptions, skipped: Skipped) -> Iterator[Document]:
    with _open(path) as file:
        for number, data in enumerate(file, 1):
            if not data.strip():
                continue
            with _bad_text(options, skipped):
                line = _decode(data, str(path), number)
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ConfigError(f"{path}:{number}: is not valid JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ConfigError(
                        f"{path}:{number}: is not a JSON object; each line must be one, with a text field"
                    )
                document = _row_document(row, f"{path}:{number}", f"{file_id}:{number}", source, options)
                try:
                    document.text.encode("utf-8")
                except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair
                    place = f"{path}:{number}: character {error.start} of the text is half a surrogate pair"
                    raise BadTextError(f"{place}; repair it, or pass --on-bad-text skip") from error
                yield document


def _parquet(path: Path, file_id: str, source: str, options: ReadOptions, skipped: Skipped) -> Iterator[Document]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _require_fields(names, str(path), options)
            wanted = {options.text_field, options.id_field or "id", *options.keep_fields}
            batches = file.iter_batches(batch_size=_PARQUET_ROWS, columns=[n for n in names if n in wanted])
            for number, (batch, index) in enumerate(((b, i) for b in batches for i in range(b.num_rows)), 1):
                with _bad_text(options, skipped):
                    row = _parquet_row(batch, index, f"{path}: row {number}")
                    yield _row_document(row, f"{path}: row {number}", f"{file_id}:{number}", source, options)
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path}: is not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _parquet_row(batch: pyarrow.RecordBatch, index: int, where: str) -> dict[str, Any]:
    try:
        return {name: column[index].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except UnicodeDecodeError as error:  # Parquet files don't always keep what they promise
        raise BadTextError(f"{where}: is not valid UTF-8; write it again, or pass --on-bad-text skip") from error


def _require_fields(names: Iterable[str], where: str, options: ReadOptions) -> None:
    names = list(names)
    for name, option in ((options.text_field, "--text-field"), (options.id_field, "--id-field")):
        if name is not None and name not in names:
            raise ConfigError(
                f"{where}: no field {name!r}; the fields here are: {', '.join(names)}; choose with {option}"
            )


def _row_document(row: Mapping[str, Any], where: str, place_id: str, source: str, options: ReadOptions) -> Document:
    _require_fields(row, where, options)
    text = row[options.text_field]
    if not isinstance(text, str):
        raise ConfigError(f"{where}: field {options.text_field!r} holds {type(text).__name__}, not text")
    name = row.get(options.id_field or "id")
    metadata = {key: _plain(row[key]) for key in options.keep_fields if row.get(key) is not None}
    return Document(str(name) if name is not None else place_id, text, source, metadata)


def _plain(value: Any) -> Any:
    """The value as JSON can hold it."""
    return value if isinstance(value, (str, int, float, bool)) else str(value)
