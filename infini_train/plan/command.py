"""infini-train plan. Imports torch only when it runs."""

import argparse
import json

from infini_train.config.files import load_run

DESCRIPTION = """\
What each rank of a layout would hold, without the cluster and without the data: builds the modules of one rank of each
pipeline stage on this machine, without memory for their values, and counts. Docs: docs/plan.md."""
EXAMPLES = """\
examples:
  infini-train plan debug                                the layout of the config, on as few processes as it needs
  infini-train plan 125m --world-size 64 --set parallel.tensor_size=2 --set parallel.context_size=4
  infini-train plan 125m --world-size 16 --rank 5 --json    one rank, for programs
"""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train plan` its options."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", metavar="CONFIG", help="name below configs/run/, or path of a .yaml file")
    parser.add_argument(
        "--set", metavar="A.B=VALUE", action="append", default=[], help="override a field of the config (repeatable)"
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="processes (default: tensor x pipeline x context x data size of the config)",
    )
    parser.add_argument("--rank", type=int, metavar="R", help="look at this rank only (default: one of each stage)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.set_defaults(command=_plan)


def _plan(options: argparse.Namespace) -> None:
    config = load_run(options.config, options.set)
    from infini_train.parallel import device

    device.prepare()
    from infini_train.plan.dry_run import dry_run
    from infini_train.plan.table import format_plan

    plan = dry_run(config, options.world_size, None if options.rank is None else [options.rank])
    print(json.dumps(plan.to_json()) if options.json else format_plan(plan))
