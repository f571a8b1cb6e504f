"""The commands that start jobs: render, submit, chain, encode, local. Imported only when one of them runs."""

import argparse
import contextlib
import logging
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from infini_train.config.errors import ConfigError
from infini_train.config.files import dump, load_run, scale_sizes
from infini_train.config.run import RunConfig, divide_processes
from launch import folder, slurm
from launch.cluster import ClusterConfig, load_cluster
from launch.console import waiting
from launch.job import Job, NodesError, job_environment, plan_job, plan_scales, require_line
from launch.local import run_locally
from launch.render import job_name, render_encoding, render_training

logger = logging.getLogger(__name__)


def render(options: argparse.Namespace) -> int:
    """`infini-launch render`."""
    print(_render_scales(options, _load_cluster(options)), end="")
    return 0


def submit(options: argparse.Namespace) -> int:
    """`infini-launch submit`."""
    cluster = _load_cluster(options)
    if options.dry_run:
        return _show(_render_scales(options, cluster))
    run = _load_run(options, cluster)
    _warn_of_namesakes(job_name(run.name, str(run.directory)), _refuse_second_job(run.directory))
    print(f"job {_send(run, cluster, options)}; see: infini-launch status, infini-launch logs {run.directory} -f")
    return 0


def chain(options: argparse.Namespace) -> int:
    """`infini-launch chain`."""
    cluster = _load_cluster(options, "requeue=false")
    run = _load_run(options, cluster)
    numbers: list[int] = []
    _warn_of_namesakes(job_name(run.name, str(run.directory)), _refuse_second_job(run.directory))
    for _ in range(options.count):
        numbers.append(_send(run, cluster, options, numbers[-1] if numbers else None))
    print(f"jobs {', '.join(map(str, numbers))}; each starts if the one before it could not finish the run")
    return 0


def encode(options: argparse.Namespace) -> int:
    """`infini-launch encode`."""
    cluster = _load_cluster(options)
    text = render_encoding(options.words, options.parts, cluster, options.tasks)
    if options.dry_run:
        return _show(text)
    secrets = cluster.secret_environment(os.environ)
    with _script(text) as path:
        number = slurm.submit(path, _export(cluster), secrets)
    what = f"{options.parts} tasks" if options.tasks is None else f"tasks {options.tasks} of {options.parts}"
    print(f"job {number}, {what}; they write into encode-{number}_*.out here")
    return 0


def run_local(options: argparse.Namespace) -> int:
    """`infini-launch local`."""
    run = load_run(options.config, options.set)
    cores = len(os.sched_getaffinity(0))
    cluster = ClusterConfig(gpus_per_node=0, cores_per_node=max(cores, options.nproc), tasks_per_node=options.nproc)
    if options.cluster is not None:
        cluster = _load_cluster(options)
    divide_processes(run, options.nproc)
    job = Job(
        name=run.name,
        config=options.config,
        settings=tuple(options.set),
        run_dir=str(run.directory),
        nodes=1,
        exports=job_environment(run, cluster) | cluster.secret_environment(os.environ),
    )
    return run_locally(job, options.nproc, cluster.restart)


# ------------------------------------------------------------------------------------------------- configs and scripts


def _load_cluster(options: argparse.Namespace, *more: str) -> ClusterConfig:
    return load_cluster(options.cluster, [*options.set_cluster, *more])


def _load_run(options: argparse.Namespace, cluster: ClusterConfig) -> RunConfig:
    """The run's config at its scale for --nodes, if it has one."""
    size = None if options.nodes is None else options.nodes * cluster.tasks
    return load_run(options.config, options.set, size)


