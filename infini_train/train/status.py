"""status.json: where a run stands, for whoever looks from outside; and the fence that keeps an older start out.

A job that Slurm has started again writes its number into the run's launch/fence. A copy of an earlier start that is
still alive somewhere (on a node that lost the network, say) finds another number there and ends. The lock of
`session.hold_folder` is not enough for that: some shared file systems have no locks, or hold them for one node only.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infini_train.atomic_files import write_atomic
from infini_train.config.errors import ConfigError
from infini_train.train.guards import DivergedError
from infini_train.train.session import Session


def write_status(session: Session, values: dict[str, float], eta_s: float) -> None:
    """Rank 0: the numbers of a report. Checks the fence first.

    Raises:
        ConfigError: a later start of the job has taken the run's folder over.
    """
    check_fence(session)
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
    """Rank 0: what was wrong with the step that is just over, and the documents it read, into findings.jsonl."""
    row = {"time": time.time(), "step": session.step, "finding": finding, "documents": documents}
    with (session.config.directory / "findings.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def end_status(session: Session, reason: str) -> None:
    """Rank 0: the run has ended; if it is not done, for this reason."""
    done = session.step >= session.config.train.total_steps
    _end(session, "finished" if done else reason)


@contextlib.contextmanager
def tell_failure(session: Session) -> Iterator[None]:
    """A run that ends by an error (a full disk, say) does not look as if it went on, unless a later start took over."""
    try:
        yield
    except DivergedError:
        raise  # it has said so
    except Exception:
        with contextlib.suppress(ConfigError, OSError):  # the disk may be too full for this too
            check_fence(session)
            _end(session, "failed")
        raise


def check_fence(session: Session) -> None:
    """Rank 0: whether this is still the latest start of the run's job; nothing outside of `infini-launch`'s scripts."""
    mine, path = os.environ.get("INFINI_TRAIN_START"), session.config.directory / "launch" / "fence"
    if not session.place.is_first or mine is None or not path.exists():
        return
    latest = path.read_text(encoding="utf-8").strip()
    if latest != mine:
        raise ConfigError(f"run_dir: start {latest} of the job has taken {path.parent.parent} over; this is {mine}")


def _end(session: Session, state: str) -> None:
    """The last report, with this state."""
    _write(session, {**_read(session.config.directory), "state": state})


def _read(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write(session: Session, values: dict[str, Any]) -> None:
    """Whole or not at all. No fsync: it is gone with the machine, as the process is."""
    if not session.place.is_first:
        return
    status = {
        **values,
        "name": session.config.name,
        "step": session.step,
        "total_steps": session.config.train.total_steps,
        "restarts": int(os.environ.get("INFINI_TRAIN_RESTARTS", "0")),
        "heartbeat": time.time(),
    }
    write_atomic(session.config.directory / "status.json", json.dumps(status), durable=False)
