"""`infini-launch local`: runs a job on this machine, without Slurm. Same environment, same retries.

The rules of retrying are those of `fail` in slurm/templates/train.sbatch.j2: change both.
"""

import contextlib
import logging
import os
import sys
import time
from pathlib import Path

from infini_train import exit_codes
from infini_train.launcher import Ranks, rank_command
from infini_train.regular_files import read_regular
from launch.cluster import RestartConfig
from launch.console import waiting
from launch.job import Job

logger = logging.getLogger(__name__)
MAX_WAIT_S = 600
FINAL = (exit_codes.DONE, exit_codes.DIVERGED, *exit_codes.STOPPED)  # after these a retry is of no use


def run_locally(job: Job, nproc: int, restart: RestartConfig) -> int:
    """Trains in `nproc` processes, retrying after failures as the batch script does; returns the exit code."""
    arguments = ["train", job.config, *(f"--set={each}" for each in job.settings)]
    retries, newest = 0, newest_checkpoint(Path(job.run_dir))
    for start in range(sys.maxsize):
        environment = {**job.exports, **os.environ, "INFINI_TRAIN_RESTARTS": str(start)}
        with Ranks(nproc, rank_command(arguments), environment) as ranks:
            code = ranks.wait()
        if code in FINAL or ranks.was_asked_to_stop or (code == exit_codes.MISTAKE and start == 0):
            return code
        before, newest = newest, newest_checkpoint(Path(job.run_dir))
        retries = retries + 1 if newest == before else 1
        if retries > restart.max_retries:
            logger.error("given up after %d retries without a new checkpoint", restart.max_retries)
            return code
        wait_s = min(restart.backoff_s * 2 ** (retries - 1), MAX_WAIT_S)
        logger.info("exit code %d; retry %d of %d in %d s", code, retries, restart.max_retries, wait_s)
        with waiting(f"retry {retries} of {restart.max_retries} in {wait_s} s"):
            time.sleep(wait_s)
    raise AssertionError("endless")


def newest_checkpoint(run_dir: Path) -> str:
    """Name of the checkpoint saved last; empty without any. A damaged one with a higher number may still be there."""
    with contextlib.suppress(OSError):
        return read_regular(run_dir / "checkpoints" / "latest", 4096).decode("utf-8", "replace").strip()
    return max((path.name for path in (run_dir / "checkpoints").glob("step-*")), default="")
