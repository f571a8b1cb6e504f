"""infini-launch: submit, watch and end training jobs on Slurm. No torch; pydantic and Jinja only when needed."""

import argparse
import contextlib
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infini_train.config.run import RunConfig
    from launch.cluster import ClusterConfig

DESCRIPTION = "Submit training jobs to Slurm, see how they do, and end them. Docs: docs/slurm.md."
EPILOG = """\
examples:
  infini-launch render 1b --cluster h100                 the batch script, on the console
  infini-launch submit 1b --cluster mine.yaml --dry-run  what would be submitted, checked by sbatch --test-only
  infini-launch submit 1b --cluster mine.yaml --set data.train=/data/train --set run_dir=runs/mine
  infini-launch status                                   all runs below runs/
  infini-launch logs runs/mine -f --rank 3
  infini-launch cancel runs/mine                         saves the last step, then ends
  infini-launch chain 5 1b --cluster mine.yaml           five jobs, each going on where the last one stopped
  infini-launch encode 16 --cluster cpu.yaml -- text/ --tokenizer t.model --out data
  infini-launch local debug --nproc 2                    the same on this machine, without Slurm

exit codes: 0 done; 2 something given is wrong, nothing was submitted; others are those of infini-train (local)
"""
ASK_EVERY_S = 15  # whether a job whose log is followed is still in the queue


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    options = build_parser().parse_args(arguments)
    try:
        sys.exit(options.command(options))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)  # the reader of our output has gone
    except (ValueError, OSError) as error:
        from infini_train.config.errors import ConfigError  # late: status and logs don't wait for it

        if not isinstance(error, ConfigError | OSError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """Of all commands."""
    parser = argparse.ArgumentParser(
        prog="infini-launch",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    render = _add(commands, "render", _render, "print the batch script of a run")
    _add_job_options(render)
    submit = _add(commands, "submit", _submit, "submit a run")
    _add_job_options(submit)
    submit.add_argument("--dry-run", action="store_true", help="write nothing; ask sbatch --test-only, if there is one")
    chain = _add(commands, "chain", _chain, "submit N jobs of a run, each of which waits for the one before")
    chain.add_argument("count", type=_positive, metavar="N", help="the first that finishes the run ends the chain")
    _add_job_options(chain)
    encode = _add(commands, "encode", _encode, "encode a corpus as a job array, a part a task, on nodes without GPUs")
    encode.add_argument(
        "parts", type=_positive, metavar="N", help="tasks of the array; each takes a whole node's cores"
    )
    _add_cluster_options(encode)
    encode.add_argument(
        "--dry-run", action="store_true", help="show the script; ask sbatch --test-only, if there is one"
    )
    encode.add_argument(
        "words", nargs="+", metavar="WORD", help="behind --, as for infini-data encode: SOURCE ... --out DIR ..."
    )
    local = _add(commands, "local", _local, "run the job on this machine, without Slurm")
    _add_job_options(local, cluster_required=False)
    local.add_argument("--nproc", type=_positive, default=1, metavar="N", help="processes (default: 1)")
    status = _add(commands, "status", _status, "a table of runs")
    status.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="default: runs/")
    status.add_argument("--json", action="store_true", help="a line of JSON for each run")
    logs = _add(commands, "logs", _logs, "what a rank of a run's newest start says")
    logs.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it grows, through restarts")
    logs.add_argument("--rank", type=int, default=0, metavar="N", help="default: 0, which speaks for the run")
    cancel = _add(commands, "cancel", _cancel, "save the last step and end a run's job")
    cancel.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    cancel.add_argument("--now", action="store_true", help="don't wait for a checkpoint")
    return parser


def _add(commands: Any, name: str, command: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=command)
    return parser


def _add_job_options(parser: argparse.ArgumentParser, cluster_required: bool = True) -> None:
    parser.add_argument("config", metavar="CONFIG", help="of the run: name below configs/run/, or path of a .yaml file")
    _add_cluster_options(parser, cluster_required)
    parser.add_argument("--nodes", type=_positive, metavar="N", help="default: what parallel.data_size needs, or 1")
    parser.add_argument(
        "--set",
        metavar="A.B=VALUE",
        action="append",
        default=[],
        help="override a field of the run's config (repeatable)",
    )


def _add_cluster_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--cluster", required=required, metavar="NAME", help="name below configs/cluster/, or path of a .yaml file"
    )
    parser.add_argument(
        "--set-cluster",
        metavar="A=VALUE",
        action="append",
        default=[],
        help="override a field of the cluster's config (repeatable)",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError("must be positive")
    return value


# -------------------------------------------------------------------------------------------------------------- submit


def _load(options: argparse.Namespace, *more: str) -> tuple["RunConfig", "ClusterConfig"]:
    from infini_train.config.files import load_run
    from launch.cluster import load_cluster

    return load_run(options.config, options.set), load_cluster(options.cluster, [*options.set_cluster, *more])


def _render(options: argparse.Namespace) -> int:
    from launch.job import plan_job
    from launch.render import render_training

    run, cluster = _load(options)
    job = plan_job(run, cluster, options.config, tuple(options.set), options.nodes)
    print(render_training(job, cluster), end="")
    return 0


def _submit(options: argparse.Namespace) -> int:
    run, cluster = _load(options)
    if options.dry_run:
        return _try(run, cluster, options)
    _refuse_twice(run.directory)
    print(f"job {_send(run, cluster, options)}; see: infini-launch status, infini-launch logs {run.directory} -f")
    return 0


def _try(run: "RunConfig", cluster: "ClusterConfig", options: argparse.Namespace) -> int:
    """Shows the script, and what Slurm would say of it."""
    from launch.job import plan_job
    from launch.render import render_training

    job = plan_job(run, cluster, options.config, tuple(options.set), options.nodes)
    return _show(render_training(job, cluster))


def _show(text: str) -> int:
    """Prints a script, and what Slurm would say of it."""
    import shutil

    from launch import slurm

    print(text, end="")
    if shutil.which("sbatch") is None:
        print("no sbatch here: nothing was checked", file=sys.stderr)
        return 0
    with _script(text) as path:
        print(slurm.check(path), file=sys.stderr)
    return 0


@contextlib.contextmanager
def _script(text: str) -> Iterator[Path]:
    """A file for as long as sbatch reads it."""
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".sbatch", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        yield Path(file.name)


def _refuse_twice(run_dir: Path) -> None:
    """A job that waits or runs would read what a second submission writes.

    Raises:
        ConfigError: the queue holds a job of this run.
    """
    from infini_train.config.errors import ConfigError
    from launch import folder, slurm

    queue = slurm.queue()
    for number in folder.read_submitted(run_dir):
        if number in queue and queue[number].state != "COMPLETING":
            said = f"job {number} of this run is {queue[number].state.lower()}"
            raise ConfigError(f"{run_dir}: {said}; infini-launch cancel {shlex.quote(str(run_dir))} ends it")


def _send(run: "RunConfig", cluster: "ClusterConfig", options: argparse.Namespace, after: int | None = None) -> int:
    """Writes the run's launch folder and submits the script in it; its number. `after`: only if that job has failed.

    The script trains from a copy of the resolved config: what is edited while the job waits does not change it.
    """
    from infini_train.config.files import dump
    from launch import folder, slurm
    from launch.job import plan_job
    from launch.render import render_training

    config = run.directory / "launch" / "run.yaml"
    job = plan_job(run, cluster, str(config), nodes=options.nodes)
    files = {"train.sbatch": render_training(job, cluster), "run.yaml": dump(run)}
    there = folder.prepare(run.directory, files, Path(__file__).resolve().parent)
    wait = [] if after is None else [f"--dependency=afternotok:{after}", "--kill-on-invalid-dep=yes"]
    number = slurm.submit(there / "train.sbatch", [*_output(there), *wait])
    folder.note_submitted(run.directory, number, first=after is None)
    return number


def _output(there: Path) -> list[str]:
    """Where the script's own words go; %% since sbatch knows patterns, none of which work behind a backslash."""
    return [] if "\\" in str(there) else [f"--output={str(there).replace('%', '%%')}/slurm-%j.out"]


def _chain(options: argparse.Namespace) -> int:
    run, cluster = _load(options, "requeue=false")
    numbers: list[int] = []
    _refuse_twice(run.directory)
    for _ in range(options.count):
        numbers.append(_send(run, cluster, options, numbers[-1] if numbers else None))
    print(f"jobs {', '.join(map(str, numbers))}; each starts if the one before it could not finish the run")
    return 0


def _encode(options: argparse.Namespace) -> int:
    from launch import slurm
    from launch.cluster import load_cluster
    from launch.render import render_encoding

    cluster = load_cluster(options.cluster, options.set_cluster)
    text = render_encoding(options.words, options.parts, cluster)
    if options.dry_run:
        return _show(text)
    with _script(text) as path:
        number = slurm.submit(path)
    print(f"job {number}, {options.parts} tasks; they write into encode-{number}_*.out here")
    return 0


def _local(options: argparse.Namespace) -> int:
    from infini_train.config.files import load_run
    from infini_train.config.run import divide_processes
    from launch.cluster import ClusterConfig, load_cluster
    from launch.job import Job, rank_environment
    from launch.local import run_locally

    run = load_run(options.config, options.set)
    cores = len(os.sched_getaffinity(0))
    cluster = ClusterConfig(gpus_per_node=0, cores_per_node=max(cores, options.nproc), tasks_per_node=options.nproc)
    if options.cluster is not None:
        cluster = load_cluster(options.cluster, options.set_cluster)
    divide_processes(run, options.nproc)
    job = Job(
        name=run.name,
        config=options.config,
        settings=tuple(options.set),
        run_dir=str(run.directory),
        nodes=1,
        exports=rank_environment(run, cluster),
    )
    return run_locally(job, options.nproc, cluster.restart)


# --------------------------------------------------------------------------------------------------------------- watch


def _status(options: argparse.Namespace) -> int:
    from launch import folder, slurm, status

    runs = folder.find_runs(options.folder)
    jobs = {number for run in runs if (number := folder.read_job(run)) is not None}
    queue: Mapping[int, slurm.QueuedJob] | None = {}
    ended: Mapping[int, slurm.EndedJob] = {}
    try:
        queue = slurm.queue() if jobs else {}
        ended = slurm.accounts(sorted(jobs - queue.keys()))
    except ValueError as error:  # a controller that is away: what the runs' folders say is worth a table
        print(f"warning: {error}; this is what the runs' folders say", file=sys.stderr)
        queue = None
    rows = status.describe_runs(runs, queue, ended)
    if options.json:
        print("".join(json.dumps(row) + "\n" for row in rows), end="")
    elif rows:
        print(status.format_table(rows), end="")
    else:
        print(f"no runs below {options.folder}")
    return 0


def _logs(options: argparse.Namespace) -> int:
    from launch import folder

    if folder.newest_logs(options.run) is None and not options.follow:
        raise OSError(f"{options.run}: no job of it has started yet; see infini-launch status")
    shown: Path | None = None
    while True:
        logs = folder.newest_logs(options.run)
        path = logs / f"train-{options.rank}.log" if logs else None
        if path is not None and path != shown and path.is_file():
            shown = path
            _follow(path, options.run, options.follow)
        if not options.follow:
            return 0
        if _is_over(options.run):
            print(folder.last_words(options.run), end="", file=sys.stderr)
            return 0
        time.sleep(0.5)


def _follow(path: Path, run_dir: Path, follow: bool) -> None:
    """Prints a log; with `follow` as it grows, until a newer start has one or the run has finished."""
    from launch import folder

    with path.open(encoding="utf-8", errors="replace") as stream:
        while True:
            over = not follow or folder.newest_logs(run_dir) != path.parent or _is_over(run_dir)
            while text := stream.read(1 << 16):
                print(text, end="", flush=True)
            if over:
                return
            time.sleep(0.5)


def _is_over(run_dir: Path) -> bool:
    """Whether the run is finished, or its job has left the queue for good; Slurm is asked now and then."""
    from launch import folder

    if folder.read_status(run_dir).get("state") == "finished":
        return True
    number = folder.read_job(run_dir)
    return number is not None and not _is_queued(number, round(time.monotonic() / ASK_EVERY_S))


@functools.lru_cache(maxsize=1)
def _is_queued(number: int, moment: int) -> bool:
    from infini_train.config.errors import ConfigError
    from launch import slurm

    try:
        return number in slurm.queue()
    except ConfigError:  # a controller that is away for a while ends no job
        return True


def _cancel(options: argparse.Namespace) -> int:
    from infini_train.config.errors import ConfigError
    from launch import folder, slurm

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


if __name__ == "__main__":
    main()
