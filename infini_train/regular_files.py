"""Opening files that somebody else may have put there: regular files only, no links where none belong, bounded reads.

A named pipe or a device in a folder would otherwise hang a command or never end; a link with the name of a file that
is about to be written would make it overwrite another. Imports no torch.
"""

import errno
import os
import stat
from pathlib import Path
from typing import IO, Any

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_regular(path: Path | str) -> os.stat_result:
    """The status of a file, links followed.

    Raises:
        OSError: there is none, or it is a pipe, a device, a socket or a folder; `strerror` says which.
    """
    status = os.stat(path)
    _refuse_others(status, path)
    return status


def open_regular(path: Path | str, mode: str = "rb", *, follow_links: bool = True, **options: Any) -> IO[Any]:
    """Opens a file for reading, without waiting for anything.

    Args:
        path: of the file.
        mode: "r" or "rb".
        follow_links: whether a link may stand in the last place of the path.
        options: of `open`, such as `encoding`.

    Raises:
        OSError: it can't be opened, or is a pipe, a device, a socket, a folder or (unless followed) a link.
    """
    assert mode in ("r", "rb"), mode
    # non-blocking: opening a pipe would wait for somebody to write
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    return _open(path, flags, mode, **options)


def open_own(path: Path | str, *, truncate: bool = False, append: bool = False, permissions: int = 0o666) -> IO[bytes]:
    """Opens a file of our own for reading and writing, such as a lock; makes it if there is none.

    Args:
        path: of the file.
        truncate: empty it, after the check.
        append: every write goes to the end of the file.
        permissions: of a new file, less the umask.

    Raises:
        OSError: it can't be opened, or a link or something that is no regular file stands in its place.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW | (os.O_APPEND if append else 0)
    file = _open(path, flags, "r+b", permissions=permissions)
    if truncate:
        file.truncate()
    return file


def read_regular(path: Path | str, max_bytes: int, *, follow_links: bool = True) -> bytes:
    """The content of a file that is small by its nature.

    Raises:
        OSError: see `open_regular`; or it holds more than `max_bytes`.
    """
    with open_regular(path, follow_links=follow_links) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"holds more than {max_bytes:,} bytes, the limit for such a file", str(path))
    return bytes(content)


def _open(path: Path | str, flags: int, mode: str, permissions: int = 0o666, **options: Any) -> IO[Any]:
    try:
        descriptor = os.open(path, flags, permissions)
    except OSError as error:
        if error.errno == errno.ELOOP and flags & os.O_NOFOLLOW:
            raise OSError(errno.ELOOP, "is a link; a file of its own is expected here", str(path)) from error
        if error.errno == errno.ENXIO:  # a socket
            raise OSError(errno.EINVAL, "is a socket, not a file", str(path)) from error
        raise
    try:
        _refuse_others(os.fstat(descriptor), path)
        return open(descriptor, mode, **options)
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_others(status: os.stat_result, path: Path | str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        code = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(code, f"is {kind}, not a file", str(path))


def make_private(folder: Path) -> None:
    """Creates a folder and the parents that are missing; only their owner can enter the new ones."""
    for each in reversed((folder, *folder.parents)):
        if not each.exists():
            each.mkdir(mode=0o700, exist_ok=True)
