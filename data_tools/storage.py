"""Files of a corpus: local paths, folders, patterns, URLs that fsspec opens, pipes, standard input; also compressed."""

import bz2
import contextlib
import glob
import gzip
import io
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

import fsspec
import zstandard
from braceexpand import braceexpand

from data_tools.pipes import is_pipe, open_pipe, split_command
from infini_train.config.errors import ConfigError
from infini_train.data.cache import transport_errors

STDIN = "-"
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")


class Format(NamedTuple):
    """What can be done with the files of a format."""

    suffixes: tuple[str, ...]  # without that of a compression
    compressible: bool  # as a whole
    searched: bool  # a folder is searched for them
    seekable: bool  # its reader seeks, so that it can't read a stream
    cuttable: bool  # a reader finds the records of any range of such a file


FORMATS = {
    "jsonl": Format((".jsonl", ".ndjson"), compressible=True, searched=True, seekable=False, cuttable=True),
    "parquet": Format((".parquet",), compressible=False, searched=True, seekable=True, cuttable=True),
    "tar": Format((".tar",), compressible=True, searched=True, seekable=False, cuttable=False),
    "text": Format((".txt", ".md", ".py", ".rst"), compressible=True, searched=True, seekable=False, cuttable=False),
    "megatron": Format((".bin",), compressible=False, searched=False, seekable=True, cuttable=False),
}
_VERSION_KEYS = (
    *("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "LastModified", "last_modified", "Last-Modified"),
    *("updated", "mtime", "created"),
)
_MAGIC_BYTES = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ\x00": ".xz", b"BZh": ".bz2"}
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


class SourceFile(NamedTuple):
    """A file to read. `id` names it in the corpus; `source` names the argument that it was found by."""

    path: str
    id: str
    source: str
    bytes: int  # 0: unknown
    version: str  # differs for different contents; empty where the storage has none


def suffixes() -> str:
    """The names that a folder is searched for."""
    endings = " ".join(suffix for each in FORMATS.values() if each.searched for suffix in each.suffixes)
    return f"{endings}, each but .parquet also with {' '.join(COMPRESSIONS)}"


def compression_of(path: str) -> str | None:
    """The suffix of its compression; None: not compressed, or a pipe, whose first bytes show it."""
    if is_pipe(path):
        return None
    return next((suffix for suffix in COMPRESSIONS if path.endswith(suffix)), None)


def format_of(path: str) -> str | None:
    """The format, by the file's name; None: none of those known."""
    if is_pipe(path):
        return "tar"  # as in webdataset
    name = PurePosixPath(path).name
    compression = compression_of(name) or ""
    plain = name.removesuffix(compression)
    for kind, each in FORMATS.items():
        if plain.endswith(each.suffixes) and (not compression or each.compressible):
            return kind
    return "tar" if name.endswith(".tgz") else None


def find_files(sources: Iterable[str]) -> Iterator[SourceFile]:
    """The files of the sources, in order; within a folder or pattern sorted by name.

    Args:
        sources: files, folders, patterns of `glob` and of webdataset (`corpus-{000..999}.tar`), URLs, `pipe:COMMAND`,
            or - for standard input.

    Raises:
        ConfigError: no such file, folder, match or program.
    """
    for source in sources:
        if source == STDIN:
            yield SourceFile(STDIN, "stdin", "stdin", 0, "")
        elif "{" in source and not os.path.exists(source) and (names := _expand_braces(source)) != [source]:
            yield from _find_each(source, names)
        elif is_pipe(source):
            split_command(source)  # raises now what would stop the first task
            yield SourceFile(source, source, source, 0, "")
        elif "://" in source:
            yield from _find_remote(source)
        elif os.path.exists(source):
            yield from _find_local(Path(source))
        elif glob.has_magic(source):
            yield from _find_pattern(source)
        else:
            raise ConfigError(f"{source}: no such file or folder")


def _expand_braces(source: str) -> list[str]:
    """The sources of a name in webdataset's notation, in order; the name alone if there is nothing to expand.

    By the package that webdataset itself uses: to import webdataset would load torch, too.
    """
    try:
        names = list(braceexpand(source))
    except ValueError:  # unbalanced braces
        return [source]
    return names if len(names) > 1 else [source]


def _find_each(pattern: str, names: Iterable[str]) -> Iterator[SourceFile]:
    """The files of an expanded pattern; single files are named from the folder where its braces begin, as in glob."""
    if is_pipe(pattern):
        yield from (file._replace(source=pattern) for file in find_files(names))
        return
    base = pattern[: pattern.index("{")].rpartition("/")[0]
    folder = PurePosixPath(base).name or Path(base).resolve().name or "/"
    for name in names:
        for file in find_files([name]):
            if file.id == file.source:  # a file of its own, not one of a folder or pattern
                inner = name.removeprefix(base).lstrip("/")
                file = file._replace(id=f"{folder}/{inner}", source=folder)
            yield file


def _find_local(path: Path) -> Iterator[SourceFile]:
    name = path.name or path.resolve().name or "/"
    if not path.is_dir():
        yield _local(str(path), name, name)
        return
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            if not file.startswith(".") and _is_searched(file):
                found = Path(folder) / file
                yield _local(str(found), f"{name}/{found.relative_to(path).as_posix()}", name)


def _find_pattern(pattern: str) -> Iterator[SourceFile]:
    fixed = Path(pattern[: pattern.index(next(c for c in pattern if c in "*?["))] + "x").parent
    name = fixed.name or fixed.resolve().name or "/"
    found = [path for path in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(path)]
    if not found:
        raise ConfigError(f"{pattern}: no file matches")
    for path in found:
        yield _local(path, f"{name}/{Path(path).relative_to(fixed).as_posix()}", name)


def _find_remote(url: str) -> Iterator[SourceFile]:
    protocol, _, rest = url.partition("://")
    try:
        system, path = fsspec.core.url_to_fs(url)
        found, base = _list_remote(system, path, rest)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{url}: {str(error).splitlines()[0]}") from error
    except transport_errors() as error:
        raise ConfigError(f"{url}: can't be found: {error}") from error
    name = PurePosixPath(base).name or protocol
    for file, info in found:
        if info["type"] == "file":
            inner = file.removeprefix(base).lstrip("/")
            file_id = inner if len(found) == 1 and file == path else f"{name}/{inner}"
            source = file_id if file_id == inner else name
            if info.get("size") is None:  # a listing of links, over http
                info = system.info(file)
            url, size = system.unstrip_protocol(file), int(info.get("size") or 0)
            version = _version_of(info)
            if file.endswith(".bin"):
                with contextlib.suppress(OSError):
                    version += f" {_version_of(system.info(index_of(file)))}"
            yield SourceFile(url, file_id, source, size, version)


def _list_remote(system: Any, path: str, pattern: str) -> tuple[list[tuple[str, Mapping[str, Any]]], str]:
    """The files with what their file system knows of them, and the folder that they are named from."""
    if glob.has_magic(pattern):
        found = sorted(system.glob(path, detail=True).items())
        return found, path[: path.index(next(c for c in path if c in "*?["))].rpartition("/")[0]
    # Over http, asking whether a file is a folder would read all of it.
    named = system.info(path) if format_of(path) else None
    if (named is None or named["type"] != "file") and system.isdir(path):
        inside = sorted(system.find(path, detail=True).items())
        return [(name, info) for name, info in inside if _is_searched(name)], path.rstrip("/")
    return [(path, named or system.info(path))], path.rpartition("/")[0]


def _version_of(info: Mapping[str, Any]) -> str:
    """The version of a file, as its fsspec file system gives it; each has its own key for it."""
    return " ".join(str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None)


def index_of(path: str) -> str:
    """The index beside one of Megatron's .bin files."""
    return path.removesuffix(".bin") + ".idx"


def _is_searched(name: str) -> bool:
    kind = format_of(name)
    return kind is not None and FORMATS[kind].searched and not PurePosixPath(name).name.startswith(".")


def _local(path: str, file_id: str, source: str) -> SourceFile:
    try:
        info = os.stat(path)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    if is_pipe(path) or path == STDIN:  # a file of this name, found in the working folder: it must not be run
        path = f"./{path}"
    if not stat.S_ISREG(info.st_mode):  # a named pipe: its size is known when it has been read
        return SourceFile(path, file_id, source, 0, "")
    version = str(info.st_mtime_ns)
    if path.endswith(".bin"):
        with contextlib.suppress(OSError):
            index = os.stat(index_of(path))
            version += f" {index.st_size} {index.st_mtime_ns}"
    return SourceFile(path, file_id, source, info.st_size, version)


def open_raw(path: str) -> BinaryIO:
    """The bytes of a file as they are stored.

    Raises:
        ConfigError: a pipe's command can't be run.
        OSError: it can't be opened.
    """
    if path == STDIN:
        return sys.stdin.buffer
    if is_pipe(path):
        return open_pipe(path)
    if "://" in path:
        system, inner = fsspec.core.url_to_fs(path)
        # Lines of limited length are read, which fsspec's own files don't offer.
        return io.BufferedReader(system.open(inner, "rb"), 1 << 20)
    return open(path, "rb", buffering=1 << 20)  # noqa: SIM115  the caller closes it


def decompress(raw: BinaryIO, path: str) -> BinaryIO:
    """What a file holds, given its stored bytes and its name; reading it may raise any of READ_ERRORS."""
    reader: Any
    if is_pipe(path):
        first = cast(io.BufferedReader, raw).peek(max(map(len, _MAGIC_BYTES)))
        suffix = next((suffix for magic, suffix in _MAGIC_BYTES.items() if first.startswith(magic)), None)
    else:
        suffix = ".gz" if path.endswith(".tgz") else compression_of(path)
    match suffix:
        case ".gz":
            reader = gzip.GzipFile(fileobj=raw, mode="rb")
        case ".xz":
            reader = lzma.LZMAFile(raw)  # noqa: SIM115  the caller closes what it reads from
        case ".bz2":
            reader = bz2.BZ2File(raw)
        case ".zst":
            reader = io.BufferedReader(_ZstdStream(raw), 1 << 20)
        case _:
            reader = raw
    return cast(BinaryIO, reader)


class _ZstdStream(io.RawIOBase):
    """The frames of a zstd file. The library's own stream reads a truncated file as if it were whole."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(1 << 17)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the file ends within a compressed frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._output, self._input = self._frame.decompress(self._input), b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size
