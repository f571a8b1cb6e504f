"""Files that appear whole or not at all, whenever the process is killed. Imports no torch.

Folders appear so in other places: `checkpoint.sync.appearing` (checkpoints that are converted or divided anew),
`data.writer.replace_folder` (shards), and of infini-data `tasks.do_task` (a task's results) and `Workplace.publish` (a
command's).
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from infini_train.regular_files import open_own


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True, permissions: int = 0o666) -> None:
    """Writes a file that is replaced whole: a reader sees the old content or the new one, nothing in between.

    Args:
        path: of the file; its folder exists.
        content: text, written as UTF-8, or bytes.
        durable: wait until the disk has it, so that it also survives a power cut.
        permissions: of the file, less the umask; 0o600 for what may hold a secret.

    Raises:
        OSError: it can't be written; what was there stays.
    """
    with replacing(path, durable=durable, permissions=permissions) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True, permissions: int = 0o666) -> Iterator[Path]:
    """Gives the path of a hidden file in the same folder, to be written inside; on success it takes the name `path`.

    If anything fails, the hidden file is removed and what was at `path` stays; only a process that is killed leaves it.
    The file is a new one: permissions follow the umask, and a link at `path` is replaced. See `write_atomic` for the
    arguments.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{threading.get_ident()}")
    try:
        partial.unlink(missing_ok=True)  # of a process that was killed; a link planted here must not be followed
        open_own(partial, permissions=permissions).close()
        yield partial
        if durable:
            sync_path(partial)
        partial.replace(path)
        if durable:
            sync_path(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_path(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
