"""Ctrl-C while a program starts: imports take seconds, and a traceback through them says nothing. Imports little."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from infini_train import exit_codes


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Inside, Ctrl-C ends the process at once with one line and exit code 130: nothing was begun that needs an end.

    A Ctrl-C that is ignored, or handled by somebody else already, stays so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    try:
        signal.signal(signal.SIGINT, _end)
    except ValueError:  # only the main thread may, and only there would Ctrl-C be raised
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_at_the_next() -> None:
    """After a Ctrl-C that was reported: another ends the process without what Python would say of its own end."""
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    if not _is_worker():  # the group's first process speaks for all
        with contextlib.suppress(OSError):
            os.write(2, b"error: interrupted\n")
    os._exit(exit_codes.INTERRUPTED)


def _is_worker() -> bool:
    """Whether `multiprocessing` started this process."""
    module = sys.modules.get("multiprocessing.process")
    return module is not None and module.parent_process() is not None
