"""Documents from ranges of files: plain text, JSON lines; parquet.py, tars.py and megatron.py read the others.

A record belongs to the range of a file in which its first byte lies. So any division of a file into ranges gives every
record once.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from data_tools.codecs import MAX_SKIP_BYTES, READ_ERRORS, decompress, read_limited, read_line, skip_line
from data_tools.documents import Document, FileRange, Line, Meter, ReadOptions, Records, parse_json
from data_tools.formats import FORMATS, compression_of, format_inside, format_of, is_other_format, suffixes
from data_tools.megatron import megatron_documents
from data_tools.parquet import parquet_documents
from data_tools.pipes import is_pipe
from data_tools.problems import LeftOut, SettingError
from data_tools.progress import print_note
from data_tools.sources import find_files
from data_tools.storage import STDIN, SourceFile, UncheckedError, is_stream, open_raw, require_unchanged
from data_tools.tars import tar_documents
from infini_train.config.errors import ConfigError
from infini_train.data.cache import refusals

_SHOWN = {"jsonl": "JSON lines", "tar": "a tar"}


def documents(
    sources: Iterable[str],
    options: ReadOptions | None = None,
    left_out: LeftOut | None = None,
    advance: Callable[[int], None] = lambda n_bytes: None,
) -> Iterator[Document]:
    """The documents of the sources, in order; empty texts are left out and counted in `left_out`.

    Args:
        sources: as in `find_files`.
        options: how to read.
        left_out: counts what can't be read, or stops at it.
        advance: is called with the stored bytes that were read.

    Raises:
        ConfigError: no such path, nothing to read, damaged data; the message names file and record.
    """
    sources, found = [str(source) for source in sources], False
    reader = Reader(options or ReadOptions(), left_out or LeftOut(), advance)
    for file in find_files(sources, print_note):
        for document in reader.documents(whole(file)):
            found = True
            yield document
    if not found:
        raise ConfigError(f"{', '.join(sources)}: no documents found; a folder is searched for {suffixes()}")


def texts(
    sources: Iterable[str],
    options: ReadOptions | None = None,
    left_out: LeftOut | None = None,
    advance: Callable[[int], None] = lambda n_bytes: None,
) -> Iterator[str]:
    """The texts of `documents`.

    Raises:
        ConfigError: a document is stored as token ids.
    """
    for document in documents(sources, options, left_out, advance):
        if document.tokens is not None:
            raise ConfigError(f"{document.id}: holds token ids, not text; give the text that they were made of")
        yield document.text


def whole(file: SourceFile) -> FileRange:
    """All of a file."""
    return FileRange(file.path, file.id, file.source, 0, 0, file.bytes, file.version)


class Reader(Records):
    """Reads ranges of files of every format."""

    def documents(self, part: FileRange) -> Iterator[Document]:
        """The documents of a range, in order, without the empty ones.

        Raises:
            ConfigError: an unknown format, a bad record (a BadRecordError), or the file is no longer the one that was
                found, so that its ranges would be of different contents.
        """
        try:
            for document in self._records(part):
                if document.text or document.tokens is not None:
                    yield document
                else:
                    self.left_out.documents["empty documents"] += 1
        except ConfigError:
            with contextlib.suppress(UncheckedError):
                require_unchanged(part.path, part.bytes, part.version)  # the reason for what looks like a bad record
            raise
        require_unchanged(part.path, part.bytes, part.version)

    def _records(self, part: FileRange) -> Iterator[Document]:
        kind = self.options.format or format_of(part.path) or ("jsonl" if part.path == STDIN else "text")
        if self.options.format is None and is_other_format(part.path):
            template = "{path}: can't read this format; name it with {format} {choices}"
            raise SettingError(template, path=part.path, choices="|".join(FORMATS))
        if FORMATS[kind].seekable and (is_pipe(part.path) or is_stream(part.path)):
            raise ConfigError(f"{part.path}: {kind} can't be read from a stream; give files")
        read: Callable[[FileRange], Iterator[Document]] = {
            "text": self._text,
            "jsonl": self._json_lines,
            "parquet": lambda part: parquet_documents(self, part),
            "tar": lambda part: tar_documents(self, part),
            "megatron": lambda part: megatron_documents(self, part),
        }[kind]
        try:
            yield from read(part)
        except (*READ_ERRORS, *refusals()) as error:  # type: ignore[misc]
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            of_network: tuple[type[Exception], ...] = (ConnectionError, TimeoutError, FileNotFoundError, *refusals())
            if isinstance(error, of_network) or getattr(error, "errno", None) is not None:
                # The disk or the network, not the data: to leave out the rest would lose documents that are there.
                raise ConfigError(f"{part.path}: can't be read on: {reason}; give the same command again") from error
            self.left_out.bad(part.path, f"can't be read on: {reason}", "fix or remove it")

    def _text(self, part: FileRange) -> Iterator[Document]:
        with open_raw(part.path) as raw:
            data = read_limited(decompress(raw, part.path), self.options.max_record_bytes)
        self.advance(part.stop or len(data))
        if len(data) > self.options.max_record_bytes:
            self.too_long(part.path)
            return
        text = self.decode(data, part.path)
        if text is None:
            return
        if self.options.format is None and (inside := format_inside(text, self.options.text_field)):
            advice = f"name its format ({{format}} {inside}), or say that it is one text ({{format}} text)"
            self.left_out.bad(part.path, f"holds {_SHOWN[inside]}, which its name does not say", advice)
            return
        yield Document(part.id, text, part.source, {})

    def _json_lines(self, part: FileRange) -> Iterator[Document]:
        with open_raw(part.path) as raw:
            file = decompress(raw, part.path)
            offset = _seek_line(file, part) if part.start else 0
            meter = Meter(raw, self.advance)
            first, number = offset, 0
            while not part.stop or compression_of(part.path) or offset < part.stop:
                if not (line := read_line(file, self.options.max_record_bytes)):
                    break
                begin, number = offset, number + 1
                offset += len(line)
                where = Line(part.path, first, number)
                if len(line) > self.options.max_record_bytes:
                    self.too_long(where)
                    skipped = 0 if line.endswith(b"\n") else skip_line(file)
                    if skipped is None:
                        problem = f"goes on for {MAX_SKIP_BYTES / 1e6:,.0f} MB more; the rest of the file is left out"
                        self.left_out.bad(where, problem, "fix or remove it")
                        return
                    offset += skipped
                    continue
                meter.update(len(line))
                if not line.isspace() and (document := self._json_document(line, where, part, begin)) is not None:
                    yield document

    def _json_document(self, line: bytes | bytearray, where: Line, part: FileRange, offset: int) -> Document | None:
        text = self.decode(line, where)
        if isinstance(line, bytearray):  # a long one, whose memory is better used for its tokens
            line.clear()
        if not text or text.isspace():  # bad, or blank but for a byte order mark
            return None
        try:
            row = parse_json(text)
        except ValueError as error:
            whole = part.path.lower().endswith(".json") and where.number == 1
            advice = "a file of one JSON array becomes lines with: jq -c '.[]'" if whole else "fix it"
            self.left_out.bad(where, f"is not valid JSON: {error}", advice)
            return None
        return self.row_document(row, where, f"{part.id}@{offset}", part.source)


def _seek_line(file: BinaryIO, part: FileRange) -> int:
    """Go to the first line that begins in the range, or to its end; the offset there."""
    file.seek(part.start - 1)
    offset = part.start - 1
    while offset < part.stop and (line := file.readline(min(1 << 20, part.stop - offset))):
        offset += len(line)
        if line.endswith(b"\n"):
            break
    return offset
