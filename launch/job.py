"""The unit that is launched: a training run on some nodes, and the environment that its ranks need."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run, scale_sizes
from infini_train.config.run import RunConfig, divide_processes
from launch.cluster import ClusterConfig

MAX_THREADS = 8  # of a rank with a GPU: the work left to the CPU gains nothing from more


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run as the batch script sees it.

    Args:
        name: of the run, and of the job.
        config: the CONFIG argument of infini-train train.
        settings: its --set arguments.
        run_dir: the run's folder.
        nodes: number of nodes.
        exports: environment variables that follow from the run's config.
        scale_dirs: number of processes -> the run's folder at that scale of its config. With it the script follows
            the nodes that it gets; run_dir is the folder for any other number.
    """

    name: str
    config: str
    settings: tuple[str, ...] = ()
    run_dir: str
    nodes: int
    exports: Mapping[str, str] = field(default_factory=dict)
    scale_dirs: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, text in (("name", self.name), ("run_dir", self.run_dir), ("config", self.config)):
            require_line(name, text)
        for run_dir in self.scale_dirs.values():
            require_line("run_dir", run_dir)
        for setting in self.settings:
            require_line("setting", setting)
        for text in (self.config, self.run_dir, *self.scale_dirs.values()):
            if text.startswith("-"):
                raise ConfigError(f"{text}: looks like an option; write ./{text}")
        if self.nodes < 1:
            raise ConfigError(f"nodes: must be positive, not {self.nodes}")


class NodesError(ConfigError):
    """A number of nodes that the run can't be divided over; the message names no option."""


def require_line(path: str, text: str) -> None:
    """Checks that a line of a shell script can hold this text.

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
        cluster: where it runs.
        config: the CONFIG argument of infini-train train.
        settings: its --set arguments.
        nodes: number of nodes; None: as many as parallel.data_size needs, or one.

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
        exports=job_environment(run, cluster),
    )
    try:
        divide_processes(run, nodes * cluster.tasks)
    except ConfigError as error:
        where = f"{nodes} {'node' if nodes == 1 else 'nodes'} x {cluster.tasks} tasks"
        raise NodesError(f"{where} don't fit the run: {error}") from error
    return job


def plan_scales(config: str, cluster: ClusterConfig, settings: Sequence[str] = (), nodes: int | None = None) -> Job:
    """The job of a config, for a script that also runs on the numbers of nodes that the config has scales for.

    Args:
        config: name or path of the run's config.
        cluster: where it runs.
        settings: overrides, which hold at every scale.
        nodes: what the script asks for unless sbatch is given --nodes; None: as in `plan_job`.

    Raises:
        ConfigError: the config is wrong, or the processes of these nodes can't be divided as it asks.
    """
    size = None if nodes is None else nodes * cluster.tasks
    job = plan_job(load_run(config, settings, size), cluster, config, tuple(settings), nodes)
    runs: dict[int | None, RunConfig] = {}
    for each in (None, *(size for size in scale_sizes(config) if size % cluster.tasks == 0)):
        with contextlib.suppress(ConfigError):  # the settings rule this one out; infini-train would say so
            runs[each] = load_run(config, settings, each)
    base = runs.pop(None, None)
    if base is None or not runs:
        return job
    exports = {name: value for run in (base, *runs.values()) for name, value in job_environment(run, cluster).items()}
    dirs = {size: str(run.directory) for size, run in runs.items() if size is not None}
    return replace(job, run_dir=str(base.directory), exports=exports, scale_dirs=dirs)


def job_environment(run: RunConfig, cluster: ClusterConfig) -> dict[str, str]:
    """What torch, NCCL and megatron-core read; the cluster's own environment, but for secrets, takes precedence."""
    values = {
        "OMP_NUM_THREADS": str(min(cluster.cores_per_task, MAX_THREADS) if cluster.gpus_per_node else 1),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a segfault prints the stack
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    parallel = run.parallel
    if cluster.gpus_per_node:
        values |= {  # the flight recorder: dumps which collective each rank was in when one times out
            "TORCH_FR_BUFFER_SIZE": "2000",
            "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",  # the same in older versions of torch
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        }
        if parallel.tensor_size > 1:  # megatron-core needs it to launch communication before computation
            values["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if cluster.network_interface is not None:
        values["NCCL_SOCKET_IFNAME"] = cluster.network_interface
        if cluster.network_interface[0] not in "^=":  # only NCCL understands these patterns
            values["GLOO_SOCKET_IFNAME"] = cluster.network_interface
    return {**values, **cluster.plain_environment}
