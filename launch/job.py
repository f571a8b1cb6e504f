"""What is launched: one training run on some nodes, and the environment that its ranks need."""

import math
from dataclasses import dataclass, field

from infini_train.config.errors import ConfigError
from infini_train.config.run import RunConfig, divide_processes
from launch.cluster import ClusterConfig

MAX_THREADS = 8  # of a rank on a GPU: what is left to the CPU there gains nothing from more


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run as the batch script sees it.

    Args:
        name: of the run, and of the job.
        config: the CONFIG argument of infini-train train.
        settings: its --set arguments.
        run_dir: the run's folder.
        nodes: number of them.
        exports: variables that follow from the run's config.
    """

    name: str
    config: str
    settings: tuple[str, ...] = ()
    run_dir: str
    nodes: int
    exports: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, text in (("name", self.name), ("run_dir", self.run_dir), ("CONFIG", self.config)):
            require_line(name, text)
        for setting in self.settings:
            require_line("--set", setting)
        if self.config.startswith("-"):
            raise ConfigError(f"CONFIG: {self.config} looks like an option; write ./{self.config}")
        if self.nodes < 1:
            raise ConfigError(f"--nodes: must be positive, not {self.nodes}")


def require_line(path: str, text: str) -> None:
    """A shell's line can hold this text.

    Raises:
        ConfigError: it can't.
    """
    if not text.isprintable() or not text.strip():
        raise ConfigError(f"{path}: must be one line of printable text, not {text!r}")


def plan_job(
    run: RunConfig, cluster: ClusterConfig, config: str, settings: tuple[str, ...] = (), nodes: int | None = None
) -> Job:
    """The job of a run on a cluster.

    Args:
        run: the run's config, resolved.
        cluster: where it goes.
        config: the CONFIG argument of infini-train train.
        settings: its --set arguments.
        nodes: None: as many as parallel.data_size needs, or one.

    Raises:
        ConfigError: the processes of these nodes can't be divided as the run asks.
    """
    ranks = run.parallel.model_size * (run.parallel.data_size or 1)
    nodes = math.ceil(ranks / cluster.tasks) if nodes is None else nodes
    job = Job(
        name=run.name,
        config=config,
        settings=settings,
        run_dir=str(run.directory),
        nodes=nodes,
        exports=rank_environment(run, cluster),
    )
    try:
        divide_processes(run, nodes * cluster.tasks)
    except ConfigError as error:
        where = f"{nodes} {'node' if nodes == 1 else 'nodes'} x {cluster.tasks} tasks"
        raise ConfigError(f"--nodes: {where} don't fit the run: {error}") from error
    return job


def rank_environment(run: RunConfig, cluster: ClusterConfig) -> dict[str, str]:
    """What torch, NCCL and megatron-core read; the cluster's own environment may overrule it."""
    values = {
        "OMP_NUM_THREADS": str(min(cluster.cores_per_task, MAX_THREADS) if cluster.gpus_per_node else 1),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a segfault tells where
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    parallel = run.parallel
    if cluster.gpus_per_node:
        values |= {  # the flight recorder: which collective each rank was in, dumped when one times out
            "TORCH_FR_BUFFER_SIZE": "2000",
            "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",  # its name in older versions of torch
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        }
        if parallel.tensor_size > 1:  # megatron-core orders communication before computation by it
            values["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if cluster.network_interface is not None:
        values["NCCL_SOCKET_IFNAME"] = cluster.network_interface
        if cluster.network_interface[0] not in "^=":  # only NCCL reads such patterns
            values["GLOO_SOCKET_IFNAME"] = cluster.network_interface
    return {**values, **cluster.environment}
