"""Documents from pieces of files: plain text, JSON lines, Parquet; archives and token files are in archives.py.

A record belongs to the piece of a file in which its first byte lies. So the pieces of any cut give every record once.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_tools.problems import LeftOut
from data_tools.storage import (
    FORMATS,
    READ_ERRORS,
    SourceFile,
    compression_of,
    decompress,
    find_files,
    format_of,
    open_raw,
    suffixes,
)
from infini_train.config.errors import ConfigError
from infini_train.data.cache import refusals

_PARQUET_ROWS = 256  # read at once
_NOT_TEXT = (".zip", ".7z", ".rar", ".idx", ".npy", ".gz", ".zst", ".xz", ".bz2")


class Document(NamedTuple):
    """A text with its name (`id`, within `source`) and what its source said about it.

    `tokens` are the ids of a document that is stored as ids; its text is empty then. `summary` makes it one of a pair.
    """

    id: str
    text: str
    source: str
    metadata: Mapping[str, Any]
    tokens: np.ndarray | None = None
    summary: str | None = None


class Piece(NamedTuple):
    """A part of a file: its bytes from `start` to before `stop`, as they are stored (stop 0: to its end)."""

    path: str
    id: str
    source: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How to read. `id_field` None: the field "id" where there is one, else file and place."""

    text_field: str = "text"
    id_field: str | None = None
    keep_fields: tuple[str, ...] = ("title",)  # fields that go into the dataset's metadata
    format: str | None = None  # of all files; None: what their names tell
    max_record_bytes: int = 1_000_000_000  # a larger one is a bad record
    summary_field: str | None = None  # of a summary of the text


def documents(
    sources: Iterable[str], options: ReadOptions | None = None, left_out: LeftOut | None = None
) -> Iterator[Document]:
    """The documents of the sources, in order; empty texts are left out and counted in `left_out`.

    Raises:
        ConfigError: no such path, nothing to read, broken data; the message names file and record.
    """
    sources, found = [str(source) for source in sources], False
    reader = Reader(options or ReadOptions(), left_out or LeftOut())
    for file in find_files(sources):
        for document in reader.documents(whole(file)):
            found = True
            yield document
    if not found:
        raise ConfigError(f"{', '.join(sources)}: no documents found; a folder is searched for {suffixes()}")


def texts(sources: Iterable[str], options: ReadOptions | None = None, left_out: LeftOut | None = None) -> Iterator[str]:
    """The texts of `documents`.

    Raises:
        ConfigError: a document is stored as token ids.
    """
    for document in documents(sources, options, left_out):
        if document.tokens is not None:
            raise ConfigError(f"{document.id}: holds token ids, not text; give the text that they were made of")
        yield document.text


def whole(file: SourceFile) -> Piece:
    """All of a file."""
    return Piece(file.path, file.id, file.source, 0, 0)