@contextlib.contextmanager
def _naming_options(options: argparse.Namespace, cluster: ClusterConfig) -> Iterator[None]:
    """Errors of a job's plan name the option that is to change."""
    for setting in options.set:
        require_line("--set", setting)
    require_line("CONFIG", options.config)
    try:
        yield
    except NodesError as error:
        scales = [str(size // cluster.tasks) for size in scale_sizes(options.config) if size % cluster.tasks == 0]
        hint = f"; {options.config} has scales for {', '.join(scales)} nodes" if scales else ""
        raise ConfigError(f"--nodes: {error}{hint}") from error


def _render_scales(options: argparse.Namespace, cluster: ClusterConfig) -> str:
    with _naming_options(options, cluster):
        job = plan_scales(options.config, cluster, options.set, options.nodes)
    return render_training(job, cluster)


def _show(text: str) -> int:
    """Prints a script, and what Slurm would say of it."""
    print(text, end="")
    if shutil.which("sbatch") is None:
        logger.info("no sbatch here: nothing was checked")
        return 0
    with _script(text) as path:
        logger.info("%s", slurm.check(path))
    return 0


@contextlib.contextmanager
def _script(text: str) -> Iterator[Path]:
    """A file for as long as sbatch reads it."""
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        yield Path(file.name)


# ---------------------------------------------------------------------------------------------------------- submission


def _refuse_second_job(run_dir: Path) -> Mapping[int, slurm.QueuedJob]:
    """A job that waits or runs would read what a second submission writes; returns the queue.

    Raises:
        ConfigError: the queue holds a job of this run.
    """
    queue = slurm.queue()
    for number in folder.read_submitted(run_dir):
        if number in queue and queue[number].state != "COMPLETING":
            found = f"job {number} of this run is {queue[number].state.lower()}"
            raise ConfigError(f"{run_dir}: {found}; infini-launch cancel {shlex.quote(str(run_dir))} ends it")
    return queue


def _warn_of_namesakes(name: str, queue: Mapping[int, slurm.QueuedJob]) -> None:
    """Two checkouts may have a run of the same name and folder."""
    for job in queue.values():
        if job.name == name:
            logger.warning("job %d has the name %s too, and the two run one at a time; --set name=...", job.id, name)


def _send(run: RunConfig, cluster: ClusterConfig, options: argparse.Namespace, after: int | None = None) -> int:
    """Writes the run's launch folder and submits the script in it; its number. `after`: only if that job has failed.

    The script trains from a copy of the resolved config: what is edited while the job waits does not change it.
    """
    config = run.directory / "launch" / "run.yaml"
    secrets = cluster.secret_environment(os.environ)
    slurm.require("sbatch")
    with _naming_options(options, cluster):
        job = plan_job(run, cluster, str(config), nodes=options.nodes)
    files = {"train.sbatch": render_training(job, cluster), "run.yaml": dump(run)}
    with waiting("recording the code's revision"):
        launch_dir = folder.prepare(run.directory, files, Path(__file__).resolve().parent)
    wait = [] if after is None else [f"--dependency=afternotok:{after}", "--kill-on-invalid-dep=yes"]
    number = slurm.submit(launch_dir / "train.sbatch", [*_output(launch_dir), *wait, *_export(cluster)], secrets)
    folder.note_submitted(run.directory, number, first=after is None)
    return number


def _output(launch_dir: Path) -> list[str]:
    """Where the script's own output goes; %% since sbatch knows patterns, none of which work after a backslash."""
    return [] if "\\" in str(launch_dir) else [f"--output={str(launch_dir).replace('%', '%%')}/slurm-%j.out"]


def _export(cluster: ClusterConfig) -> list[str]:
    """The option that lets the job's secrets through where it would get nothing, or little, of this environment.

    It names variables; their values are in the environment of sbatch.
    """
    chosen = os.environ.get("SBATCH_EXPORT") or cluster.export or "ALL"
    if not cluster.secret_names or chosen.upper().split(",")[0] == "ALL":
        return []
    others = [] if chosen.upper() in ("NONE", "NIL") else [chosen]
    return [f"--export={','.join([*others, *cluster.secret_names])}"]
