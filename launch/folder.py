"""The folder launch/ of a run: what was submitted, and what became of it. Imports little, as `status` must be fast.

Written by submit and chain:

train.sbatch, run.yaml   the script and the config that were submitted
revision.txt             git revision of the code, and uncommitted changes; secrets masked
environment.txt          variables of the submission that matter to a run; secrets masked
job                      ID of the newest job (also written by each start)
submitted                IDs of all jobs of the newest submission: several for a chain

Written by the batch script, and by Slurm (slurm-JOB.out):

starts                   a line per start: time, JOB.START, nodes
fence                    the newest start, as JOB.START; an older one that sees it exits
retries                  retries since the last checkpoint: job, number, checkpoint
bad_nodes                nodes that failed preflight, one per line; requeued starts avoid them
job.log, last_failure    what the script did; the last error
slurm-JOB.out            the script's own output
logs/JOB.START/          each rank's output (train-0.log) and exit (train-0.exit: time rank node code)

Written by training:

ranks/RANK.json          what a rank is doing, every 10 s

The folder and what is written at submission are their owner's alone. Whatever is read here may be damaged, missing or
somebody else's: it counts as absent, and no file can make a command wait or fail.
"""

import contextlib
import fcntl
import json
import math
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infini_train.atomic_files import write_atomic
from infini_train.command_errors import escape
from infini_train.regular_files import make_private, open_regular, read_regular
from launch.record import describe_environment, describe_revision

LAST_LINES, LAST_BYTES = 3, 1 << 16
MAX_BYTES = 1 << 20  # of a file that this program wrote: all are small
OWN, FOR_OWNER_ALONE = 0o700, 0o600
TEXTS = ("state", "host")
NUMBERS = ("step", "total_steps", "loss", "tokens_per_s", "eta_s", "restarts", "heartbeat")  # of status.json
LOCK = ".lock"  # of infini_train/train/run_folder.py: rank 0 holds it as long as it lives
START = re.compile(r"([0-9]{1,18})\.([0-9]{1,9})")  # JOB.START


def prepare(run_dir: Path, files: Mapping[str, str], code: Path) -> Path:
    """Writes the launch folder of a new submission: the files, the code's revision, the environment."""
    folder = run_dir / "launch"
    folder.mkdir(mode=OWN, parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):  # a colleague's
        folder.chmod(OWN)
    recorded = {"revision.txt": describe_revision(code), "environment.txt": describe_environment(os.environ)}
    for name, text in {**files, **recorded}.items():
        write_atomic(folder / name, text, permissions=FOR_OWNER_ALONE)
    for name in ("bad_nodes", "retries", "last_failure"):  # of an earlier job
        (folder / name).unlink(missing_ok=True)
    return folder


def read_text(path: Path) -> str:
    """A file that this program or its batch script wrote; empty if there is none, or it is anything else."""
    with contextlib.suppress(OSError, ValueError):
        return read_regular(path, MAX_BYTES).decode("utf-8", "replace").strip()
    return ""


def read_job(run_dir: Path) -> int | None:
    """ID of the run's newest job."""
    return _job_number(read_text(run_dir / "launch" / "job"))


def _job_number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


def note_submitted(run_dir: Path, number: int, first: bool) -> None:
    """Records a submitted job; `first`: of its submission."""
    known, folder = [] if first else read_submitted(run_dir), run_dir / "launch"
    make_private(folder)
    listed = "".join(f"{each}\n" for each in [*known, number])
    write_atomic(folder / "submitted", listed, permissions=FOR_OWNER_ALONE)
    if first:
        write_atomic(folder / "job", f"{number}\n", permissions=FOR_OWNER_ALONE)


def read_submitted(run_dir: Path) -> list[int]:
    """IDs of the jobs of the newest submission, and of one submitted by hand since."""
    newest, lines = read_job(run_dir), read_text(run_dir / "launch" / "submitted").split()
    return sorted({number for number in (newest, *map(_job_number, lines)) if number is not None})


def last_words(run_dir: Path) -> str:
    """The last lines of the batch script's log; empty without any."""
    with contextlib.suppress(OSError), open_regular(run_dir / "launch" / "job.log") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - LAST_BYTES))
        return "".join(log.read().decode("utf-8", "replace").splitlines(True)[-LAST_LINES:])
    return ""


def read_status(run_dir: Path) -> dict[str, Any]:
    """The last status that training wrote; empty before the first.

    Values of a wrong type are left out. The key "problem" says in a few words that the file can't be read.
    """
    path = run_dir / "status.json"
    try:
        found = json.loads(read_regular(path, MAX_BYTES))
    except FileNotFoundError:
        return {}
    except OSError as error:
        return {"problem": f"status.json: {error.strerror or error}"}
    except (ValueError, RecursionError):
        return {"problem": "status.json: is not what training writes"}
    if not isinstance(found, dict):
        return {"problem": "status.json: is not what training writes"}
    kept = {name: found[name] for name in TEXTS if isinstance(found.get(name), str)}
    return kept | {name: found[name] for name in NUMBERS if is_number(found.get(name))}


def printable(text: str, most: int = 300) -> str:
    """One line for a terminal: no line break or control character, and not too long."""
    line = escape(text[: most + 1])
    return line if len(line) <= most else line[: most - 3] + "..."


def is_number(value: object) -> bool:
    """Whether a value read from JSON is a number that can be reckoned with and shown."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18 and math.isfinite(value)


def read_failure(run_dir: Path) -> str:
    """The last failure that the batch script recorded; empty without one."""
    return read_text(run_dir / "launch" / "last_failure")


def find_runs(root: Path) -> list[Path]:
    """Folders of runs directly below a folder, and the folder itself if it is one."""
    candidates = [root, *sorted(path for path in root.iterdir() if _is_folder(path))] if root.is_dir() else []
    return [path for path in candidates if os.path.lexists(path / "status.json") or _is_folder(path / "launch")]


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # false where a folder on the way may not be entered


def newest_logs(run_dir: Path) -> Path | None:
    """The log folder of the newest start."""
    folders: list[tuple[int, int, Path]] = []
    with contextlib.suppress(OSError):
        for path in (run_dir / "launch" / "logs").iterdir():
            if (found := START.fullmatch(path.name)) and _is_folder(path):
                folders.append((int(found[1]), int(found[2]), path))
    return max(folders)[2] if folders else None


def read_fence(run_dir: Path) -> str:
    """The newest start of the run's job, as JOB.START; empty without one."""
    return read_text(run_dir / "launch" / "fence")


def has_process(run_dir: Path, status: Mapping[str, Any]) -> bool | None:
    """Whether rank 0 of this run is alive, by its lock; None: that can't be asked here.

    A lock that another machine holds need not be seen here, so only the run's own host can say that there is none.
    """
    try:
        with open_regular(run_dir / LOCK, follow_links=False) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go at once
    except BlockingIOError:
        return True
    except OSError:  # there is none, it is somebody else's, or the file system has no locks
        return None
    return False if status.get("host") == socket.gethostname() else None


def heartbeat_age_s(status: Mapping[str, Any]) -> float | None:
    """Seconds since training last reported."""
    beat = status.get("heartbeat")
    return None if beat is None else max(0.0, time.time() - beat)  # clocks differ
