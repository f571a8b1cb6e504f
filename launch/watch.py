"""The commands that look at runs: status, logs, cancel. Without torch and pydantic, they start at once."""

import argparse
import functools
import json
import logging
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from infini_train.config.errors import ConfigError
from launch import folder, slurm, status
from launch.console import waiting

logger = logging.getLogger(__name__)
POLL_S = 0.5  # how often a log that is followed is looked at
ASK_SLURM_EVERY_S = 10  # whether its job is still in the queue


def show_status(options: argparse.Namespace) -> int:
    """`infini-launch status`."""
    with waiting(f"reading the runs below {options.folder}"):
        runs = folder.find_runs(options.folder)
        jobs = {number for run in runs if (number := folder.read_job(run)) is not None}
    queue: Mapping[int, slurm.QueuedJob] | None = {}
    ended: Mapping[int, slurm.EndedJob] = {}
    try:
        queue = slurm.queue() if jobs else {}
        ended = slurm.accounts(sorted(jobs - queue.keys()))
    except ConfigError as error:  # the controller is down: a table of what the folders say is still useful
        logger.warning("%s; this is what the runs' folders say", error)
        queue = None
    rows = status.describe_runs(runs, queue, ended)
    if options.json:
        print("".join(json.dumps(row) + "\n" for row in rows), end="")
    elif rows:
        print(status.format_table(rows), end="")
    else:
        print(f"no runs below {options.folder}")
    return 0


def show_logs(options: argparse.Namespace) -> int:
    """`infini-launch logs`."""
    if not options.run.is_dir():
        raise ConfigError(f"{options.run}: there is no such folder; give the folder of a run that was submitted")
    if folder.newest_logs(options.run) is None and (not options.follow or folder.read_job(options.run) is None):
        raise ConfigError(f"{options.run}: no job of it has started yet; see infini-launch status")
    shown: Path | None = None
    while True:
        path = _find_log(options.run, options.rank, shown) if not options.follow else _await_log(options, shown)
        if path is not None:
            shown = path
            _print_log(path, options.run, options.follow)
        if not options.follow:
            return 0
        if _is_over(options.run):
            print(folder.last_words(options.run), end="", file=sys.stderr)
            return 0


def _find_log(run_dir: Path, rank: int, shown: Path | None) -> Path | None:
    """The log of the newest start, unless it is the one that was shown."""
    logs = folder.newest_logs(run_dir)
    path = logs / f"train-{rank}.log" if logs else None
    return path if path is not None and path != shown and path.is_file() else None


def _await_log(options: argparse.Namespace, shown: Path | None) -> Path | None:
    """Waits for a log that was not shown yet; None: the run is over without one."""
    with waiting(_describe_wait(options.run)) as line:
        while (path := _find_log(options.run, options.rank, shown)) is None:
            if _is_over(options.run):
                return None
            line.text = _describe_wait(options.run)
            time.sleep(POLL_S)
    return path


def _describe_wait(run_dir: Path) -> str:
    """What keeps a run from training: its place in the queue, or the checks before training."""
    number = folder.read_job(run_dir)
    if number is None:
        return f"{run_dir}: no job was submitted yet"
    job = _find_queued(number, _moment())
    if job is not None and not job.is_running:
        return f"job {number} is {job.state.lower()} {job.reason}"
    logs = folder.newest_logs(run_dir)
    checking = logs is not None and any(logs.glob("preflight-*.log"))
    return f"job {number}: " + ("preflight checks its nodes" if checking else "starting")


def _print_log(path: Path, run_dir: Path, follow: bool) -> None:
    """Prints a log; with `follow` as it grows, until a newer start has one or the run is over."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        while True:
            over = not follow or folder.newest_logs(run_dir) != path.parent or _is_over(run_dir)
            while text := stream.read(1 << 16):
                print(text, end="", flush=True)
            if over:
                return
            time.sleep(POLL_S)


def _is_over(run_dir: Path) -> bool:
    """Whether the run is finished, or its job has left the queue for good; either way its logs are whole.

    A running job is not over: Slurm brings its output to the logs some time after training has set its state.
    """
    number = folder.read_job(run_dir)
    job = _find_queued(number, _moment()) if number is not None else None
    if folder.read_status(run_dir).get("state") == "finished":
        return job is None or not job.is_running
    return number is not None and job is None


def _moment() -> int:
    """The same number for as long as Slurm's last answer is used."""
    return round(time.monotonic() / ASK_SLURM_EVERY_S)


@functools.lru_cache(maxsize=1)
def _find_queued(number: int, moment: int) -> slurm.QueuedJob | None:
    try:
        return slurm.queue().get(number)
    except ConfigError:  # a controller that is down for a while ends no job
        return slurm.QueuedJob(number, "UNKNOWN", "", 0, "(Slurm does not answer)")


def cancel(options: argparse.Namespace) -> int:
    """`infini-launch cancel`."""
    number = folder.read_job(options.run)
    job = slurm.queue().get(number) if number is not None else None
    if job is None:
        raise ConfigError(f"{options.run}: no job of it is in the queue")
    if options.now or not job.is_running:
        slurm.end(job.id)
        print(f"job {job.id} is cancelled")
    else:
        slurm.end_gently(job.id)
        print(f"job {job.id} saves and ends; see: infini-launch logs {shlex.quote(str(options.run))} -f")
    return 0
