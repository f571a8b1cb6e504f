"""Where every thread of a rank is, in a file of its own: for a hang, which tells nothing else.

A rank whose interpreter is stuck can't write it, but the signal handler of `faulthandler` can. SIGURG asks for it,
since a process that doesn't know it ignores it. A process that is stopped (SIGSTOP) answers once it goes on (SIGCONT);
one that the kernel holds, in a file system that does not answer or in a driver, never does.
"""

import faulthandler
import os
import signal
import time
from pathlib import Path

ASK = signal.SIGURG
LOGS = "INFINI_TRAIN_LOGS"  # folder of the logs of this start, from the batch script
WANTED = "stacks-wanted"  # the file in it by which a rank asks for the stacks of all


class Stacks:
    """The file FOLDER/stacks-RANK.txt, as long as this exists; removed at `close` if nobody asked."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"stacks-{rank}.txt"
        self._file = self.path.open("w", encoding="utf-8")
        self._file.write(f"rank {rank}, process {os.getpid()}, begun {time.strftime('%F %T')}\n")
        self._file.flush()
        self._empty_bytes = self.path.stat().st_size
        faulthandler.register(ASK, file=self._file, all_threads=True, chain=False)

    def dump(self) -> None:
        """Writes the stacks now, and asks for those of all ranks: a batch script that sees the file signals them."""
        faulthandler.dump_traceback(self._file, all_threads=True)
        (self.path.parent / WANTED).touch()

    def close(self) -> None:
        """From now on nobody is answered."""
        faulthandler.unregister(ASK)
        self._file.close()
        if self.path.exists() and self.path.stat().st_size <= self._empty_bytes:
            self.path.unlink()


def logs_folder(run_dir: Path) -> Path:
    """Where the stacks of a run's ranks go."""
    given = os.environ.get(LOGS)
    return Path(given) if given else run_dir / "launch" / "logs" / "local"