@dataclass
class Reader:
    """Reads pieces.

    Attributes:
        options: how.
        left_out: counts what can't be read, or stops at it.
        advance: is told of the stored bytes that were read, for a progress bar.
    """

    options: ReadOptions
    left_out: LeftOut
    advance: Callable[[int], None] = field(default=lambda n_bytes: None)

    def documents(self, piece: Piece) -> Iterator[Document]:
        """The documents of a piece, in order, without the empty ones.

        Raises:
            ConfigError: an unknown format, or a bad record (a BadRecordError).
        """
        for document in self._records(piece):
            if document.text or document.tokens is not None:
                yield document
            else:
                self.left_out.documents["empty documents"] += 1

    def _records(self, piece: Piece) -> Iterator[Document]:
        from data_tools.archives import megatron_documents, tar_documents  # they use this module

        kind = self.options.format or format_of(piece.path) or ("jsonl" if piece.path == "-" else "text")
        if kind == "text" and format_of(piece.path) is None and piece.path.endswith(_NOT_TEXT):
            raise ConfigError(f"{piece.path}: can't read this format; name it with --format {'|'.join(FORMATS)}")
        read: Callable[[Piece], Iterator[Document]] = {
            "text": self._text,
            "jsonl": self._json_lines,
            "parquet": self._parquet,
            "tar": lambda piece: tar_documents(self, piece),
            "megatron": lambda piece: megatron_documents(self, piece),
        }[kind]
        try:
            yield from read(piece)
        except (*READ_ERRORS, *refusals()) as error:  # type: ignore[misc]
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            of_network: tuple[type[Exception], ...] = (ConnectionError, TimeoutError, FileNotFoundError, *refusals())
            if isinstance(error, of_network) or getattr(error, "errno", None) is not None:
                # The disk or the network, not the data: to leave out the rest would lose documents that are there.
                raise ConfigError(f"{piece.path}: can't be read on: {reason}; give the same command again") from error
            self.left_out.bad(piece.path, f"can't be read on: {reason}", "mend or remove it")

    def _text(self, piece: Piece) -> Iterator[Document]:
        with open_raw(piece.path) as raw:
            data = decompress(raw, piece.path).read(self.options.max_record_bytes + 1)
        self.advance(piece.stop or len(data))
        if len(data) > self.options.max_record_bytes:
            self.too_long(piece.path)
        elif (text := self.decode(data, piece.path)) is not None:
            yield Document(piece.id, text.removeprefix("\ufeff"), piece.source, {})

    def _json_lines(self, piece: Piece) -> Iterator[Document]:
        with open_raw(piece.path) as raw:
            file = decompress(raw, piece.path)
            offset = _seek_line(file, piece) if piece.start else 0
            meter = Meter(raw, self.advance)
            first, number = offset, 0
            while not piece.stop or compression_of(piece.path) or offset < piece.stop:
                if not (line := file.readline(self.options.max_record_bytes + 1)):
                    break
                begin, number = offset, number + 1
                offset += len(line)
                where = _Line(piece.path, first, number)
                if len(line) > self.options.max_record_bytes:
                    self.too_long(where)
                    while line and not line.endswith(b"\n"):
                        line = file.readline(1 << 20)
                        offset += len(line)
                    continue
                meter.tell()
                if not line.isspace() and (document := self._json_document(line, where, piece, begin)) is not None:
                    yield document

    def _json_document(self, line: bytes, where: "_Line", piece: Piece, offset: int) -> Document | None:
        text = self.decode(line, where)
        if text is None:
            return None
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.left_out.bad(where, f"is not valid JSON: {error}", "mend it")
            return None
        return self.row_document(row, where, f"{piece.id}@{offset}", piece.source)

    def _parquet(self, piece: Piece) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet

        try:
            with open_raw(piece.path) as raw, pyarrow.parquet.ParquetFile(raw) as file:
                names = file.schema_arrow.names
                if not self._has_fields(names, piece.path):
                    return
                wanted = {self.options.text_field, self.options.id_field or "id", *self.options.keep_fields}
                wanted.add(self.options.summary_field or self.options.text_field)
                columns, number = [name for name in names if name in wanted], 0
                for i in range(file.num_row_groups):
                    group = file.metadata.row_group(i)
                    if piece.start <= _begin(group) and (not piece.stop or _begin(group) < piece.stop):
                        for batch in file.iter_batches(_PARQUET_ROWS, [i], columns):
                            yield from self._rows(batch, piece, number)
                            number += batch.num_rows
                            self.advance(group.total_byte_size * batch.num_rows // max(group.num_rows, 1))
                    else:
                        number += group.num_rows
        except pyarrow.ArrowException as error:
            problem = f"is not a readable Parquet file: {str(error).splitlines()[0]}"
            self.left_out.bad(piece.path, problem, "mend or remove it")

    def _rows(self, batch: Any, piece: Piece, number: int) -> Iterator[Document]:
        for i in range(batch.num_rows):
            where = f"{piece.path}: row {number + i + 1}"
            try:
                values = [column[i].as_py() for column in batch.columns]
            except UnicodeDecodeError:  # Parquet files don't always keep what they promise
                self.left_out.bad(where, "is not valid UTF-8", "write it again")
                continue
            row = dict(zip(batch.schema.names, values, strict=True))
            document = self.row_document(row, where, f"{piece.id}:{number + i + 1}", piece.source)
            if document is not None:
                yield document

    def row_document(self, row: Any, where: object, place_id: str, source: str) -> Document | None:
        """The document of a JSON object or table row; None if it is bad."""
        if not isinstance(row, dict):
            self.left_out.bad(where, "is not a JSON object", "each record must be one, with a text field")
            return None
        if not self._has_fields(row, where):
            return None
        text = self._text_of(row, self.options.text_field, "--text-field", where)
        if text is None:
            return None
        summary = None
        if self.options.summary_field is not None:
            summary = self._text_of(row, self.options.summary_field, "--summary-field", where)
            if summary is None:
                return None
        name = row.get(self.options.id_field or "id")
        metadata = {key: _plain(row[key]) for key in self.options.keep_fields if row.get(key) is not None}
        return Document(place_id if name is None else str(name), text, source, metadata, summary=summary)

    def _text_of(self, row: Mapping[str, Any], field: str, option: str, where: object) -> str | None:
        """The text in a field; None if it is bad."""
        text = row[field]
        if not isinstance(text, str):
            self.left_out.bad(where, f"field {field!r} holds {type(text).__name__}, not text", f"choose with {option}")
            return None
        if not text.isascii() and (half := _half_pair(text)) is not None:
            self.left_out.bad(where, f"character {half} of the text is half a surrogate pair", "repair it")
            return None
        return text

    def decode(self, data: bytes, where: object) -> str | None:
        """The text of UTF-8 bytes; None if they are something else. `where` is a file, or a line in it."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            place = where if isinstance(where, _Line) else f"{where}:{line}"
            self.left_out.bad(place, f"byte {error.start} is not valid UTF-8", "re-encode it to UTF-8 (iconv)")
            return None

    def too_long(self, where: object) -> None:
        """A record over the limit."""
        limit_mb = self.options.max_record_bytes / 1e6
        self.left_out.bad(where, f"has more than {limit_mb:,.0f} MB", "cut it, or raise --max-record-mb")

    def _has_fields(self, names: Iterable[str], where: object) -> bool:
        names = list(names)
        for name, option in (
            (self.options.text_field, "--text-field"),
            (self.options.id_field, "--id-field"),
            (self.options.summary_field, "--summary-field"),
        ):
            if name is not None and name not in names:
                problem = f"no field {name!r}; the fields here are: {', '.join(names)}"
                self.left_out.bad(where, problem, f"choose with {option}")
                return False
        return True


class _Line(NamedTuple):
    """A line of a file, as `str` shows it; counted from the line that begins at byte `first`."""

    path: str
    first: int
    number: int

    def __str__(self) -> str:
        before = 0
        with contextlib.suppress(OSError), open_raw(self.path) as file:
            while (missing := self.first - file.tell()) > 0 and (data := file.read(min(missing, 1 << 20))):
                before += data.count(b"\n")
        return f"{self.path}:{before + self.number}"


class Meter:
    """Tells how many stored bytes were read."""

    def __init__(self, raw: BinaryIO, advance: Callable[[int], None]) -> None:
        self._raw, self._advance = raw, advance
        self._is_file = raw.seekable()
        self._last = raw.tell() if self._is_file else 0

    def tell(self) -> None:
        if self._is_file:
            now = self._raw.tell()
            self._advance(max(now - self._last, 0))
            self._last = now


def _seek_line(file: BinaryIO, piece: Piece) -> int:
    """Go to the first line that begins in the piece, or to its end; the offset there."""
    file.seek(piece.start - 1)
    offset = piece.start - 1
    while offset < piece.stop and (part := file.readline(min(1 << 20, piece.stop - offset))):
        offset += len(part)
        if part.endswith(b"\n"):
            break
    return offset


def _begin(group: Any) -> int:
    """Where a row group begins in its Parquet file."""
    column = group.column(0)
    return min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset)


def _half_pair(text: str) -> int | None:
    """The place of the first half of a surrogate pair, as JSON may hold it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def _plain(value: Any) -> Any:
    """The value as JSON can hold it."""
    return value if isinstance(value, (str, int, float, bool)) else str(value)
