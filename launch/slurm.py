"""The commands of Slurm, as functions. Values go as arguments of a process, never through a shell."""

import logging
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from infini_train.config.errors import ConfigError
from launch.console import waiting

logger = logging.getLogger(__name__)
TIMEOUT_S = 60
JOB_ID = re.compile(r"([0-9]{1,18})(?:;.*)?")  # with the cluster's name after it where there are several
OVERRIDING = re.compile(
    "SLURM_RESTART_COUNT|(SQUEUE|SACCT|SCANCEL)_.*"
    "|SBATCH_(JOB_NAME|TIMELIMIT|SIGNAL|REQUEUE|NO_REQUEUE|OPEN_MODE|ARRAY_INX)"
)


class QueuedJob(NamedTuple):
    """A job as squeue shows it."""

    id: int
    state: str
    elapsed: str
    nodes: int  # 0: unknown
    reason: str  # or its nodes
    name: str = ""

    @property
    def is_running(self) -> bool:
        """Includes SIGNALING: running, with a signal still on its way to a node."""
        return self.state in ("RUNNING", "SIGNALING")


class EndedJob(NamedTuple):
    """The last start of a job as Slurm's accounting has it."""

    id: int
    state: str  # COMPLETED, FAILED, NODE_FAIL, OUT_OF_MEMORY, TIMEOUT, CANCELLED by 1000, ...
    exit_code: str  # code:signal of the batch script
    elapsed: str
    nodes: str

    def describe(self) -> str:
        """The end of the job in one line."""
        return f"Slurm: {self.state}, exit code {self.exit_code}, after {self.elapsed} on {self.nodes}"


def require(program: str) -> None:
    """Checks, before anything is written, that a program of Slurm is here.

    Raises:
        ConfigError: it is not.
    """
    if shutil.which(program) is None:
        raise ConfigError(f"{program}: not found; run this on a login node of a Slurm cluster")


def submit(script: Path, options: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> int:
    """Submits a script with further options; returns the job's ID.

    Args:
        script: its file.
        options: of sbatch, which go before those in the script.
        environment: variables for the job, besides those of this process.

    Raises:
        ConfigError: Slurm refuses it, or sbatch says something else than an ID.
    """
    said = _run("sbatch", "--parsable", *options, str(script), environment=environment)
    numbers = [int(found[1]) for line in said.splitlines() if (found := JOB_ID.fullmatch(line.strip()))]
    if not numbers:
        raise ConfigError(f"sbatch: printed {_last_line(said)[:200]!r} instead of a job's ID; see squeue --me")
    return numbers[-1]


def check(script: Path, options: Sequence[str] = ()) -> str:
    """Asks Slurm whether it would take the script, and when it would run.

    Raises:
        ConfigError: it would not.
    """
    done = _call("sbatch", "--test-only", *options, str(script))
    text = done.stderr.strip() or done.stdout.strip()
    if done.returncode:
        raise ConfigError(f"sbatch refuses {script}: {_last_line(text)}")
    return _last_line(text)


def queue() -> dict[int, QueuedJob]:
    """The user's pending, running and completing jobs; empty where there is no Slurm."""
    if shutil.which("squeue") is None:
        return {}
    lines = _run("squeue", "--me", "--noheader", "--format=%A|%T|%M|%D|%R|%j").splitlines()
    rows = [line.split("|", 5) for line in lines]
    return {
        int(row[0]): QueuedJob(int(row[0]), row[1], row[2], int(row[3]) if row[3].isdecimal() else 0, *row[4:])
        for row in rows
        if len(row) >= 5 and row[0].isdecimal()
    }


def accounts(jobs: Iterable[int]) -> dict[int, EndedJob]:
    """What Slurm's accounting has on these jobs; empty where there is no accounting, or no Slurm."""
    wanted = ",".join(map(str, jobs))
    if not wanted or shutil.which("sacct") is None:
        return {}
    fields = "--format=JobIDRaw,State,ExitCode,Elapsed,NodeList"
    done = _call("sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={wanted}", fields)
    if done.returncode:  # "Slurm accounting storage is disabled", or slurmdbd is down: the table goes without it
        return {}
    rows = [line.split("|", 4) for line in done.stdout.splitlines()]
    return {int(row[0]): EndedJob(int(row[0]), *row[1:]) for row in rows if len(row) == 5 and row[0].isdecimal()}


def end_gently(job: int) -> None:
    """Asks the batch script to have the ranks save, and then to end."""
    _run("scancel", "--batch", "--signal=USR2", str(job))


def end(job: int) -> None:
    """Ends a job without saving."""
    _run("scancel", str(job))


def _run(*command: str, environment: Mapping[str, str] | None = None) -> str:
    done = _call(*command, environment=environment)
    if done.returncode:
        raise ConfigError(f"{command[0]}: {_last_line(done.stderr) or f'exit code {done.returncode}'}")
    return done.stdout


def _call(*command: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    logger.debug("%s", shlex.join(command))
    try:
        with waiting(f"waiting for {command[0]}"):
            return subprocess.run(
                command,
                env=_clean_environment() | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=TIMEOUT_S,
                check=False,
            )
    except FileNotFoundError as error:
        raise ConfigError(f"{command[0]}: not found; run this on a login node of a Slurm cluster") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{command[0]}: did not answer within {TIMEOUT_S} s; is Slurm up?") from error
    except OSError as error:
        raise ConfigError(f"{command[0]}: can't be run: {error.strerror}") from error


def _clean_environment() -> dict[str, str]:
    """This process's variables without those that change what is asked of Slurm, or what a script says of itself.

    A job that submits another one has a restart count, which the new job's script would take for its own.
    """
    return {name: value for name, value in os.environ.items() if not OVERRIDING.fullmatch(name)}


def _last_line(text: str) -> str:
    """The last line that says something, fit for a terminal."""
    lines = text.strip().splitlines()
    return "".join(each if each.isprintable() else " " for each in lines[-1][:500]) if lines else ""
