"""What a rank is doing, in a small file that others can read without it: see `launch/ranks.py`."""

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

PERIOD_S = 10.0
STEPS = 16  # that a rank's pace is the median of


class Diary:
    """Writes FOLDER/RANK.json now and then, in a thread of its own: a file system that hangs must not stop the watch.

    Args:
        folder: of the run's ranks.
        rank: this process.
        world_size: number of processes.
        place: host and process.
        period_s: between two writings.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, place: str, period_s: float = PERIOD_S) -> None:
        self.path, self.period_s = folder / f"{rank}.json", min(PERIOD_S, period_s)
        self._fixed = {"world_size": world_size, "place": place, "start": os.environ.get("INFINI_TRAIN_START", "")}
        self.pace: deque[tuple[float, float]] = deque(maxlen=STEPS)  # seconds of a step: this rank's own, and all
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, look: Callable[[], tuple[int, str]]) -> None:
        """`look` gives the number of operations begun, and the name of the last one."""
        self._thread = threading.Thread(target=self._write_on, args=(look,), name="rank's diary", daemon=True)
        self._thread.start()

    def close(self, wait_s: float) -> None:
        """No file is written from here on, unless the file system hangs."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(wait_s)

    def _write_on(self, look: Callable[[], tuple[int, str]]) -> None:
        known, since = -1, time.monotonic()
        while True:
            count, operation = look()
            if count != known:
                known, since = count, time.monotonic()
            with contextlib.suppress(OSError):  # a full disk is told by who needs it
                self._write(
                    {**self._fixed, **self._describe_pace(), "operation": operation, "for_s": time.monotonic() - since}
                )
            if self._end.wait(self.period_s):
                return

    def _describe_pace(self) -> dict[str, float]:
        steps = list(self.pace)
        if not steps:
            return {}
        own_s, step_s = (statistics.median(column) for column in zip(*steps, strict=True))
        return {"own_s": own_s, "step_s": step_s}

    def _write(self, values: dict[str, object]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(values), durable=False)
