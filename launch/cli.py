"""infini-launch: submit, watch and end training jobs on Slurm. No torch; pydantic and Jinja only when needed."""

from infini_train.interrupts import ending_at_once

with ending_at_once():  # the imports take seconds
    import argparse
    import logging
    import sys
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Any

    from infini_train.command_errors import open_missing_streams, run_command
    from infini_train.command_line import CommandParser, non_negative, path, positive, processes
    from launch import console, watch

DESCRIPTION = "Submit training jobs to Slurm, see how they are doing, and end them. Docs: docs/slurm.md."
EPILOG = """\
examples:
  infini-launch render 1b --cluster h100                 the batch script, on the console
  infini-launch submit 1b --cluster mine.yaml --dry-run  what would be submitted, checked by sbatch --test-only
  infini-launch submit 8b --cluster mine.yaml --nodes 16 at the config's scale for 16 nodes
  infini-launch submit 1b --cluster mine.yaml --set data.train=/data/train --set run_dir=runs/mine
  infini-launch status                                   all runs below runs/
  infini-launch logs runs/mine -f --rank 3
  infini-launch cancel runs/mine                         saves the last step, then ends
  infini-launch chain 5 1b --cluster mine.yaml           five jobs, each continuing where the last one stopped
  infini-launch encode 16 --cluster cpu.yaml -- text/ --tokenizer t.model --out data
  infini-launch local debug --nproc 2                    the same on this machine, without Slurm

exit codes: 0 done; 2 an argument, a file or a config is wrong, nothing was submitted;
others are those of infini-train (local)
"""
Command = Callable[[argparse.Namespace], int]
logger = logging.getLogger(__name__)
MAX_CHAIN = 1000  # jobs; more are a mistake, and no queue takes them


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    with ending_at_once():
        open_missing_streams()
        options = build_parser().parse_args(arguments)
        console.configure(options.level)
    sys.exit(run_command(lambda: options.command(options)))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = CommandParser(
        prog="infini-launch",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_starting(commands)
    _add_watching(commands)
    return parser


def _add_starting(commands: Any) -> None:
    """The commands that start jobs."""
    render = _add(commands, "render", _later("render"), "print the batch script of a run")
    _add_job_options(render)
    submit = _add(commands, "submit", _later("submit"), "submit a run")
    _add_job_options(submit)
    submit.add_argument(
        "--dry-run", action="store_true", help="print the script, write nothing; check it with sbatch --test-only"
    )
    chain = _add(commands, "chain", _later("chain"), "submit N jobs of a run, each of which waits for the one before")
    chain.add_argument(
        "count", type=_chain_length, metavar="N", help="number of jobs; the first that finishes the run ends the chain"
    )
    _add_job_options(chain)
    encode = _add(
        commands, "encode", _later("encode"), "encode a corpus as a job array: one part per task; requests no GPU"
    )
    encode.add_argument("parts", type=positive, metavar="N", help="number of tasks; each takes all cores of a node")
    _add_cluster_options(encode)
    encode.add_argument(
        "--tasks",
        metavar="LIST",
        help="only these of the N tasks, as in 3 or 0,7-9: those that failed, as numbered in encode-JOB_NUMBER.out",
    )
    encode.add_argument(
        "--dry-run", action="store_true", help="print the script, write nothing; check it with sbatch --test-only"
    )
    encode.add_argument(
        "words", nargs="+", metavar="WORD", help="after --, as for infini-data encode: SOURCE ... --out DIR ..."
    )
    local = _add(commands, "local", _later("run_local"), "run the job on this machine, without Slurm")
    _add_job_options(local, cluster_required=False)
    local.add_argument(
        "--nproc", type=processes, default=1, metavar="N", help="number of processes (default: %(default)s)"
    )


def _add_watching(commands: Any) -> None:
    """The commands that look at runs."""
    status = _add(commands, "status", watch.show_status, "print a table of runs")
    status.add_argument(
        "folder",
        nargs="?",
        type=path,
        default=Path("runs"),
        metavar="DIR",
        help="a run, or a folder of runs (default: %(default)s)",
    )
    status.add_argument("--json", action="store_true", help="print one line of JSON per run")
    logs = _add(commands, "logs", watch.show_logs, "print the output of a rank in a run's newest start")
    logs.add_argument("run", type=path, metavar="RUN", help="the run's folder")
    logs.add_argument("-f", "--follow", action="store_true", help="keep printing as it grows, through restarts")
    logs.add_argument(
        "--rank",
        type=non_negative,
        default=0,
        metavar="N",
        help="print this rank's log; rank 0 reports for the run (default: %(default)s)",
    )
    cancel = _add(commands, "cancel", watch.cancel, "save the last step and end a run's job")
    cancel.add_argument("run", type=path, metavar="RUN", help="the run's folder")
    cancel.add_argument("--now", action="store_true", help="end at once (scancel), without waiting for a checkpoint")


def _later(name: str) -> Command:
    """A command of launch/submit.py, whose imports (pydantic, Jinja) the other commands need not wait for."""

    def command(options: argparse.Namespace) -> int:
        from launch import submit

        return getattr(submit, name)(options)

    return command


def _add(commands: Any, name: str, command: Command, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=command, level=logging.INFO)
    level = parser.add_mutually_exclusive_group()
    level.add_argument(
        "-q",
        "--quiet",
        dest="level",
        action="store_const",
        const=logging.WARNING,
        help="print only results and warnings",
    )
    level.add_argument(
        "-v",
        "--verbose",
        dest="level",
        action="store_const",
        const=logging.DEBUG,
        help="also print the commands given to Slurm; does not reach the ranks",
    )
    return parser


def _chain_length(text: str) -> int:
    """The number of jobs of a chain, as the type of an argument."""
    value = positive(text)
    if value > MAX_CHAIN:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_CHAIN}")
    return value


def _add_job_options(parser: argparse.ArgumentParser, cluster_required: bool = True) -> None:
    parser.add_argument("config", metavar="CONFIG", help="the run's config: name below configs/run/, or a .yaml file")
    _add_cluster_options(parser, cluster_required)
    parser.add_argument(
        "--nodes",
        type=positive,
        metavar="N",
        help="number of nodes; picks the config's scale for it, if any (default: what parallel.data_size needs, or 1)",
    )
    parser.add_argument(
        "--set",
        metavar="A.B=VALUE",
        action="append",
        default=[],
        help="override a field of the run's config (repeatable)",
    )


def _add_cluster_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    default = "" if required else " (default: this machine)"
    parser.add_argument(
        "--cluster",
        required=required,
        metavar="NAME",
        help="the cluster's config: name below configs/cluster/, or a .yaml file" + default,
    )
    parser.add_argument(
        "--set-cluster",
        metavar="A=VALUE",
        action="append",
        default=[],
        help="override a field of the cluster's config (repeatable)",
    )


if __name__ == "__main__":
    main()
