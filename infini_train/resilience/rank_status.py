"""What a rank is doing, in a small file that `infini-launch status` reads (`launch/ranks.py`)."""

import contextlib
import json
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from infini_train.atomic_files import write_atomic
from infini_train.regular_files import make_private

PERIOD_S = 10.0
STEPS = 16  # whose median is reported


class RankStatus:
    """Writes FOLDER/RANK.json periodically, in a thread of its own: a hanging file system must not stop the watchdog.

    Args:
        folder: of the run's rank files.
        rank: this process.
        world_size: number of processes.
        place: host and process.
        period_s: seconds between two writes.

    Attributes:
        step_seconds: of the last steps: this rank's own work, and the whole step.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, place: str, period_s: float = PERIOD_S) -> None:
        self.path, self.period_s = folder / f"{rank}.json", min(PERIOD_S, period_s)
        self._fixed = {"world_size": world_size, "place": place, "start": os.environ.get("INFINI_TRAIN_START", "")}
        self.step_seconds: deque[tuple[float, float]] = deque(maxlen=STEPS)
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, read: Callable[[], tuple[int, str]]) -> None:
        """Begins to write; `read` gives the number of operations begun, and the name of the last one."""
        self._thread = threading.Thread(target=self._write_periodically, args=(read,), name="rank status", daemon=True)
        self._thread.start()

    def close(self, wait_s: float) -> None:
        """Stops writing; a hanging file system is waited for no longer than this."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(wait_s)

    def _write_periodically(self, read: Callable[[], tuple[int, str]]) -> None:
        known, since = -1, time.monotonic()
        while True:
            count, operation = read()
            if count != known:
                known, since = count, time.monotonic()
            with contextlib.suppress(OSError):  # whoever needs the disk reports that it is full
                self._write(
                    {**self._fixed, **self._median_step(), "operation": operation, "for_s": time.monotonic() - since}
                )
            if self._end.wait(self.period_s):
                return

    def _median_step(self) -> dict[str, float]:
        steps = list(self.step_seconds)
        if not steps:
            return {}
        own_s, step_s = (statistics.median(column) for column in zip(*steps, strict=True))
        return {"own_s": own_s, "step_s": step_s}

    def _write(self, values: dict[str, object]) -> None:
        make_private(self.path.parent)
        write_atomic(self.path, json.dumps(values), durable=False)
