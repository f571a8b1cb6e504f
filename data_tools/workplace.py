"""The hidden folder beside a result in which its parts are collected; it outlives a run that was stopped or killed."""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from data_tools.problems import SettingError
from infini_train.config.errors import ConfigError
from infini_train.data.manifest import MANIFEST_FILE
from infini_train.data.writer import TargetExistsError, explain_disk_errors, replace_folder
from infini_train.regular_files import open_own

_RESULT = "result"
_PUBLISHING = "publishing"  # from here on the result may have left the folder
_REMOVED = "-removed"  # ends the name of a folder that is being deleted


def check_pair_target(folder: Path, overwrite: bool) -> None:
    """The folder may become one that holds the datasets train and validation, and nothing else.

    Raises:
        ConfigError: it holds something else.
    """
    with explain_disk_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder}: is a file; give a folder")
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if MANIFEST_FILE in names:
        raise ConfigError(f"{folder}: is itself a dataset; choose another folder for train and validation")
    if names - {"train", "validation"}:
        raise ConfigError(f"{folder}: is not empty; choose another folder")
    if names and not overwrite:
        raise TargetExistsError(f"{folder}: datasets are there already; choose another folder")


class Workplace:
    """A context manager that gives the folder `.NAME.partial` beside the result NAME.

    After an error the folder stays if it holds finished tasks, or if other parts may be at work in it.

    Args:
        target: what will be written.
        restart: begin with an empty folder.
        part: this run's part of the work, if there are others.
        finished: patterns of files worth keeping after an error.

    Raises:
        ConfigError: another process is at the same work, or the folder can't be written.
    """

    def __init__(
        self, target: Path, *, restart: bool = False, part: str | None = None, finished: Sequence[str] = ("task-*",)
    ) -> None:
        self._shown = target
        self._target = Path(os.path.abspath(target))  # has a name and a parent, also for . or a/..
        self.folder = self._target.parent / f".{self._target.name}.partial"
        self.result = self.folder / _RESULT
        self._part = part
        if restart and part:
            template = "{restart}: other parts may be at work; remove {folder} by hand when none is"
            raise SettingError(template, folder=self.folder)
        self._restart = restart
        self._finished = finished

    def __enter__(self) -> Path:
        with explain_disk_errors(self._shown):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            # Never remove what another part has just made: a folder that was not there is left alone.
            if self.folder.exists() and (self._restart or not self._is_unfinished()):
                self._take_lock().close()  # nobody is at work there
                self.discard()
            self.folder.mkdir(exist_ok=True)
        self._lock = self._take_lock()
        return self.folder

    def _take_lock(self) -> IO[bytes]:
        lock = self._open_lock(f"lock-{(self._part or 'all').replace('/', '-of-')}")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ConfigError(f"{self.folder}: another process is at this work; wait for it, or end it") from None
        except OSError:  # a file system without locks: two runs at once would do the same work twice
            pass
        return lock

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(OSError):
            if kind is not None and self._part is None and not self._is_worth_keeping():
                self.discard()
        self._lock.close()

    @contextlib.contextmanager
    def last_step(self) -> Iterator[bool]:
        """One part at a time may enter; gives whether the result is still to be made."""
        if not self.folder.exists():
            yield False
            return
        lock = self._open_lock("lock-last-step")
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield self._is_unfinished()
        finally:
            lock.close()

    def publish(self) -> None:
        """Move the result to its place, and remove this folder.

        Raises:
            ConfigError: the disk refuses.
        """
        with explain_disk_errors(self._shown):
            (self.folder / _PUBLISHING).touch()
            replace_folder(self.result, self._target)
            self.discard()

    def discard(self) -> None:
        """Remove the folder, since nothing more will come of it.

        It is renamed first: what a kill leaves of a half-deleted folder must not look like unfinished work.
        """
        aside = self.folder.with_name(f"{self.folder.name}-{uuid.uuid4().hex[:8]}{_REMOVED}")
        with contextlib.suppress(OSError):  # another part was faster
            self.folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)

    def _remove_stale(self) -> None:
        """Delete what runs left that were killed while deleting."""
        for path in list(self.folder.parent.iterdir()):
            if path.name.startswith(f"{self.folder.name}-") and path.name.endswith(_REMOVED):
                shutil.rmtree(path, ignore_errors=True)

    def _is_worth_keeping(self) -> bool:
        return any(any(self.folder.glob(f"**/{pattern}")) for pattern in self._finished)

    def _is_unfinished(self) -> bool:
        return self.folder.exists() and (self.result.exists() or not (self.folder / _PUBLISHING).exists())

    def _open_lock(self, name: str) -> IO[bytes]:
        with explain_disk_errors(self._shown):
            return open_own(self.folder / name, permissions=0o644)
