"""What infini-launch says besides its results, on standard error: log lines, and a line while it waits."""

import logging

from infini_train import logs
from infini_train.command_line import Spinner
from infini_train.redaction import redact_message

WAIT_IS_SHOWN_AFTER_S = 2.0
INTERVAL_S = 0.25


class _Formatter(logging.Formatter):
    """Warnings and errors begin with their level."""

    def format(self, record: logging.LogRecord) -> str:
        text = redact_message(super().format(record))
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def configure(level: int) -> None:
    """Sends all log lines from this level on to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger(logs.ROOT).setLevel(level)  # what `is_quiet` asks


def waiting(text: str) -> Spinner:
    """A context that shows on a terminal what is waited for, once it takes long; assign to its `text` to change it."""
    return Spinner(text, WAIT_IS_SHOWN_AFTER_S, INTERVAL_S)
