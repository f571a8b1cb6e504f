"""What infini-launch says besides its results, on standard error: log lines, and a line while it waits."""

import logging
import sys
import threading
import time
from types import TracebackType
from typing import Self

WAIT_IS_SHOWN_AFTER_S = 2.0
FRAMES = "|/-\\"
CLEAR_LINE = "\r\x1b[2K"


class _Formatter(logging.Formatter):
    """Warnings and errors begin with their level."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def configure(level: int) -> None:
    """Sends all log lines from this level on to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)


class Waiting:
    """A context whose text and seconds a terminal shows once it takes long; elsewhere it shows nothing.

    Args:
        text: what is waited for; assign to `text` to change it.
        after_s: how long nothing is shown.
    """

    def __init__(self, text: str, after_s: float = WAIT_IS_SHOWN_AFTER_S) -> None:
        self.text, self.after_s = text, after_s
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._thread = threading.Thread(target=self._show, name="waiting", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _show(self) -> None:
        begin, shown = time.monotonic(), 0
        wait_s = self.after_s
        while not self._done.wait(wait_s):
            seconds = time.monotonic() - begin
            sys.stderr.write(f"{CLEAR_LINE}{FRAMES[shown % len(FRAMES)]} {self.text} ({seconds:.0f} s)")
            sys.stderr.flush()
            shown, wait_s = shown + 1, 0.25
        if shown:
            sys.stderr.write(CLEAR_LINE)
            sys.stderr.flush()
