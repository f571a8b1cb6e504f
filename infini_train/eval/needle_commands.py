"""infini-train eval needles. Imports torch only when the command runs."""

import argparse

from infini_train.command_line import describe
from infini_train.data.synthetic.haystack import HAYSTACKS
from infini_train.data.synthetic.needles import TASKS
from infini_train.eval.needle_scores import DEPTHS, LENGTHS, NeedleGrid
from infini_train.eval.passkey_scores import parse_length, parse_positions
from infini_train.eval.runner import add_lanes, add_out, prepare, run

EXAMPLES = """\
examples:
  infini-train eval needles runs/demo --task multikey --needles 2 4 8
  infini-train eval needles runs/demo --task single --haystack essays.txt      a pass key in prose
  infini-train eval needles runs/demo --task variables --haystack varied --lengths 4K --samples 50

Stopped by Ctrl-C? The same command goes on where it stopped. More lengths, needles, depths or samples add to
what is there.
"""


def add_needles(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train eval needles` its options."""
    description = (
        "Hides several things in hay, asks for one or all of them at the end, and lets the model write the answer."
        " Share of the asked words that were said, and of prompts with all of them, with Wilson's 95 % intervals."
        " Tasks after RULER: single (one pass key), multikey (one of several keys asked), multivalue (all values of"
        " one key), multiquery (all keys asked), variables (chains of assignments)."
    )
    describe(parser, description, EXAMPLES)
    parser.add_argument(
        "--task", choices=TASKS, default="multikey", help="what is hidden and asked (default: %(default)s)"
    )
    parser.add_argument(
        "--haystack",
        default="repeated",
        metavar="HAY",
        help=f"{', '.join(HAYSTACKS)}, or a text or .jsonl file of prose (default: %(default)s)",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        default=LENGTHS,
        metavar="N",
        help=f"tokens of prompt and answer; K is 1024, M is 1024 K (default: {' '.join(LENGTHS)})",
    )
    parser.add_argument(
        "--needles",
        nargs="+",
        type=int,
        default=(4,),
        metavar="N",
        help="hidden in a text; with variables, links of the asked chain (default: 4)",
    )
    parser.add_argument(
        "--depths",
        nargs="+",
        default=DEPTHS,
        metavar="P",
        help="of the asked needle in the hay, 0 start, 1 end; one whole number above 1: so many, evenly (default:"
        f" {' '.join(DEPTHS)}); only where one is asked",
    )
    parser.add_argument("--samples", type=int, default=10, metavar="N", help="prompts a cell (default: %(default)s)")
    parser.add_argument("--digits", type=int, default=5, metavar="N", help="of a value (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of needles, places and hay (default: 0)")
    add_lanes(parser, "prompts")
    add_out(parser, "eval/needles-STEP-TASK-HAY", "the answers that are there")
    parser.set_defaults(command=_needles)


def _needles(options: argparse.Namespace) -> None:
    grid = NeedleGrid(
        task=options.task,
        lengths_tokens=tuple(map(parse_length, options.lengths)),
        needles=tuple(options.needles),
        depths=parse_positions(options.depths, "--depths"),
        samples=options.samples,
        seed=options.seed,
        digits=options.digits,
        haystack=options.haystack,
    )
    prepare(options)
    from infini_train.eval.needle_report import NeedleTest, format_results

    run(
        options,
        lambda trained: NeedleTest(trained, grid, lanes=options.lanes),
        lambda results: format_results(grid, results),
    )
