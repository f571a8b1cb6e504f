"""The run's folder: whether it can be written, who may write there, and what makes it complete.

Two locks, because either can fail: a file lock keeps a second process out, but some shared file systems have no locks,
or hold them for one node only. The fence is for jobs that Slurm has started again: each start writes its number into
launch/fence, and a process of an earlier start that is still alive (on a node that lost the network, for instance)
finds another number there and ends.

The lock comes first: before it is held, nothing of the folder is read or written. A checkpoint that was read earlier
would be an old one by the time that another process lets the folder go.
"""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from infini_train.atomic_files import write_atomic
from infini_train.config.errors import ConfigError
from infini_train.config.files import dump
from infini_train.config.run import RunConfig
from infini_train.data.source import Source
from infini_train.regular_files import open_own, read_regular

LOG = logging.getLogger(__name__)

LOCK = ".lock"
MIN_FREE_BYTES = 2**20
HANDOVER_S = 120.0  # an earlier start of the same job sees the fence at its next report or checkpoint
GLANCE_S = 0.5  # `infini-launch status` asks for the lock, and lets it go at once
POLL_S = 0.2
MAX_FENCE_BYTES = 4096
START = "INFINI_TRAIN_START"  # the number of this start, set by `infini-launch`'s scripts


@contextlib.contextmanager
def hold_folder(directory: Path, is_first: bool) -> Iterator[None]:
    """Makes the run's folder and keeps a second run from training there, until rank 0's process ends, however it does.

    The other ranks don't wait here: they get the folder's checkpoint from rank 0, which has it only under the lock. If
    the context is left by an error before anything was written, the folder is as it was.

    Args:
        directory: the run's folder.
        is_first: whether this process is rank 0, which holds the lock.

    Raises:
        ConfigError: it can't be written, the disk is full, or another process holds it. The latest start of a job waits
            `HANDOVER_S` for that process, which may be an earlier start.
    """
    if not is_first:
        yield
        return
    made, before = _make_folder(directory)
    try:
        stream = _lock(directory)
    except BaseException:
        _remove_empty(made)
        raise
    with stream:
        try:
            yield
        except BaseException:
            _restore_folder(directory, made, before)
            raise


def _make_folder(directory: Path) -> tuple[list[Path], set[str]]:
    """Makes the folder, and finds out now rather than at the first checkpoint that it can't be written.

    Returns:
        The folders that were made, the innermost first, and what the run's folder held before.
    """
    made: list[Path] = []
    try:
        str(directory).encode()  # it goes into texts, to other ranks too
        absent = [path for path in (directory, *directory.parents) if not os.path.lexists(path)]
        for path in reversed(absent):
            path.mkdir(exist_ok=True)
            made.insert(0, path)
        held = set(os.listdir(directory))
        free_bytes = shutil.disk_usage(directory).free
    except (OSError, ValueError) as error:  # ValueError: no file system has such a name
        _remove_empty(made)
        if isinstance(error, OSError):
            raise ConfigError(f"run_dir: {str(directory)[:300]} can't be written: {error.strerror}") from error
        raise ConfigError(f"run_dir: {str(directory)[:300]!a} is not a valid folder name: {error}") from error
    if free_bytes < MIN_FREE_BYTES:
        _remove_empty(made)
        raise ConfigError(f"run_dir: no space left on device for {directory}; free space or choose another run_dir")
    return made, held


def _restore_folder(directory: Path, made: list[Path], before: set[str]) -> None:
    """Removes the lock's file, and the folders made for it, if nothing else was added."""
    with contextlib.suppress(OSError):
        if LOCK not in before and set(os.listdir(directory)) == before | {LOCK}:
            (directory / LOCK).unlink()  # still held: whoever waits for it sees that it has gone (`_is_current`)
            _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for path in folders:
            path.rmdir()


def _lock(directory: Path) -> IO[bytes]:
    """The folder's lock, held until it is closed; on a file system without locks nothing is held."""
    deadline = time.monotonic() + (HANDOVER_S if _takes_over(directory) else GLANCE_S)
    while (stream := _try_lock(directory / LOCK)) is None:
        if time.monotonic() >= deadline:
            raise ConfigError(f"run_dir: another process is training in {directory}; wait for it or stop it")
        LOG.debug("an earlier start still holds %s", directory)
        time.sleep(POLL_S)
    return stream


def _try_lock(path: Path) -> IO[bytes] | None:
    """The lock's file, open and locked; None: another process holds it."""
    while True:
        try:
            stream = open_own(path)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EINVAL, errno.EISDIR):  # see open_own
                raise ConfigError(f"run_dir: {path} {error.strerror}; remove it") from error
            raise ConfigError(f"run_dir: {path.parent} can't be written: {error.strerror}") from error
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            return None
        except OSError:
            return stream  # a file system without locks
        if _is_current(stream, path):
            return stream
        stream.close()


def _takes_over(directory: Path) -> bool:
    """Whether this is the latest start of a job: an earlier one that holds the folder will let it go.

    Reads the fence, which belongs to the job's script, before the lock is held.
    """
    mine = os.environ.get(START)
    with contextlib.suppress(OSError):
        return mine is not None and _read_fence(directory) == mine
    return False


def _read_fence(directory: Path) -> str:
    content = read_regular(directory / "launch" / "fence", MAX_FENCE_BYTES)
    return content.decode("utf-8", "replace").strip()


def _is_current(stream: IO[bytes], path: Path) -> bool:
    """Whether the opened file is still the one of this name: its holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def check_fence(directory: Path, is_first: bool) -> None:
    """Rank 0: checks that this is the latest start of the run's job, if `infini-launch`'s scripts number the starts.

    Args:
        directory: the run's folder.
        is_first: whether this process is rank 0.

    Raises:
        ConfigError: a later start has taken over the folder.
    """
    mine = os.environ.get(START)
    if not is_first or mine is None:
        return
    try:
        latest = _read_fence(directory)
    except FileNotFoundError:
        return
    except OSError as error:  # a stale handle, say: no reason to end a run that the lock protects too
        LOG.warning("warning: %s can't be read: %s", directory / "launch" / "fence", error.strerror)
        return
    if latest != mine:
        raise ConfigError(f"run_dir: start {latest} of the job has taken {directory} over; this is {mine}")


def write_identity(config: RunConfig, source: Source) -> None:
    """Writes the resolved config and the tokenizer, so that the folder is all that evaluation and generation need.

    Raises:
        ConfigError: they can't be written.
    """
    try:
        write_atomic(config.directory / "config.yaml", dump(config))
        tokenizer = source.tokenizer
        if tokenizer.file_name is not None:  # the byte tokenizer has no file
            copy = config.directory / tokenizer.file_name
            if not _holds(copy, tokenizer.model_bytes):  # it may be the tokenizer in use
                write_atomic(copy, tokenizer.model_bytes)
    except OSError as error:
        raise ConfigError(f"run_dir: {config.directory} can't be written: {error.strerror}") from error


def _holds(path: Path, content: bytes) -> bool:
    try:
        return read_regular(path, len(content)) == content
    except OSError:
        return False
