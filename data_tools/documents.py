"""What readers have in common: documents, the byte ranges they come from, and how records become documents."""

import codecs
import contextlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_tools.problems import LeftOut, SettingError
from data_tools.storage import open_raw
from infini_train.data.manifest import LOSS_START
from infini_train.data.shard_file import strict_json

_NAMES, _NAME_CHARS = 20, 60  # of the fields that an error shows
_DEPTH = 500  # of lists and objects within each other

_MARKS = {  # of the start of a file; the longer ones first
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class Document(NamedTuple):
    """A text with its name (`id`, within `source`) and the metadata that its source gives.

    `tokens` are the ids (1-D) of a document that is stored as ids; its text is then empty. `summary` makes it one of a
    pair.
    """

    id: str
    text: str
    source: str
    metadata: Mapping[str, Any]
    tokens: np.ndarray | None = None
    summary: str | None = None


class FileRange(NamedTuple):
    """Bytes [start, stop) of a file as it is stored; stop 0: to its end. See `SourceFile` for the others."""

    path: str
    id: str
    source: str
    start: int
    stop: int
    bytes: int = 0  # 0: unknown
    version: str = ""  # empty: unknown


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How to read. `id_field` None: the field "id" where there is one, else file and place."""

    text_field: str = "text"
    id_field: str | None = None
    keep_fields: tuple[str, ...] = ("title",)  # fields that go into the dataset's metadata
    format: str | None = None  # of all files; None: by their names
    max_record_bytes: int = 1_000_000_000  # a larger one is a bad record
    summary_field: str | None = None  # of a summary of the text

    def __post_init__(self) -> None:
        if LOSS_START in self.keep_fields:
            template = (
                "{keep_fields}: {given} is where encode notes the beginning of a summary; rename it in your files"
            )
            raise SettingError(template, given=LOSS_START)


class Line(NamedTuple):
    """A line of a file, as `str` shows it; counted from the line that begins at byte `first`."""

    path: str
    first: int
    number: int

    def __str__(self) -> str:
        before = 0
        if self.first:
            with contextlib.suppress(OSError), open_raw(self.path) as file:
                while (missing := self.first - file.tell()) > 0 and (data := file.read(min(missing, 1 << 20))):
                    before += data.count(b"\n")
        return f"{self.path}:{before + self.number}"


class Meter:
    """Reports stored bytes as they are read; of a stream that has no position, the bytes that came out of it."""

    def __init__(self, raw: BinaryIO, advance: Callable[[int], None]) -> None:
        self._raw, self._advance = raw, advance
        self._has_position = raw.seekable()
        self._last = raw.tell() if self._has_position else 0

    def update(self, n_bytes: int) -> None:
        """Report what was read since the last call; `n_bytes` came out of the file since then."""
        if self._has_position:
            now = self._raw.tell()
            n_bytes, self._last = max(now - self._last, 0), now
        self._advance(n_bytes)


@dataclass
class Records:
    """Turns records (JSON objects, table rows, bytes) into documents, and counts those that are bad.

    Attributes:
        options: how to read.
        left_out: counts what can't be read, or stops at it.
        advance: is called with the stored bytes that were read, for a progress bar.
    """

    options: ReadOptions
    left_out: LeftOut
    advance: Callable[[int], None] = field(default=lambda n_bytes: None)

    def row_document(self, row: Any, where: object, place_id: str, source: str) -> Document | None:
        """The document of a JSON object or table row; None if it is bad."""
        if not isinstance(row, dict):
            self.left_out.bad(where, "is not a JSON object", "each record must be one, with a text field")
            return None
        if not self.has_fields(row, where):
            return None
        text = self._text_of(row, "text_field", where)
        if text is None:
            return None
        summary = None
        if self.options.summary_field is not None:
            summary = self._text_of(row, "summary_field", where)
            if summary is None:
                return None
        return Document(self.name_of(row, place_id), text, source, self.metadata_of(row), summary=summary)

    def name_of(self, row: Mapping[str, Any], place_id: str) -> str:
        """The record's id, or the name of its place."""
        name = row.get(self.options.id_field or "id")
        return place_id if name is None else str(name)

    def metadata_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The fields to keep, as JSON can hold them."""
        return {key: _plain(row[key]) for key in self.options.keep_fields if row.get(key) is not None}

    def has_fields(self, names: Collection[str], where: object) -> bool:
        """Whether all fields are there that the options name."""
        for setting in ("text_field", "id_field", "summary_field"):
            name = getattr(self.options, setting)
            if name is not None and name not in names:
                problem = f"no field {name!r}; the fields here are: {_shown_names(names)}"
                self.left_out.bad(where, problem, f"choose with {{{setting}}}")
                return False
        return True

    def decode(self, data: bytes | bytearray, where: object) -> str | None:
        """The text of UTF-8 bytes, without a byte order mark; None if they are something else.

        Args:
            data: the bytes.
            where: a file, or a line in it.
        """
        is_odd = b"\0" in data[:64] or data[:1] >= b"\xfe"  # each line is asked
        if is_odd and (encoding := _other_encoding(data)) is not None:
            self.left_out.bad(where, f"is {encoding}, not UTF-8", f"re-encode it (iconv -f {encoding} -t UTF-8)")
            return None
        try:
            return data.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            place = where if isinstance(where, Line) else f"{where}:{line}"
            self.left_out.bad(place, f"byte {error.start} is not valid UTF-8", "re-encode it to UTF-8 (iconv)")
            return None

    def too_long(self, where: object) -> None:
        """Count a record over the limit."""
        limit_mb = self.options.max_record_bytes / 1e6
        self.left_out.bad(where, f"has more than {limit_mb:,.0f} MB", "cut it, or raise {max_record_bytes}")

    def _text_of(self, row: Mapping[str, Any], setting: str, where: object) -> str | None:
        """The text in the field that a setting names; None if it is bad."""
        field = getattr(self.options, setting)
        text = row[field]
        if not isinstance(text, str):
            problem = f"field {field!r} holds {type(text).__name__}, not text"
            self.left_out.bad(where, problem, f"choose with {{{setting}}}")
            return None
        if not text.isascii() and (half := _half_pair(text)) is not None:
            self.left_out.bad(where, f"character {half} of the text is half a surrogate pair", "repair it")
            return None
        return text


def _other_encoding(data: bytes | bytearray) -> str | None:
    """UTF-16 or UTF-32, by a byte order mark, or by the zeros in Latin text."""
    head = bytes(data[:64])
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    if len(head) >= 4 and not any(head[1::2]) and all(head[::2]):
        return "UTF-16LE"
    if len(head) >= 4 and not any(head[::2]) and all(head[1::2]):
        return "UTF-16BE"
    return None


def _half_pair(text: str) -> int | None:
    """The place of the first half of a surrogate pair, as JSON may hold it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def _plain(value: Any) -> Any:
    """The value as JSON can hold it."""
    return strict_json(value) if isinstance(value, (str, int, float, bool)) else str(value)


def _shown_names(names: Collection[str]) -> str:
    """The first names of fields, without the rest of long ones."""
    first = [name if len(name) <= _NAME_CHARS else f"{name[:_NAME_CHARS]}..." for name in islice(names, _NAMES)]
    return ", ".join(first) + (f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else "")


def parse_json(text: str) -> Any:
    """The value of a JSON text. NaN and Infinity, which Python writes, are read as well.

    Raises:
        ValueError: it is not valid, or nested too deeply; how deeply does not depend on who calls.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEPTH} deep") from None
    if text.count("[") + text.count("{") > _DEPTH and _is_deeper(value, _DEPTH):
        raise ValueError(f"it is nested more than {_DEPTH} deep")
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        inside = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list)))
        level = [each for some in inside for each in some if isinstance(each, (dict, list))]
        if not level:
            return False
    return True
