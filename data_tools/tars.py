"""Documents from WebDataset tars, of text or of token ids."""

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Self, cast

import numpy as np

from data_tools.codecs import MAX_SKIP_BYTES, decompress, read_limited
from data_tools.documents import Document, FileRange, Meter, Records, parse_json
from data_tools.pipes import is_pipe
from data_tools.storage import open_raw
from infini_train.command_errors import first_line
from infini_train.config.errors import ConfigError

_META_MEMBER = re.compile(r"__[^/]*__($|/)")  # webdataset skips these
_READ = ("txt", "json", "npy")  # extensions; the content of others is not needed
_NAMES_KEPT = 100  # of a sample's members that are not read
_MAX_HEADER_BYTES = 1 << 20  # of a long name, or of a member's further properties
_HEADER_TYPES = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class _Member(NamedTuple):
    key: str
    extension: str
    data: bytes | bytearray


_Sample = dict[str, bytes | bytearray]  # data by extension


def tar_documents(records: Records, part: FileRange) -> Iterator[Document]:
    """The samples of a WebDataset tar: consecutive members whose names agree up to the first dot.

    The text is the member .txt, or the text field of the member .json. A sample without text is one of token ids: the
    member .npy (integers, 1-D), or a .json that is a list of integers. Other fields and the id come from .json.
    Nothing is unpacked to the disk, and nothing is unpickled.
    """
    for key, members in _samples(records, part):
        where = f"{part.path}: {key}"
        if "json" not in members:
            row: Any = {}
        elif (text := records.decode(members["json"], where)) is None:
            continue
        else:
            try:
                row = parse_json(text)
            except ValueError as error:
                records.left_out.bad(where, f"the .json member is not valid JSON: {error}", "fix it")
                continue
        document = _sample_document(records, members, row, (where, f"{part.id}:{key}", part.source))
        if document is not None:
            yield document


def _samples(records: Records, part: FileRange) -> Iterator[tuple[str, _Sample]]:
    """Key and members (by their lower-case extensions) of each sample."""
    key: str | None = None
    members: _Sample = {}
    for member in _members(records, part):
        if member.key != key:
            if key is not None and members:
                yield key, members
            key, members = member.key, {}
        if member.extension in members:
            problem = f"two members .{member.extension} follow each other"
            records.left_out.bad(f"{part.path}: {key}", problem, "name each sample differently")
            continue
        if sum(map(len, members.values())) + len(member.data) > records.options.max_record_bytes:
            records.too_long(f"{part.path}: {key}")
            continue
        if member.extension in _READ or len(members) < _NAMES_KEPT:
            members[member.extension] = member.data
    if key is not None and members:
        yield key, members


def _sample_document(records: Records, members: _Sample, row: Any, place: tuple[str, str, str]) -> Document | None:
    """The document of a sample; None if it is bad. `place` is where it lies, its id by place, and its source."""
    where, place_id, source = place
    fields = row if isinstance(row, dict) else {}
    if "txt" in members:
        text = records.decode(members["txt"], where)
        if text is None:
            return None
        return records.row_document({**fields, records.options.text_field: text}, where, place_id, source)
    has_npy = "npy" in members and records.options.text_field not in fields
    if has_npy or (isinstance(row, list) and row and all(type(item) is int for item in row)):
        try:
            tokens = _parse_npy(members["npy"]) if has_npy else np.array(row, np.int64)
        except (ValueError, OverflowError) as error:
            kind = ".npy" if has_npy else ".json"
            records.left_out.bad(where, f"the {kind} member holds no token ids: {error}", "fix it")
            return None
        return Document(records.name_of(fields, place_id), "", source, records.metadata_of(fields), tokens)
    if "json" not in members:
        problem = f"has no .txt, .json or .npy member but {' '.join(sorted(members))}"
        records.left_out.bad(where, problem, "write text as .txt or .json, token ids as .npy or .json")
        return None
    return records.row_document(row, where, place_id, source)


