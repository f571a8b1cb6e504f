"""Where log records of infini-train go: the console of one of several ranks. Imports no torch.

Modules log through `logging.getLogger(__name__)`; nothing is shown until a command opens the `console`. Results
(tables, JSON, generated text) are not logged: commands print them to standard output.

    DEBUG    --verbose only, from every rank, with time and rank: what a rank does, operation by operation
    INFO     progress and notes. The same on all ranks, so rank 0 alone shows them; not with --quiet
    WARNING  from every rank; messages are shown as they are, so one begins with "warning: "

Training's notes and warnings are the log of the run, one stream in one order: rank 0's standard output. Other warnings,
and errors, go to standard error.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from tqdm import tqdm

from infini_train.redaction import redact_urls

ROOT = "infini_train"
RUN = f"{ROOT}.train"


class RankFormatter(logging.Formatter):
    """Messages without secrets of URLs; under --verbose after the time and the rank."""

    def __init__(self, rank: int, verbose: bool) -> None:
        super().__init__(f"%(asctime)s rank {rank}: %(message)s" if verbose else "%(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return redact_urls(super().format(record))


class ConsoleHandler(logging.Handler):
    """Writes records above or below a progress bar; a reader that has gone away does not stop a training run.

    Args:
        rank: of this process among those that were started together.
        notes_to_stderr: keep standard output for the result, as with --json.
    """

    def __init__(self, rank: int, notes_to_stderr: bool = False) -> None:
        super().__init__()
        self._rank, self._notes_to_stderr = rank, notes_to_stderr

    def choose_stream(self, record: logging.LogRecord) -> TextIO | None:
        """Where this rank shows a record; None: nowhere."""
        of_run = record.name.startswith(RUN) and record.levelno < logging.ERROR
        if self._rank != 0 and record.levelno > logging.DEBUG and (of_run or record.levelno < logging.WARNING):
            return None
        if self._notes_to_stderr or (record.levelno >= logging.WARNING and not of_run):
            return sys.stderr
        return sys.stdout

    def emit(self, record: logging.LogRecord) -> None:
        """Shows the record; a closed pipe or terminal is replaced by /dev/null."""
        stream = self.choose_stream(record)
        if stream is None:
            return
        try:
            with tqdm.external_write_mode(file=stream):
                stream.write(self.format(record) + "\n")
                stream.flush()
        except OSError as error:
            if isinstance(error, BrokenPipeError) and not record.name.startswith(RUN):
                raise  # `infini-train eval ... | head` ends when its reader leaves
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def console(
    rank: int = 0, *, quiet: bool = False, verbose: bool = False, notes_to_stderr: bool = False
) -> Iterator[None]:
    """Inside, this process shows its log.

    Args:
        rank: of this process.
        quiet: warnings and errors only, without progress bars.
        verbose: debug records too, and time and rank before each line.
        notes_to_stderr: see `ConsoleHandler`.
    """
    logger, handler = logging.getLogger(ROOT), ConsoleHandler(rank, notes_to_stderr)
    handler.setFormatter(RankFormatter(rank, verbose))
    before = logger.level, logger.propagate
    logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False  # a library that configures the root logger would show each line twice
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def is_quiet() -> bool:
    """Whether progress bars should stay away."""
    return logging.getLogger(ROOT).level > logging.INFO


def progress_bar(**options: Any) -> "tqdm[Any]":
    """A bar on standard error that leaves no trace: on a terminal, without --quiet. `options` are tqdm's."""
    hidden = options.pop("disable", False) or is_quiet() or None  # None: unless it is a terminal
    return tqdm(leave=False, dynamic_ncols=True, disable=hidden, **options)
