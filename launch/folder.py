"""The folder launch/ of a run: what was submitted, and what became of it. Imports little, as `status` must be fast.

Written by submit and chain:

train.sbatch, run.yaml   the script and the config that were submitted
revision.txt             git revision of the code, and uncommitted changes
environment.txt          environment at submission, without variables whose names look secret
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
"""

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infini_train.atomic_files import write_atomic

LAST_LINES = 3
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)


def prepare(run_dir: Path, files: Mapping[str, str], code: Path) -> Path:
    """Writes the launch folder of a new submission: the files, the code's revision, the environment."""
    folder = run_dir / "launch"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomic(folder / name, text)
    write_atomic(folder / "revision.txt", describe_revision(code))
    shown = (f"{name}={value}\n" for name, value in sorted(os.environ.items()) if not SECRET.search(name))
    write_atomic(folder / "environment.txt", "".join(shown))
    for name in ("bad_nodes", "retries", "last_failure"):  # of an earlier job
        (folder / name).unlink(missing_ok=True)
    return folder


def describe_revision(code: Path) -> str:
    """The commit and the uncommitted changes of a checkout; "not a git checkout" for any other folder."""
    try:
        commit = _git(code, "rev-parse", "HEAD")
        return f"{commit}\n{_git(code, 'status', '--short')}\n{_git(code, 'diff', 'HEAD')}\n"
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout\n"


def _git(code: Path, *arguments: str) -> str:
    command = ["git", "-C", str(code), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=True, timeout=30
    ).stdout.strip()


def read_job(run_dir: Path) -> int | None:
    """ID of the run's newest job."""
    with contextlib.suppress(OSError, ValueError):
        return int((run_dir / "launch" / "job").read_text())
    return None


def note_submitted(run_dir: Path, number: int, first: bool) -> None:
    """Records a submitted job; `first`: of its submission."""
    known, folder = [] if first else read_submitted(run_dir), run_dir / "launch"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "submitted", "".join(f"{each}\n" for each in [*known, number]))
    if first:
        write_atomic(folder / "job", f"{number}\n")


def read_submitted(run_dir: Path) -> list[int]:
    """IDs of the jobs of the newest submission, and of one submitted by hand since."""
    newest = read_job(run_dir)
    found = set() if newest is None else {newest}
    with contextlib.suppress(OSError, ValueError):
        found |= {int(line) for line in (run_dir / "launch" / "submitted").read_text().split()}
    return sorted(found)


def last_words(run_dir: Path) -> str:
    """The last lines of the batch script's log; empty without any."""
    with contextlib.suppress(OSError):
        lines = (run_dir / "launch" / "job.log").read_text(encoding="utf-8", errors="replace").splitlines(True)
        return "".join(lines[-LAST_LINES:])
    return ""


def read_status(run_dir: Path) -> dict[str, Any]:
    """The last status that training wrote; empty before the first."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def read_failure(run_dir: Path) -> str:
    """The last failure that the batch script recorded; empty without one."""
    with contextlib.suppress(OSError):
        return (run_dir / "launch" / "last_failure").read_text(encoding="utf-8", errors="replace").strip()
    return ""


def find_runs(root: Path) -> list[Path]:
    """Folders of runs directly below a folder, and the folder itself if it is one."""
    candidates = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if root.is_dir() else []
    return [path for path in candidates if (path / "status.json").is_file() or (path / "launch").is_dir()]


def newest_logs(run_dir: Path) -> Path | None:
    """The log folder of the newest start."""
    folders = [path for path in (run_dir / "launch" / "logs").glob("*.*") if path.is_dir()]
    return max(folders, key=lambda path: tuple(int(part) for part in path.name.split(".")), default=None)


def read_fence(run_dir: Path) -> str:
    """The newest start of the run's job, as JOB.START; empty without one."""
    with contextlib.suppress(OSError):
        return (run_dir / "launch" / "fence").read_text(encoding="utf-8").strip()
    return ""


def heartbeat_age_s(status: Mapping[str, Any]) -> float | None:
    """Seconds since training last reported."""
    beat = status.get("heartbeat")
    return max(0.0, time.time() - beat) if isinstance(beat, int | float) else None  # clocks differ
