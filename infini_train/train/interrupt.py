"""Ctrl-C and SIGTERM as a request to stop after the running step."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self


class StopRequest:
    """Inside the context, SIGINT and SIGTERM only set `received`; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None  # the signal's name
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
