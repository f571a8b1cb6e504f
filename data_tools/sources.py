"""Finds the files of a corpus: local paths, folders, patterns, URLs that fsspec lists, pipes, standard input."""

import contextlib
import glob
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from braceexpand import braceexpand
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

from data_tools.formats import format_of, has_index, index_of, is_searched
from data_tools.pipes import is_pipe, split_command
from data_tools.storage import STDIN, SourceFile, remote_version_of, version_of
from infini_train.config.errors import ConfigError
from infini_train.data.cache import transport_errors
from infini_train.data.shard_file import as_utf8
from infini_train.redaction import redact
from infini_train.regular_files import KINDS

_KINDS_SHOWN = 6  # of files that are left out
_OWN_FILES = ("report.json",)  # of infini-data clean, beside the text
_BROKEN = "broken link"
_OF_THE_DISK = "lost+found"  # in the topmost folder of a disk; only root may read it

Note = Callable[[str], None]


def find_files(sources: Iterable[str], note: Note = lambda line: None) -> Iterator[SourceFile]:
    """The files of the sources, in order; within a folder or pattern sorted by name.

    Names that are not UTF-8 are shown with backslashes in `id` and `source`, since these are written into datasets.

    Args:
        sources: files, folders, patterns of `glob` and of webdataset (`corpus-{000..999}.tar`), URLs, `pipe:COMMAND`,
            or - for standard input.
        note: is called with a line about the files that a folder or pattern leaves out.

    Raises:
        ConfigError: no such file, folder, match or program; a folder can't be read.
    """
    for file in _find(sources, note):
        yield file._replace(id=as_utf8(file.id), source=as_utf8(file.source))


def _find(sources: Iterable[str], note: Note) -> Iterator[SourceFile]:
    for source in sources:
        if source == STDIN:
            yield SourceFile(STDIN, "stdin", "stdin", 0, "")
        elif "{" in source and not os.path.exists(source) and (names := _expand_braces(source)) != [source]:
            yield from _find_each(source, names, note)
        elif is_pipe(source):
            split_command(source)  # raises now what would stop the first task
            yield SourceFile(source, redact(source), redact(source), 0, "")
        elif "://" in source:
            yield from _find_remote(source, note)
        elif os.path.exists(source):
            yield from _find_local(Path(source), note)
        elif glob.has_magic(source):
            yield from _find_pattern(source, note)
        else:
            raise ConfigError(f"{source}: {_why_missing(source)}")


def _why_missing(path: str) -> str:
    try:
        os.stat(path)
    except FileNotFoundError:
        return "no such file or folder"
    except OSError as error:  # no permission, a name that is too long, a loop of links
        return f"can't be read: {error.strerror}"
    return "appeared just now; begin again"


def _expand_braces(source: str) -> list[str]:
    """The sources of a name in webdataset's notation, in order; the name alone if there is nothing to expand.

    By the package that webdataset itself uses: to import webdataset would load torch, too.
    """
    try:
        names = list(braceexpand(source))
    except ValueError:  # unbalanced braces
        return [source]
    return names if len(names) > 1 else [source]


def _find_each(pattern: str, names: Iterable[str], note: Note) -> Iterator[SourceFile]:
    """The files of an expanded pattern; single files are named from the folder where its braces begin, as in glob."""
    if is_pipe(pattern):
        yield from (file._replace(source=redact(pattern)) for file in _find(names, note))
        return
    base = pattern[: pattern.index("{")].rpartition("/")[0]
    folder = PurePosixPath(base).name or Path(base).resolve().name or "/"
    for name in names:
        for file in _find([name], note):
            if file.id == file.source:  # a file of its own, not one of a folder or pattern
                inner = name.removeprefix(base).lstrip("/")
                file = file._replace(id=f"{folder}/{inner}", source=folder)
            yield file


def _find_local(path: Path, note: Note) -> Iterator[SourceFile]:
    name = path.name or path.resolve().name or "/"
    if not path.is_dir():
        status = _status(path)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode)):
            raise ConfigError(f"{path}: is {_kind(status)}, not a file; give files, or - for standard input")
        yield _local(str(path), name, name, status)
        return
    left_out = Counter[str]()
    for found in _walk(path, left_out):
        if not is_searched(found.name):
            left_out[found.suffix.lower() or "without a suffix"] += found.name not in _OWN_FILES
        elif not stat.S_ISREG((status := _status(found)).st_mode):
            left_out[_kind(status)] += 1
        else:
            yield _local(str(found), f"{name}/{found.relative_to(path).as_posix()}", name, status)
    _tell_left_out(left_out, str(path), note)


def _walk(root: Path, left_out: Counter[str]) -> Iterator[Path]:
    """The files below a folder without the hidden ones, also through links.

    Each folder is read once, so that no loop of links is endless; a link to a folder above is left out.

    Raises:
        ConfigError: a folder can't be read.
    """
    top = Path(os.path.realpath(root))
    seen, waiting = {top}, [(root, top)]
    while waiting:
        folder, place = waiting.pop()
        files, folders = _list(folder)
        yield from files
        below = []
        for path in folders:
            real = place / path.name
            if path.is_symlink():
                real = Path(os.path.realpath(path))
                if top.is_relative_to(real):
                    left_out["link to a folder above"] += 1
                    continue
                if _is_walked(real, top):
                    continue
            if real not in seen:
                seen.add(real)
                below.append((path, real))
        waiting += reversed(below)


def _is_walked(real: Path, top: Path) -> bool:
    """Whether a link's target is a folder that is reached without it."""
    return real.is_relative_to(top) and not any(part.startswith(".") for part in real.relative_to(top).parts)


