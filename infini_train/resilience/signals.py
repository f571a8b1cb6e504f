"""Ctrl-C and SIGTERM as a request to stop after the current step."""

import contextlib
import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

from infini_train.child_processes import SAVING, stop_signals
from infini_train.parallel import mesh


class Stopped(Exception):
    """A signal requested a stop; the message is its name."""


class StopRequest:
    """Inside the context, SIGINT, SIGTERM and SIGHUP only set `received`; a second SIGINT interrupts at once.

    A SIGHUP that is ignored already (nohup) stays ignored.

    Args:
        confirms: whether this process confirms a signal on the console.

    Attributes:
        received: name of the signal that reached this rank.
        agreed: name of the signal on which all ranks agree to stop.
    """

    def __init__(self, *, confirms: bool = True) -> None:
        self._confirms = confirms
        self.received: str | None = None
        self.agreed: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agree(self) -> None:
        """Sets `agreed` to a signal that reached any rank, the same on all ranks; all call it together."""
        mine = 0 if self.received is None else signal.Signals[self.received].value
        number = round(mesh.max_over_world(float(mine)))
        self.agreed = signal.Signals(number).name if number else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        if not self._confirms:
            return
        with contextlib.suppress(OSError):  # print and logging are not safe in a handler, and the terminal may be gone
            os.write(2, f"\n{self.received}: {SAVING}\n".encode())
