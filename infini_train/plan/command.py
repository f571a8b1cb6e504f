"""infini-train plan. Imports torch only when it runs."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from infini_train.command_line import Spinner, non_negative, path, positive
from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run
from infini_train.config.run import RunConfig
from infini_train.config.values import MAX_RANKS
from infini_train.plan.hardware import load_hardware

DESCRIPTION = """\
Predict memory, communication and speed of each rank of a layout, without the cluster and without the data. Builds the
modules of one rank per pipeline stage on this machine, without memory for their values, runs them, and counts.
Docs: docs/plan.md."""
FLAGS = {  # arguments of functions -> flags
    "world_size": "--world-size",
    "rank": "--rank",
    "layouts": "--search",
    "path": "--measure",
}
EXAMPLES = """\
examples:
  infini-train plan debug                                the layout of the config, on as few processes as it needs
  infini-train plan 125m --world-size 64 --set parallel.tensor_size=2 --set parallel.context_size=4
  infini-train plan 125m --world-size 16 --rank 5 --json    one rank, for programs
  infini-train plan 8b --nodes 4 --hardware a100 --search   the fastest layouts that fit on 4 nodes
  infini-train plan --measure mine.yaml                     describe this machine, for --hardware mine.yaml
"""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train plan` its options."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="name below configs/run/, or path of a .yaml file")
    parser.add_argument(
        "--set", metavar="A.B=VALUE", action="append", default=[], help="override a field of the config (repeatable)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--world-size",
        type=positive,
        metavar="N",
        help="number of processes (default: tensor x pipeline x context x data size of the config)",
    )
    size.add_argument("--nodes", type=positive, metavar="N", help="number of processes, given as nodes of the hardware")
    parser.add_argument("--rank", type=non_negative, metavar="R", help="plan only this rank (default: one per stage)")
    parser.add_argument(
        "--hardware",
        metavar="NAME",
        default="h100",
        help="h100, h200, a100 (below configs/hardware/), or path of a .yaml file (default: %(default)s)",
    )
    parser.add_argument("--search", action="store_true", help="list the fastest layouts that fit, with their overrides")
    parser.add_argument("--top", type=positive, metavar="K", default=8, help="list K layouts (default: %(default)s)")
    parser.add_argument(
        "--measure", metavar="FILE", type=path, help="measure this machine, and write its hardware description"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.set_defaults(command=_plan)


@contextlib.contextmanager
def _naming_flags() -> Iterator[None]:
    """Errors about an argument of a function name the command's flag instead."""
    try:
        yield
    except ConfigError as error:
        name, colon, problem = str(error).partition(":")
        raise ConfigError(f"{FLAGS.get(name, name)}{colon}{problem}") from error


def _plan(options: argparse.Namespace) -> None:
    if options.measure is not None:
        _measure(options.measure)
        return
    if options.config is None:
        raise ConfigError("CONFIG: name a run config, as in infini-train plan 1b (or give --measure FILE)")
    hardware = load_hardware(options.hardware)
    size = options.nodes * hardware.devices_per_node if options.nodes else options.world_size
    if size is not None and size > MAX_RANKS:
        raise ConfigError(f"--{'nodes' if options.nodes else 'world-size'}: {size} processes; at most {MAX_RANKS}")
    config = load_run(options.config, options.set, size)
    if options.search:
        _search(options, config, size)
        return
    from infini_train.parallel import device

    with Spinner("planning"), _naming_flags():
        device.prepare("cpu")  # it computes shapes and times alone
        from infini_train.plan.dry_run import dry_run
        from infini_train.plan.table import format_plan

        plan = dry_run(config, size, None if options.rank is None else [options.rank], hardware)
    print(json.dumps(plan.to_json()) if options.json else format_plan(plan))


def _search(options: argparse.Namespace, config: RunConfig, size: int | None) -> None:
    from infini_train.parallel import device

    if size is None:
        size = config.parallel.model_size * (config.parallel.data_size or 1)
    if size < 1:
        raise ConfigError(f"--world-size: must be positive, not {size}")
    hardware = load_hardware(options.hardware)
    with Spinner("comparing layouts"), _naming_flags():
        device.prepare("cpu")  # it computes shapes and times alone
        from infini_train.plan.search import search
        from infini_train.plan.search_table import format_search, search_json

        found = search(config, hardware, size)
    if options.json:
        print(json.dumps(search_json(found, hardware, options.top)))
    else:
        print(format_search(found, hardware, options.top))


def _measure(path: Path) -> None:
    from infini_train.parallel import device

    device.configure()
    from infini_train.plan.measure import measure_hardware, write_hardware

    hardware, rates = measure_hardware()
    with _naming_flags():
        write_hardware(path, hardware, rates)
    for name, value in dataclasses.asdict(hardware).items():
        print(f"{name:<24}{value}")
    print(f"written: {path}; use it with --hardware {path}")
