"""infini-train selftest. Imports torch only when cases run."""

import argparse
import os
import sys
from collections.abc import Iterable

from infini_train import exit_codes
from infini_train.command_errors import fail
from infini_train.command_line import add_device, path, processes, repeat_verbosity
from infini_train.config.errors import ConfigError, naming
from infini_train.environment import world
from infini_train.selftest.cases import CASES, Case, choose_cases

DESCRIPTION = """\
Train a tiny model for five steps in every parallel layout, and compare gradients, losses, weights and
carried memory with one process. Run it where you are going to train: it tests whether processes, network
and libraries there compute correctly.
"""
EXAMPLES = """\
examples:
  infini-train selftest --nproc 2                        all layouts of 2 processes on this machine
  infini-train selftest --nproc 8 --only 'tp2-sp-*'      some layouts, by name
  srun infini-train selftest --folder /shared/tmp        in the processes that srun starts, on several machines
  infini-train selftest --list                           the names

A layout that needs fewer processes than there are gets more data-parallel ranks, if the number divides evenly.

exit codes: 0 all layouts agree; 1 a layout computes something else, or failed; 2 an argument is wrong, nothing was run
"""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train selftest` its options."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--nproc",
        type=processes,
        metavar="N",
        help="start N processes on this machine (default: only this process; torchrun and srun start their own)",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="run only cases whose name matches, as in 'cp*' (repeatable)",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="run only cases of this precision (default: both)"
    )
    parser.add_argument("--list", action="store_true", help="print names and processes of the cases, and exit")
    parser.add_argument("--json", action="store_true", help="print lines of JSON: the machine, then one line per case")
    parser.add_argument(
        "--folder", type=path, metavar="DIR", help="temporary folder visible to all ranks (default: this machine's)"
    )
    add_device(parser)
    parser.set_defaults(command=_selftest)


def _selftest(options: argparse.Namespace) -> None:
    started = "RANK" in os.environ
    if options.nproc is not None and started:
        raise ConfigError("--nproc: this process was started as one of several already (RANK is set); leave it out")
    processes = options.nproc or world()[1]
    if options.list and not (options.nproc or started):
        _list(CASES)
        return
    with naming("--only", "see --list"):
        cases = choose_cases(processes, options.only, options.precision)
    if options.list:
        _list(cases)
        return
    if options.nproc is not None:
        from infini_train.launcher import launch

        sys.exit(launch(options.nproc, _repeat(options)))
    from infini_train.parallel import device

    device.prepare(options.device)
    from infini_train.parallel import mesh
    from infini_train.parallel.meeting import MeetingError
    from infini_train.selftest.run import UnsharedFolderError, run_selftest

    try:
        failed = run_selftest(cases, options.folder, options.json)
    except UnsharedFolderError as error:
        raise ConfigError(f"--folder: {error}") from error
    except MeetingError as error:
        sys.exit(fail(str(error), exit_codes.FAILED))
    mesh.stop()
    if failed and world()[0] == 0:
        print(f"error: {failed} of {len(cases)} cases failed; see docs/selftest.md", file=sys.stderr)
        sys.exit(exit_codes.FAILED)


def _list(cases: Iterable[Case]) -> None:
    for case in cases:
        print(f"{case.name:<36} {case.processes}")


def _repeat(options: argparse.Namespace) -> list[str]:
    """The same command for a rank."""
    arguments = ["selftest", f"--device={options.device}", *(f"--only={pattern}" for pattern in options.only)]
    arguments += [f"--precision={options.precision}"] * (options.precision is not None)
    arguments += ["--json"] * options.json
    arguments += [f"--folder={options.folder}"] * (options.folder is not None)
    return arguments + repeat_verbosity(options)
