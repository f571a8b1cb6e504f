"""Documents from WebDataset tars, and from the token files of Megatron's preprocess_data."""

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Self

import numpy as np

from data_tools.readers import Document, Meter, Piece, Reader
from data_tools.storage import decompress, index_of, open_raw

_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_MEGATRON_HEADER_BYTES = 34


class _Member(NamedTuple):
    key: str
    extension: str
    data: bytes


def tar_documents(reader: Reader, piece: Piece) -> Iterator[Document]:
    """The samples of a WebDataset tar: members of one name up to the first dot, one behind the other.

    The text is the member .txt, or the text field of the member .json; other fields and the id come from .json.
    Nothing is unpacked to the disk.
    """
    for key, group in groupby(_members(reader, piece), key=lambda member: member.key):
        members = {member.extension: member.data for member in group}
        where = f"{piece.path}: {key}"
        row: Any = {}
        if "json" in members:
            text = reader.decode(members["json"], where)
            if text is None:
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                reader.left_out.bad(where, f"the .json member is not valid JSON: {error}", "mend it")
                continue
        if "txt" in members:
            text = reader.decode(members["txt"], where)
            if text is None:
                continue
            row = {**(row if isinstance(row, dict) else {}), reader.options.text_field: text}
        elif "json" not in members:
            reader.left_out.bad(where, f"has no .txt or .json member but {' '.join(sorted(members))}", "mend it")
            continue
        document = reader.row_document(row, where, f"{piece.id}:{key}", piece.source)
        if document is not None:
            yield document


class _StrictHeader(tarfile.TarInfo):
    """tarfile takes a damaged header, or none where one is due, for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the mark of the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _members(reader: Reader, piece: Piece) -> Iterator[_Member]:
    with open_raw(piece.path) as raw:
        meter = Meter(raw, reader.advance)
        try:
            with tarfile.open(fileobj=decompress(raw, piece.path), mode="r|", tarinfo=_StrictHeader) as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                    meter.tell()
                    path = PurePosixPath(member.name)
                    where = f"{piece.path}: {member.name!r}"
                    if path.is_absolute() or ".." in path.parts:
                        reader.left_out.bad(where, "leads out of the archive", "remove it")
                    elif not member.isfile():
                        if not member.isdir():
                            reader.left_out.bad(where, "is a link or device, not a file", "remove it")
                    elif member.size > reader.options.max_record_bytes:
                        reader.too_long(where)
                    elif not path.name.startswith("."):
                        file = tar.extractfile(member)
                        assert file is not None  # it is a file
                        base, _, extension = path.name.partition(".")
                        yield _Member(str(path.with_name(base)), extension, file.read())
        except tarfile.TarError as error:
            reader.left_out.bad(piece.path, f"is not a whole tar file: {error}", "copy it again")


def megatron_documents(reader: Reader, piece: Piece) -> Iterator[Document]:
    """The documents of a .bin and its .idx as token ids; their text is empty."""
    index_path = index_of(piece.path)
    with open_raw(index_path) as file:
        data = file.read()
    try:
        dtype, starts, lengths, bounds = _parse_index(data)
    except ValueError as error:
        reader.left_out.bad(index_path, f"is not a whole index of Megatron's: {error}", "copy it again")
        return
    with open_raw(piece.path) as tokens:
        for number, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            parts = []
            for start, length in zip(starts[first:last], lengths[first:last], strict=True):
                tokens.seek(int(start))
                parts.append(tokens.read(int(length) * dtype.itemsize))
            data = b"".join(parts)
            reader.advance(len(data))
            if len(data) != lengths[first:last].sum() * dtype.itemsize:
                reader.left_out.bad(piece.path, f"ends in document {number}", "copy it again")
                return
            yield Document(f"{piece.id}:{number}", "", piece.source, {}, np.frombuffer(data, dtype))


def _parse_index(data: bytes) -> tuple[np.dtype[Any], np.ndarray, np.ndarray, np.ndarray]:
    """Type of the ids; first byte and number of ids of each sequence; the documents' bounds in sequences.

    Raises:
        ValueError: it is something else, or not whole.
    """
    if data[:9] != _MEGATRON_MAGIC or len(data) < _MEGATRON_HEADER_BYTES:
        raise ValueError("no such magic number")
    code, sequences = data[17], int.from_bytes(data[18:26], "little")
    n_bounds = int.from_bytes(data[26:34], "little")
    if code not in _MEGATRON_TYPES:
        raise ValueError(f"ids of type {code}")
    if len(data) < _MEGATRON_HEADER_BYTES + 12 * sequences + 8 * n_bounds:
        raise ValueError("it ends too early")
    lengths = np.frombuffer(data, "<i4", sequences, _MEGATRON_HEADER_BYTES)
    starts = np.frombuffer(data, "<i8", sequences, _MEGATRON_HEADER_BYTES + 4 * sequences)
    bounds = np.frombuffer(data, "<i8", n_bounds, _MEGATRON_HEADER_BYTES + 12 * sequences)
    if n_bounds and (bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds) < 0).any()):
        raise ValueError("its documents don't fit its sequences")
    return np.dtype(_MEGATRON_TYPES[code]), starts, lengths.astype(np.int64), bounds
