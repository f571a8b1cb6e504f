"""Process groups of torch.distributed and megatron-core, and this rank's place in them.

One process is world size 1 of the same groups. Ranks are ordered tensor, context, data, pipeline (megatron-core's
order): ranks that communicate most are adjacent, so tensor-parallel ranks share a node.
"""

import os
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from infini_train.config.errors import ConfigError
from infini_train.config.parallel import ParallelConfig
from infini_train.environment import read_number, require_rank, world
from infini_train.parallel import device, meeting

BACKGROUND_TIMEOUT = timedelta(hours=4)  # the slowest rank's files of a checkpoint
_background: dist.ProcessGroup | None = None


class Place(NamedTuple):
    """This process's (rank, size) in the world and along each parallel dimension."""

    world: tuple[int, int] = (0, 1)
    tensor: tuple[int, int] = (0, 1)
    pipeline: tuple[int, int] = (0, 1)
    context: tuple[int, int] = (0, 1)
    data: tuple[int, int] = (0, 1)

    @property
    def is_first(self) -> bool:
        """Whether this process logs and writes for the run."""
        return self.world[0] == 0

    @property
    def is_replica(self) -> bool:
        """Whether a lower rank holds the same weights (ZeRO aside) for other tokens."""
        return self.context[0] > 0 or self.data[0] > 0

    def describe(self) -> str:
        """For example: rank 3 (tensor 1 of 2, pipeline 1 of 2)."""
        ways = ("tensor", "pipeline", "context", "data")
        parts = [
            f"{way} {getattr(self, way)[0]} of {getattr(self, way)[1]}" for way in ways if getattr(self, way)[1] > 1
        ]
        return f"rank {self.world[0]}" + (f" ({', '.join(parts)})" if parts else "")


def complete_environment() -> None:
    """Sets torchrun's variables, which torch and DeepSpeed read, for tasks of srun.

    Raises:
        ConfigError: there are several tasks, but no rendezvous address, or a variable holds nonsense.
    """
    rank, size = world()
    require_rank()
    if size > 1 and not meeting.is_inherited():
        meeting.choose_interface()
    if size > 1 and "RANK" not in os.environ:
        local_rank = read_number("SLURM_LOCALID")
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it


def start(parallel: ParallelConfig | None = None) -> Place:
    """Joins the process groups; safe to call again, also with another layout of the same processes.

    Args:
        parallel: sizes that multiply to the world size (`config.divide_processes`); None: one process.

    Raises:
        ConfigError: several processes were started for a layout of one.
    """
    parallel = parallel or ParallelConfig()
    rank, size = world()
    if parallel.model_size * (parallel.data_size or 1) != size:
        raise ConfigError(f"WORLD_SIZE: {size} processes were started for what one process does; start one")
    connect(parallel.timeout_s)
    stop_layout()
    _join_layout(parallel)
    return place()


def connect(timeout_s: float) -> None:
    """Connects the processes, still without a layout. Call it before anything slow: rank 0 may host their store.

    Raises:
        ConfigError: several processes have no rendezvous address, or more were started here than there are GPUs.
        MeetingError: the processes can't meet at that address.
    """
    complete_environment()
    device.set_current()
    device.stand_in_for_cuda()
    if dist.is_initialized():
        return
    timeout = timedelta(seconds=2 * timeout_s)  # the watchdog fires first, and reports more
    if world()[1] == 1:  # an in-memory store: no port is opened, so any number of such runs live side by side
        dist.init_process_group(device.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    store = dist.PrefixStore(meeting.prefix(), meeting.open_store(2 * timeout_s))
    dist.init_process_group(device.backend(), store=store, rank=world()[0], world_size=world()[1], timeout=timeout)
    global _background
    _background = dist.new_group(backend="gloo", timeout=BACKGROUND_TIMEOUT)


def pretend(parallel: ParallelConfig, rank: int, world_size: int) -> Place:
    """The place of a rank among processes that don't exist, to build its part of a model on the meta device.

    Leaves this process's current groups and joins fake ones of torch, whose collectives return at once.
    """
    device.stand_in_for_cuda()
    stop()
    dist.init_process_group("fake", rank=rank, world_size=world_size)
    _join_layout(parallel)
    return place()


def _join_layout(parallel: ParallelConfig) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_size,
        pipeline_model_parallel_size=parallel.pipeline_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_stages if parallel.virtual_stages > 1 else None,
        context_parallel_size=parallel.context_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=parallel.timeout_s / 30,  # becomes a timedelta, so fractions are fine
    )


def place() -> Place:
    """This process's place in the current groups."""
    state = parallel_state
    return Place(
        world=(dist.get_rank(), dist.get_world_size()),
        tensor=(state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size()),
        pipeline=(state.get_pipeline_model_parallel_rank(), state.get_pipeline_model_parallel_world_size()),
        context=(state.get_context_parallel_rank(), state.get_context_parallel_world_size()),
        data=(state.get_data_parallel_rank(), state.get_data_parallel_world_size()),
    )


def stop_layout() -> None:
    """Leaves megatron-core's groups; the processes stay connected."""
    if not parallel_state.model_parallel_is_initialized():
        return
    groups = parallel_state._global_process_group_list[1:]  # the first is the world
    parallel_state.destroy_model_parallel()  # only forgets them: their threads and sockets would accumulate
    for group in groups:
        dist.destroy_process_group(group)


def stop() -> None:
    """Leaves the process groups."""
    global _background
    stop_layout()
    _background = None
    if dist.is_initialized():
        dist.destroy_process_group()


def background_barrier() -> None:
    """Returns when all processes have called it. For a background thread, which must be the only user of this group."""
    if _background is not None:
        dist.barrier(_background)


def broadcast_text(text: str) -> str:
    """Rank 0's text (at most 4096 bytes of UTF-8) on all ranks; they wait as long as writing a checkpoint may take."""
    if dist.get_world_size() == 1:
        return text
    sent = torch.zeros(4096, dtype=torch.uint8)
    if dist.get_rank() == 0:
        data = text.encode()
        sent[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    dist.broadcast(sent, 0, _background)
    return bytes(sent.tolist()).rstrip(b"\0").decode()


def sum_over_world(values: list[float]) -> list[float]:
    """Sums over all processes, elementwise in fp64."""
    if dist.get_world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device.current())
    dist.all_reduce(total)
    return total.tolist()


def max_over_world(value: float) -> float:
    """The maximum over all processes."""
    if dist.get_world_size() == 1:
        return value
    largest = torch.tensor(value, dtype=torch.float64, device=device.current())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


class ModelParallelUnit:
    """megatron-core's groups in the form of DeepSpeed's `mpu` argument; its data group is data x context."""

    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)

    @staticmethod
    def get_model_parallel_world_size() -> int:
        return dist.get_world_size(parallel_state.get_model_parallel_group())

    @staticmethod
    def get_model_parallel_rank() -> int:
        return dist.get_rank(parallel_state.get_model_parallel_group())

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_world_size() -> int:
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_rank() -> int:
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        return dist.get_process_group_ranks(parallel_state.get_data_parallel_group(with_context_parallel=True))
