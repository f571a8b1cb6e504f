"""Progress on standard error, if that is a terminal: a bar of bytes, or the time that a step has taken so far."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

_TICK_S = 0.5
_CLEAR_LINE = "\r\x1b[K"


def print_note(line: str) -> None:
    """A line that the user should know, on standard error."""
    with contextlib.suppress(OSError):  # the terminal is gone
        print(f"note: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def byte_bar(label: str, total: int | None = None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A progress bar; gives a function to call with the bytes that were read.

    Args:
        label: of the bar.
        total: bytes, if known.
        done: bytes that an earlier run has dealt with.
    """
    bar = tqdm(total=total or None, initial=done, unit="B", unit_scale=True, desc=label, disable=None)

    def advance(n_bytes: int) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone; to a reader that would look like a broken file
            bar.update(n_bytes)

    with bar:
        yield advance


@contextlib.contextmanager
def elapsed_time(label: str) -> Iterator[None]:
    """Shows how long a step has taken so far; also during calls into C++ that release Python's lock."""
    if not sys.stderr.isatty():
        yield
        return
    ended = threading.Event()

    def show() -> None:
        started = time.monotonic()
        with contextlib.suppress(OSError):  # the terminal is gone
            while not ended.wait(_TICK_S):
                print(f"{_CLEAR_LINE}{label}: {time.monotonic() - started:.0f} s", end="", file=sys.stderr, flush=True)
            print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
