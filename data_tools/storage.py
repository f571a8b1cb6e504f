"""The files of a corpus where they are stored: what identifies their content, and opening them."""

import contextlib
import io
import os
import stat
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple, cast

import fsspec

from data_tools.formats import has_index, index_of
from data_tools.pipes import is_pipe, open_named_pipe, open_pipe
from infini_train.config.errors import ConfigError
from infini_train.data.cache import transport_errors
from infini_train.regular_files import open_regular

STDIN = "-"
_CONTENT_KEYS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5")
_TIME_KEYS = ("Last-Modified", "mtime")
_LISTED_TIME_KEYS = (
    "LastModified",
    "last_modified",
    "updated",
    "created",
)  # one file asked for has them in another form
_LISTED = "listed "  # begins a version of these
_BUFFER_BYTES = 1 << 20
CTIME = "its content, or else its permissions, owner or links; size and time of the last change are the same"
_ADVICE = "let nothing write to the sources, then begin again"


class UncheckedError(ConfigError):
    """Nobody can say now whether a file has changed: its server doesn't answer, say."""


class SourceFile(NamedTuple):
    """A file to read. `id` names it in the corpus; `source` names the argument that it was found by."""

    path: str
    id: str
    source: str
    bytes: int  # 0: unknown
    version: str  # differs for different contents; empty where the storage has none


def is_url(path: str) -> bool:
    """Whether fsspec opens it."""
    return "://" in path and not is_pipe(path)


def is_stream(path: str) -> bool:
    """Whether it can be read only once, and by this process alone: standard input, a named pipe, `<(command)`."""
    if path == STDIN:
        return True
    if is_pipe(path) or is_url(path):
        return False
    with contextlib.suppress(OSError):
        return stat.S_ISFIFO(os.stat(path).st_mode)
    return False


def version_of(status: os.stat_result, path: str) -> str:
    """The version of a local file: the times of its last change, also of a change that has put back its times."""
    version = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    if has_index(path):
        with contextlib.suppress(OSError):
            index = os.stat(index_of(path))
            version += f" {index.st_size} {index.st_mtime_ns} {index.st_ctime_ns}"
    return version


def differ_in_ctime(path: str, before: str, now: str) -> bool:
    """Whether two versions of a local file differ only in the time that chmod, chown, ln and mv set, too."""
    old, new = before.split(), now.split()
    is_ctime = (1, 4)  # of the file, and of the index beside it
    pairs = enumerate(zip(old, new, strict=False))
    return not is_url(path) and len(old) == len(new) and all(a == b for i, (a, b) in pairs if i not in is_ctime)


def remote_version_of(info: Mapping[str, Any]) -> str:
    """The version of a file at a URL, as its file system gives it: of the content, or else its times."""
    for keys, prefix in ((_CONTENT_KEYS, ""), (_TIME_KEYS, ""), (_LISTED_TIME_KEYS, _LISTED)):
        if found := [str(info[key]) for key in keys if info.get(key) is not None]:
            # Some stores quote an ETag when asked for one file, and don't where they list many.
            return prefix + " ".join(each.removeprefix("W/").strip('"') for each in found)
    return ""


def require_unchanged(path: str, n_bytes: int, version: str) -> None:
    """Checks that a file is still the one that was found, as far as its storage tells; streams pass.

    Args:
        path: of the file.
        n_bytes: its size when it was found; 0: unknown.
        version: its version then; empty: unknown.

    Raises:
        ConfigError: it has changed, or can't be found any more.
        UncheckedError: its storage can't tell now.
    """
    if not version and not n_bytes:
        return
    try:
        now_bytes, now = _look(path)
    except (*transport_errors(), ValueError) as error:  # type: ignore[misc]
        reason = getattr(error, "strerror", None) or str(error)
        if is_url(path) and not _is_gone(error):
            reason = str(error.__cause__ or reason)
            advice = "give the same command again"
            raise UncheckedError(f"{path}: can't be asked whether it has changed: {reason}; {advice}") from error
        raise ConfigError(f"{path}: has changed while the command ran: {reason}; {_ADVICE}") from error
    is_other = bool(version) and not version.startswith(_LISTED) and now != version
    if is_other or (now_bytes or n_bytes) != n_bytes:
        sizes = f" ({n_bytes:,} bytes before, {now_bytes:,} now)" if now_bytes != n_bytes else ""
        if not sizes and differ_in_ctime(path, version, now):
            sizes = f" ({CTIME})"
        raise ConfigError(f"{path}: has changed while the command ran{sizes}; {_ADVICE}")


def _is_gone(error: Exception) -> bool:
    """Whether a file is not there. Over http fsspec says so of each file that its server doesn't give."""
    reason = error.__cause__
    is_plain = reason is None or isinstance(reason, FileNotFoundError) or getattr(reason, "status", None) in (404, 410)
    return isinstance(error, FileNotFoundError) and is_plain


def _look(path: str) -> tuple[int, str]:
    """Size and version now."""
    if is_url(path):
        system, inner = fsspec.core.url_to_fs(path)
        system.invalidate_cache(inner)
        info = system.info(inner)
        version = remote_version_of(info)
        if has_index(path):
            with contextlib.suppress(OSError):
                version += f" {remote_version_of(system.info(index_of(inner)))}"
        return int(info.get("size") or 0), version
    with open_regular(path) as file:  # a network file system asks its server when a file is opened
        status = os.fstat(file.fileno())
    return status.st_size, version_of(status, path)


def open_raw(path: str) -> BinaryIO:
    """The bytes of a file as they are stored.

    Raises:
        ConfigError: a pipe's command can't be run.
        OSError: it can't be opened; it is a device, say, or a named pipe that nobody writes into.
    """
    if path == STDIN:
        return sys.stdin.buffer
    if is_pipe(path):
        return open_pipe(path)
    if is_url(path):
        system, inner = fsspec.core.url_to_fs(path)
        # Lines of limited length are read, which fsspec's own files don't offer.
        return io.BufferedReader(system.open(inner, "rb"), _BUFFER_BYTES)
    if stat.S_ISFIFO(os.stat(path).st_mode):
        return open_named_pipe(path)
    return cast(BinaryIO, open_regular(path, buffering=_BUFFER_BYTES))
