"""Files that a run writes beside its checkpoints: a disk that refuses them does not end training."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from infini_train.regular_files import open_own

LOG = logging.getLogger(__name__)
MAX_PENDING_BYTES = 16 * 2**20


class SideFiles:
    """Warns once for each file that can't be written."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    @contextlib.contextmanager
    def tolerate(self, path: Path) -> Iterator[None]:
        """Leaves the context without an error where the operating system refuses to write the file."""
        try:
            yield
        except OSError as error:
            if path.name not in self._warned:
                self._warned.add(path.name)
                problem = error.strerror or error
                LOG.warning("warning: %s can't be written: %s; training goes on without it", path, problem)


class Lines:
    """A file that grows by lines. What could not be written is kept, and written before the next line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._pending = b""

    def append(self, line: str) -> None:
        """Adds a line, and all that is still to be written.

        Raises:
            OSError: the disk refuses it.
        """
        self._pending += f"{line}\n".encode()
        if len(self._pending) > MAX_PENDING_BYTES:
            self._pending = b"\n"  # of the line that was begun
        self.flush()

    def flush(self) -> None:
        """Writes what could not be written before.

        Raises:
            OSError: the disk refuses it.
        """
        try:
            while self._pending:
                if self._file is None:
                    self._file = open_own(self._path, append=True)
                written = os.write(self._file.fileno(), self._pending)
                self._pending = self._pending[written:]
        except OSError:
            self.close()  # a stale handle stays stale; the next attempt opens the file again
            raise

    def close(self) -> None:
        """Closes the file; `append` opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()
