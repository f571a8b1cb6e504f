"""What the starter's environment variables say about this process. Imports no torch."""

import os

from infini_train.config.errors import ConfigError, require

STORE_FD, BOARD_FD = "INFINI_TRAIN_STORE_FD", "INFINI_TRAIN_BOARD_FD"  # files that ranks of --nproc inherit
MAX_NUMBER = 10_000_000  # more processes than any machine has; a longer number is a mistake


def world() -> tuple[int, int]:
    """(rank, world size) among the processes started together by torchrun, by --nproc, or as tasks of srun.

    Raises:
        ConfigError: a variable is not such a number, is missing, or contradicts another.
    """
    if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:  # a batch script itself is no task
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
        rank, size = read_number(names[0]), read_number(names[1])
    else:
        names = ("RANK", "WORLD_SIZE")
        rank, size = read_number(names[0], 0), read_number(names[1], 1)
    require(size > 0, names[1], "is 0, but there is at least this process")
    require(rank < size, names[0], f"is {rank}, but ranks are counted from 0 to {size - 1}: {names[1]} is {size}")
    local_size = read_number("LOCAL_WORLD_SIZE", size)
    require(0 < local_size <= size, "LOCAL_WORLD_SIZE", f"is {local_size}, but {names[1]} is {size}")
    local_rank = read_number("LOCAL_RANK", 0)
    if "LOCAL_WORLD_SIZE" in os.environ:
        require(local_rank < local_size, "LOCAL_RANK", f"is {local_rank}, but LOCAL_WORLD_SIZE is {local_size}")
    return rank, size


def require_rank() -> None:
    """Whether each of several processes knows which it is; one that starts them, or trains nothing, need not.

    Raises:
        ConfigError: it doesn't.
    """
    _, size = world()
    known = size == 1 or "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ
    require(known, "RANK", f"is not set, but WORLD_SIZE is {size}; set both or neither")


def restarts() -> int:
    """How often the starter has started this run before."""
    return read_number("INFINI_TRAIN_RESTARTS", 0)


def read_number(name: str, missing: int | None = None) -> int:
    """A variable that holds a number of 0 or more; `missing` if it is not set.

    Raises:
        ConfigError: it holds something else, or is not set and there is no value for that.
    """
    text = os.environ.get(name)
    if text is None:
        if missing is None:
            raise ConfigError(f"{name}: is not set; whatever starts several processes sets it")
        return missing
    if not (text.isascii() and text.isdecimal() and len(text) <= 20 and int(text) <= MAX_NUMBER):
        raise ConfigError(
            f"{name}: this environment variable is {text[:40]!a}, not a whole number of 0 or more; correct it"
        )
    return int(text)
