"""Process groups of torch.distributed and megatron-core. One process is world size 1 of the same groups."""

import os

import torch.distributed as dist
from megatron.core import parallel_state

from infini_train.config import ConfigError
from infini_train.parallel import device


def start() -> None:
    """Joins the process groups; safe to call twice.

    Raises:
        ConfigError: started with more than one process, which this version can't use yet.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != 1:
        raise ConfigError(f"WORLD_SIZE: {world_size} processes were started, but this version trains on one; start one")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    device.set_current()
    if not dist.is_initialized():
        # An in-memory store: no port is opened, so any number of single-process runs live side by side.
        dist.init_process_group(device.backend(), store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()


def stop() -> None:
    """Leaves the process groups."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