def _parse_npy(data: bytes | bytearray) -> np.ndarray:
    """The integers, 1-D, of a .npy file; nothing is unpickled, and no more memory is taken than `data` has.

    Raises:
        ValueError: it is something else, or not whole.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in _NPY_HEADERS:
        raise ValueError(f"version {version[0]}.{version[1]} of the format")
    shape, _, dtype = _NPY_HEADERS[version](file)
    if dtype.kind not in "iu" or len(shape) != 1:
        raise ValueError(f"an array {shape} of {dtype}, not integers in one dimension")
    if len(data) - file.tell() != shape[0] * dtype.itemsize:
        raise ValueError("its size differs from its header's")
    return np.frombuffer(data, dtype, shape[0], file.tell())


class _StrictHeader(tarfile.TarInfo):
    """Raises where plain tarfile takes a damaged header for the end of the archive, or would hold a huge one."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the true end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        if member.type in _HEADER_TYPES and member.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {member.size:,} bytes, where {_MAX_HEADER_BYTES:,} are read")
        return member

    def _refuse_sparse(self, *_: Any) -> Self:
        raise tarfile.ReadError("it holds a sparse file, which may expand to any size; pack it without --sparse")

    # Maps of holes have no limit, and tarfile holds them in memory before it gives the member.
    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


class _Finite:
    """A file for tarfile, which would go on for ever to skip what a header claims, though the file has ended."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._has_ended = self.may_end = False

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        if not data and self._has_ended and not self.may_end:
            raise tarfile.ReadError("unexpected end of data")
        self._has_ended = not data
        return data


def _is_sample_file(records: Records, member: tarfile.TarInfo, path: PurePosixPath, where: str) -> bool:
    """Whether a member is a file of a sample; what is left out is counted."""
    if path.is_absolute() or ".." in path.parts:
        records.left_out.bad(where, "leads out of the archive", "remove it")
    elif not member.isfile():
        if not member.isdir():
            records.left_out.bad(where, "is a link or device, not a file", "remove it")
    elif member.size > records.options.max_record_bytes:
        records.too_long(where)
    elif _META_MEMBER.match(member.name):
        if path.suffix:  # a file with a format is more than a note about the archive
            records.left_out.documents["members below __...__, which webdataset skips"] += 1
    else:
        return not path.name.startswith(".")
    return False


def _members(records: Records, part: FileRange) -> Iterator[_Member]:
    with open_raw(part.path) as raw:
        meter = Meter(raw, records.advance)
        try:
            file = _Finite(decompress(raw, part.path))
            with tarfile.open(fileobj=cast(Any, file), mode="r|", tarinfo=_StrictHeader) as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                    _check_headers(tar, member)
                    meter.update(member.size)
                    path = PurePosixPath(member.name)
                    where = f"{part.path}: {member.name!r}"
                    if _is_sample_file(records, member, path, where):
                        base, _, extension = path.name.partition(".")
                        extension, data = extension.lower(), bytearray()
                        if extension in _READ:
                            content: Any = tar.extractfile(member)
                            data = read_limited(content, records.options.max_record_bytes)
                        yield _Member(str(path.with_name(base)), extension, data)
                _check_end(tar, file)
        except ConfigError:
            raise
        except (tarfile.TarError, ValueError, RecursionError) as error:  # tarfile checks few of the numbers
            records.left_out.bad(part.path, f"is not a whole tar file: {first_line(error)}", "copy it again")
            return
        if is_pipe(part.path):  # its exit status comes after its last byte
            while raw.read(1 << 20):
                pass


def _check_headers(tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """tarfile takes sizes as they are, and keeps what holds for all members, from any number of headers."""
    if member.size < 0:
        raise tarfile.ReadError(f"{member.name!r} claims {member.size:,} bytes")
    if sum(len(key) + len(value) for key, value in tar.pax_headers.items()) > _MAX_HEADER_BYTES:
        raise tarfile.ReadError(f"global headers of more than {_MAX_HEADER_BYTES:,} bytes")


def _check_end(tar: tarfile.TarFile, file: _Finite) -> None:
    """Raises if more than zeros follows the archive's end: another archive, say, whose samples nobody would read."""
    file.may_end = True
    rest, seen = cast(Any, tar.fileobj), 0
    while seen < MAX_SKIP_BYTES and (piece := rest.read(tarfile.RECORDSIZE)):
        if piece.count(0) != len(piece):
            raise tarfile.ReadError("more follows its end, as in archives put together by cat; give each by itself")
        seen += len(piece)
