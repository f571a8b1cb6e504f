"""What the starter's environment variables say about this process. Imports no torch."""

import os


def world() -> tuple[int, int]:
    """(rank, world size) among the processes started together by torchrun, by --nproc, or as tasks of srun."""
    if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:  # a batch script itself is no task
        return int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