def _list(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files and folders in a folder, without the hidden ones."""
    files: list[Path] = []
    folders: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if not entry.name.startswith(".") and entry.name != _OF_THE_DISK:
                    (folders if _is_folder(entry) else files).append(folder / entry.name)
    except OSError as error:
        raise ConfigError(f"{folder}: can't be read: {error.strerror}; give permission, or leave it out") from error
    return files, folders


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    with contextlib.suppress(OSError):  # a link to itself
        return entry.is_dir()
    return False


def _status(path: Path | str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}; fix it, or leave it out") from error


def _kind(status: os.stat_result) -> str:
    """What it is, if it is no regular file."""
    return KINDS.get(stat.S_IFMT(status.st_mode), "something else")


def _tell_left_out(left_out: Mapping[str, int], source: str, note: Note) -> None:
    kinds = [(kind, number) for kind, number in Counter(left_out).most_common() if number]
    if kinds:
        shown = ", ".join(f"{kind.removeprefix('a ')} ({number:,})" for kind, number in kinds[:_KINDS_SHOWN])
        more = ", and others" if len(kinds) > _KINDS_SHOWN else ""
        note(f"{source}: left out {shown}{more}; name a file to read it all the same")


def _find_pattern(pattern: str, note: Note) -> Iterator[SourceFile]:
    fixed = Path(pattern[: pattern.index(next(c for c in pattern if c in "*?["))] + "x").parent
    name = fixed.name or fixed.resolve().name or "/"
    left_out, empty = Counter[str](), True
    _check_folders(pattern)
    for path in sorted(glob.glob(pattern, recursive=True)):
        try:
            status = os.stat(path)
        except FileNotFoundError:
            left_out[_BROKEN] += 1
            continue
        except OSError as error:
            raise ConfigError(f"{path}: can't be read: {error.strerror}; fix it, or leave it out") from error
        if stat.S_ISREG(status.st_mode):
            empty = False
            yield _local(path, f"{name}/{Path(path).relative_to(fixed).as_posix()}", name, status)
        elif not stat.S_ISDIR(status.st_mode):
            left_out[_kind(status)] += 1
    _tell_left_out(left_out, pattern, note)
    if empty:
        raise ConfigError(f"{pattern}: no file matches")


def _check_folders(pattern: str) -> None:
    """Raises if a folder that the pattern leads through can't be read: `glob` would take it for an empty one."""
    for parent in Path(pattern).parents:
        for folder in glob.iglob(str(parent), recursive=True):
            is_read = os.path.basename(folder) != _OF_THE_DISK and os.path.isdir(folder)
            if is_read and not os.access(folder, os.R_OK | os.X_OK):
                raise ConfigError(f"{folder}: can't be read; give permission, or leave it out of the pattern")
        if not glob.has_magic(str(parent)):
            break


def _find_remote(url: str, note: Note) -> Iterator[SourceFile]:
    protocol, _, rest = url.partition("://")
    left_out = Counter[str]()
    try:
        system, path = fsspec.core.url_to_fs(url)
        found, base = _list_remote(system, path, rest, left_out)
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
            size, version = int(info.get("size") or 0), remote_version_of(info)
            if has_index(file):
                with contextlib.suppress(OSError):
                    version += f" {remote_version_of(system.info(index_of(file)))}"
            yield SourceFile(system.unstrip_protocol(file), redact(file_id), redact(source), size, version)
    _tell_left_out(left_out, url, note)


def _list_remote(
    system: Any, path: str, pattern: str, left_out: Counter[str]
) -> tuple[list[tuple[str, Mapping[str, Any]]], str]:
    """The files with what their file system knows of them, and the folder that they are named from."""
    if glob.has_magic(pattern):
        found = sorted(system.glob(path, detail=True).items())
        return found, path[: path.index(next(c for c in path if c in "*?["))].rpartition("/")[0]
    # Over http, asking whether a file is a folder would read all of it.
    named = system.info(path) if format_of(path) else None
    if (named is None or named["type"] != "file") and system.isdir(path):
        inside = sorted(_find_below(system, path).items())
        for name, _ in inside:
            if not is_searched(name):
                left_out[PurePosixPath(name).suffix.lower() or "without a suffix"] += 1
        return [(name, info) for name, info in inside if is_searched(name)], path.rstrip("/")
    return [(path, named or system.info(path))], path.rpartition("/")[0]


def _find_below(system: Any, path: str) -> dict[str, Mapping[str, Any]]:
    """All files below a folder. The plain search of fsspec leaves out each folder that it can't list."""
    if type(system).find is not AbstractFileSystem.find or isinstance(system, AsyncFileSystem):
        return dict(system.find(path, detail=True))
    found, waiting = dict[str, Mapping[str, Any]](), [path]
    while waiting:
        folder = waiting.pop()
        for info in system.ls(folder, detail=True):
            if info["type"] != "directory":
                found[info["name"]] = info
            elif info["name"].rstrip("/") != folder.rstrip("/"):
                waiting.append(info["name"])
    return found


def _local(path: str, file_id: str, source: str, status: os.stat_result) -> SourceFile:
    if is_pipe(path) or path == STDIN:  # a file of this name, found in the working folder: it must not be run
        path = f"./{path}"
    if not stat.S_ISREG(status.st_mode):  # a named pipe: its size is known when it has been read
        return SourceFile(path, file_id, source, 0, "")
    return SourceFile(path, file_id, source, status.st_size, version_of(status, path))
