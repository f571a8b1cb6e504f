"""The run's folder: whether it can be written, who may write there, and what makes it complete.

Two locks, because either can fail: a file lock keeps a second process out, but some shared file systems have no locks,
or hold them for one node only. The fence is for jobs that Slurm has started again: each start writes its number into
launch/fence, and a process of an earlier start that is still alive (on a node that lost the network, for instance)
finds another number there and ends.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from infini_train.atomic_files import write_atomic
from infini_train.config.errors import ConfigError
from infini_train.config.files import dump
from infini_train.config.run import RunConfig
from infini_train.data.source import Source
from infini_train.train.session import Session

MIN_FREE_BYTES = 2**20


def check_space(directory: Path) -> None:
    """Makes the folder, and finds out now rather than at the first checkpoint that it can't be written.

    Raises:
        ConfigError: it can't be written, or the disk is full.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(directory).free
    except OSError as error:
        raise ConfigError(f"run_dir: {directory} can't be written: {error.strerror}") from error
    if free_bytes < MIN_FREE_BYTES:
        raise ConfigError(f"run_dir: no space left on device for {directory}; free space or choose another run_dir")


@contextlib.contextmanager
def hold_folder(session: Session) -> Iterator[None]:
    """Keeps a second run from training in the same folder; the lock ends with rank 0's process, however that ends.

    Raises:
        ConfigError: another process holds it.
    """
    directory = session.config.directory
    if not session.place.is_first:
        yield
        return
    with (directory / ".lock").open("w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"run_dir: another process is training in {directory}; wait for it or stop it") from None
        except OSError:
            pass  # a file system without locks
        write_identity(session.config, session.source)
        yield


def check_fence(session: Session) -> None:
    """Rank 0: checks that this is the latest start of the run's job, if `infini-launch`'s scripts number the starts.

    Raises:
        ConfigError: a later start has taken over the folder.
    """
    mine, path = os.environ.get("INFINI_TRAIN_START"), session.config.directory / "launch" / "fence"
    if not session.place.is_first or mine is None or not path.exists():
        return
    latest = path.read_text(encoding="utf-8").strip()
    if latest != mine:
        raise ConfigError(f"run_dir: start {latest} of the job has taken {path.parent.parent} over; this is {mine}")


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
            if not copy.is_file() or copy.read_bytes() != tokenizer.model_bytes:  # it may be the tokenizer in use
                write_atomic(copy, tokenizer.model_bytes)
    except OSError as error:
        raise ConfigError(f"run_dir: {config.directory} can't be written: {error.strerror}") from error
