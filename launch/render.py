"""Renders batch scripts from a job and a cluster. Pure, except that it reads the templates.

Jinja's `finalize` quotes every value in a template for the shell. Only a `Directive`, which `launch/cluster.py` has
restricted to harmless characters, is inserted as it is.
"""

import functools
import hashlib
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2

from infini_train.config.errors import ConfigError
from launch.cluster import ClusterConfig
from launch.job import Job, require_line

MAX_NAME = 60
TASKS = re.compile(r"[0-9]{1,9}(?:-[0-9]{1,9})?(?:,[0-9]{1,9}(?:-[0-9]{1,9})?)*", re.ASCII)
ENCODE_REFUSES = {
    "--part": "the array gives each of its tasks a part; leave it out",
    "--restart": "the tasks of an array can't start over; remove the hidden folder of unfinished work by hand",
    "--overwrite": "a restarted task would replace what the others made; remove the old dataset by hand",
}


class Directive(str):
    """Part of an #SBATCH line, where shell quoting has no meaning."""

    __slots__ = ()


def template_root() -> Path:
    """The checkout's slurm/templates, or the copy inside an installed wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "templates"
    return inside if inside.is_dir() else package.parent / "slurm" / "templates"


def render_training(job: Job, cluster: ClusterConfig) -> str:
    """The batch script of a training run."""
    run_dir = job.scale_dirs.get(job.nodes * cluster.tasks, job.run_dir)
    train = ["infini-train", "train", job.config, *(f"--set={setting}" for setting in job.settings)]
    return _render(
        "train.sbatch.j2",
        cluster,
        directives=directives(job_name(job.name, run_dir), job.nodes, cluster),
        job=job,
        train=train,
    )


def render_evaluation(name: str, arguments: Iterable[str], cluster: ClusterConfig, gpus: int = 1) -> str:
    """The batch script of `infini-train eval ARGUMENTS` in one process."""
    wanted = [f"--job-name={job_name(name)}", "--nodes=1", "--ntasks=1", f"--cpus-per-task={cluster.cores_per_task}"]
    if cluster.gpus_per_node:
        wanted.append(gpu_request(gpus, cluster))
    wanted += ["--output=%x-%j.out", f"--time={cluster.time_limit}", *_place(cluster)]
    return _render(
        "eval.sbatch.j2",
        cluster,
        directives=[Directive(each) for each in wanted],
        command=["infini-train", "eval", *arguments],
        exports={"OMP_NUM_THREADS": str(cluster.cores_per_task), **cluster.plain_environment},
    )


def render_encoding(arguments: Iterable[str], parts: int, cluster: ClusterConfig, tasks: str | None = None) -> str:
    """The batch script of `infini-data encode ARGUMENTS` as a job array, one part per task, without GPUs.

    Args:
        arguments: of the command.
        parts: how many the corpus is cut into.
        cluster: where the jobs run.
        tasks: numbers of the parts to encode, from 0, as in 3,7-9; None: all.

    Raises:
        ConfigError: an argument is not a line of text, or is an option that the array sets itself or can't have.
    """
    words = list(arguments)
    for word in words:
        require_line("encode", word)
        name = word.partition("=")[0]  # argparse accepts abbreviated options
        for option, hint in ENCODE_REFUSES.items():
            if len(name) > 2 and option.startswith(name):
                raise ConfigError(f"encode: {option}: {hint}")
    if tasks is not None:
        _check_tasks(tasks, parts)
    wanted = [
        "--job-name=encode",
        f"--array={tasks or f'0-{parts - 1}'}",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={cluster.cores_per_node}",
        f"--mem={cluster.memory}",
        f"--time={cluster.time_limit}",
        *([f"--signal=B:USR1@{cluster.signal_before_limit_s}"] if cluster.requeue else []),
        "--requeue" if cluster.requeue else "--no-requeue",
        "--open-mode=append",
        "--output=%x-%A_%a.out",
        *_place(cluster),
    ]
    return _render(
        "encode.sbatch.j2",
        cluster,
        directives=[Directive(each) for each in wanted],
        command=["infini-data", "encode", *words],
        parts=parts,
        exports={"OMP_NUM_THREADS": "1", **cluster.plain_environment},
    )


def _check_tasks(tasks: str, parts: int) -> None:
    if not TASKS.fullmatch(tasks) or any(int(number) >= parts for number in re.findall("[0-9]+", tasks)):
        raise ConfigError(f"--tasks: {tasks!r} does not name tasks of 0 to {parts - 1}, as in 3 or 0,7-9")


def directives(name: str, nodes: int, cluster: ClusterConfig) -> list[Directive]:
    """The #SBATCH options of a training job of this name."""
    found = [
        f"--job-name={name}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={cluster.tasks}",
        f"--cpus-per-task={cluster.cores_per_task}",
        *([gpu_request(cluster.gpus_per_node, cluster)] if cluster.gpus_per_node else []),
        f"--mem={cluster.memory}",
        *(["--exclusive"] if cluster.exclusive else []),
        f"--time={cluster.time_limit}",
        f"--signal=B:USR1@{cluster.signal_before_limit_s}",
        "--requeue" if cluster.requeue else "--no-requeue",
        "--dependency=singleton",  # jobs of one name run one at a time
        "--open-mode=append",
        "--output=%x-%j.out",
        *_place(cluster),
    ]
    return [Directive(each) for each in found]


def _place(cluster: ClusterConfig) -> list[str]:
    named = {"partition": cluster.partition, "account": cluster.account, "qos": cluster.qos}
    return [f"--{name}={value}" for name, value in named.items() if value is not None] + list(cluster.sbatch)


def gpu_request(count: int, cluster: ClusterConfig) -> str:
    """The GPUs of a node. Not --gpus-per-task, which would hide a node's GPUs from each other's ranks."""
    return f"--gres=gpu:{cluster.gpu_type}:{count}" if cluster.gpu_type else f"--gres=gpu:{count}"


def job_name(name: str, run_dir: str | None = None) -> str:
    """A name for sbatch: the run's own where sbatch accepts it and no other run has it, else with a hash after it.

    Jobs of one name run one at a time, which is meant for jobs of one run. So a name that had to be changed, or whose
    run is not in the folder of this name, is made different from all others.
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-")
    if plain == name and len(name) <= MAX_NAME and run_dir in (None, str(Path("runs", name))):
        return name
    whole = f"{name}\0{run_dir}".encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(whole).hexdigest()[:8]
    return f"{plain[: MAX_NAME - 9].rstrip('-') or 'run'}-{digest}"


def _finalize(value: Any) -> str:
    return str(value) if isinstance(value, Directive) else shlex.quote(str(value))


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_root()),
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        comment_start_string="<#",  # bash has ${#name}
        comment_end_string="#>",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _render(template: str, cluster: ClusterConfig, **values: Any) -> str:
    return _environment().get_template(template).render(cluster=cluster, **values)
