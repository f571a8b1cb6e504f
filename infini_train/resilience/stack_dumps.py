"""Stack traces of all threads of a rank, in a file per rank: in a hang there is no other evidence.

A rank whose interpreter is stuck can't write them, but the signal handler of `faulthandler` can. The signal is SIGURG,
which a process without the handler ignores. A suspended process (SIGSTOP) answers after SIGCONT; one blocked inside the
kernel, by a driver or by a file system that does not answer, never does.
"""

import faulthandler
import os
import signal
import time
from pathlib import Path

from infini_train.regular_files import make_private, open_own

DUMP_SIGNAL = signal.SIGURG
LOGS = "INFINI_TRAIN_LOGS"  # log folder of this start, set by the batch script
WANTED = "stacks-wanted"  # a file in it: the batch script then sends the signal to all ranks


class StackDumps:
    """Dumps stacks into FOLDER/stacks-RANK.txt on a signal; `close` removes the file if there was none."""

    def __init__(self, folder: Path, rank: int) -> None:
        make_private(folder)
        self.path = folder / f"stacks-{rank}.txt"
        self._file = open_own(self.path, truncate=True)
        self._file.write(f"rank {rank}, process {os.getpid()}, begun {time.strftime('%F %T')}\n".encode())
        self._file.flush()
        self._empty_bytes = self.path.stat().st_size
        faulthandler.register(DUMP_SIGNAL, file=self._file, all_threads=True, chain=False)

    def dump(self) -> None:
        """Writes this rank's stacks now, and requests those of all ranks by creating the file `WANTED`."""
        faulthandler.dump_traceback(self._file, all_threads=True)
        open_own(self.path.parent / WANTED).close()

    def close(self) -> None:
        """Signals are ignored from now on."""
        faulthandler.unregister(DUMP_SIGNAL)
        self._file.close()
        if self.path.exists() and self.path.stat().st_size <= self._empty_bytes:
            self.path.unlink()


def logs_folder(run_dir: Path) -> Path:
    """Folder of the stack files of a run's ranks."""
    given = os.environ.get(LOGS)
    return Path(given) if given else run_dir / "launch" / "logs" / "local"
