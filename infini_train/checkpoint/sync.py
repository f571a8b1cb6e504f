"""Files that survive a power cut, and what a user is shown when they can't be written."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from infini_train.atomic_files import sync_path
from infini_train.checkpoint.fragments import CheckpointError, VanishedError
from infini_train.regular_files import open_own


def write_synced(path: Path, text: str) -> None:
    """Writes a small text file and waits until its content is on disk."""
    with open_own(path, truncate=True) as stream:
        stream.write(text.encode())
        stream.flush()
        os.fsync(stream.fileno())


def remove(path: Path) -> None:
    """Removes a folder with all that is in it, or whatever else has this name: of a link the link alone.

    What can't be removed stays; whoever needs the name finds out.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def check_new(folder: Path) -> None:
    """Whether a folder of this name can be made.

    Raises:
        CheckpointError: something is there.
    """
    if folder.exists() or folder.is_symlink():
        raise CheckpointError(f"{folder}: exists already; name a new folder")


@contextlib.contextmanager
def appearing(target: Path, suffix: str) -> Iterator[Path]:
    """A folder beside the target, which takes its name when all is in it and on disk, and vanishes if anything fails.

    Args:
        target: it does not exist (`check_new`).
        suffix: of the name that it has meanwhile.
    """
    aside = target.with_name(f".{target.name}.{suffix}")
    try:
        remove(aside)  # of a process that was killed
        aside.mkdir(parents=True)
        yield aside
        sync_path(aside)
        aside.rename(target)
        sync_path(target.parent)
    finally:
        remove(aside)


def describe_failure(failure: Exception, folder: Path, step: int) -> Exception:
    """The failure of a save as one line for the user; a programming error is returned as it is."""
    if isinstance(failure, VanishedError):
        return failure
    if isinstance(failure, CheckpointError):
        return CheckpointError(f"{folder}: the checkpoint of step {step} was not written: {failure}")
    number = _error_number(failure)
    if number is None:
        return failure
    said = failure.strerror if isinstance(failure, OSError) and failure.strerror else os.strerror(number)
    problem = "no space left on device" if number == errno.ENOSPC else said[:1].lower() + said[1:]
    advice = {
        errno.ENOSPC: "; free space or lower checkpoint.keep_last",
        errno.EDQUOT: "; free space or lower checkpoint.keep_last",
        errno.EFBIG: "; raise the limit on file sizes (ulimit -f)",
    }.get(number, "")
    return CheckpointError(f"{folder}: {problem}; the checkpoint of step {step} was not written{advice}")


def _error_number(failure: Exception) -> int | None:
    if isinstance(failure, OSError):
        return failure.errno
    match = re.search(r"os error (\d+)", str(failure)) if isinstance(failure, SafetensorError) else None
    return int(match[1]) if match else None
