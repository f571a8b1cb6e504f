"""status.json: where a run stands; findings.jsonl: its bad steps.

status.json is one object, replaced whole by rank 0 at every report:

    state                what the run does or how it ended: training, finished, failed, diverged, stopped by SIGNAL
    name, step, total_steps, restarts, heartbeat (when it was written, in seconds since 1970), host (of rank 0)
    loss, tokens_per_s, eta_s, skipped_steps    of the last report; missing before the first

launch/folder.py reads it, for launch/status.py and launch/watch.py.
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infini_train.atomic_files import write_atomic
from infini_train.config.errors import ConfigError
from infini_train.environment import restarts
from infini_train.regular_files import read_regular
from infini_train.train.guards import DivergedError
from infini_train.train.run_folder import check_fence
from infini_train.train.session import Session
from infini_train.train.side_files import Lines

FILE = "status.json"
MAX_BYTES = 2**20


def write_status(session: Session, values: dict[str, float], eta_s: float) -> None:
    """Rank 0: writes the numbers of a report, after checking the fence.

    Raises:
        ConfigError: a later start of the job has taken over the run's folder.
    """
    check_fence(session.config.directory, session.place.is_first)
    total = session.config.train.total_steps
    _write(
        session,
        {
            "state": "training" if session.step < total else "finished",
            "loss": values.get("loss/train"),
            "tokens_per_s": values["speed/tokens_per_s"],
            "eta_s": eta_s,
            "skipped_steps": session.guard.skipped,
        },
    )


def append_finding(session: Session, finding: str, documents: list[str]) -> None:
    """Rank 0: adds what was wrong with the last step, and the documents it read, to findings.jsonl."""
    row = {"time": time.time(), "step": session.step, "finding": finding, "documents": documents}
    path = session.config.directory / "findings.jsonl"
    lines = Lines(path)
    with session.side_files.tolerate(path), contextlib.closing(lines):
        lines.append(json.dumps(row))


def end_status(session: Session, reason: str) -> None:
    """Rank 0: the run has ended, finished or for this reason."""
    done = session.step >= session.config.train.total_steps
    _end(session, "finished" if done else reason)


@contextlib.contextmanager
def mark_failure(session: Session) -> Iterator[None]:
    """Sets the state to "failed" if the context is left by an error, unless a later start has taken over."""
    try:
        yield
    except DivergedError:
        raise  # `end_status` has been called
    except Exception:
        with contextlib.suppress(ConfigError):
            check_fence(session.config.directory, session.place.is_first)
            _end(session, "failed")
        raise


def _end(session: Session, state: str) -> None:
    """Writes the last report again, with this state."""
    _write(session, {**_read(session.config.directory), "state": state})


def _read(directory: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_regular(directory / FILE, MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(session: Session, values: dict[str, Any]) -> None:
    """Replaces the file atomically; not durable, since after a power cut the process is gone too.

    A disk that refuses it does not end training.
    """
    if not session.place.is_first:
        return
    status = {
        **values,
        "name": session.config.name,
        "step": session.step,
        "total_steps": session.config.train.total_steps,
        "restarts": restarts(),
        "heartbeat": time.time(),
        "host": socket.gethostname(),
    }
    path = session.config.directory / FILE
    with session.side_files.tolerate(path):
        write_atomic(path, json.dumps(status), durable=False)
