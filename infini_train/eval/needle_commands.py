"""infini-train eval needles. Imports torch only when the command runs."""

import argparse
import json
import sys
from pathlib import Path

from infini_train.command_line import describe, positive
from infini_train.data.haystack import HAYSTACKS
from infini_train.data.needles import TASKS
from infini_train.eval.context_commands import check_folder
from infini_train.eval.needle_scores import DEPTHS, LENGTHS, NeedleGrid
from infini_train.eval.passkey_scores import parse_length, parse_positions

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
    parser.add_argument(
        "--lanes", type=positive, default=8, metavar="N", help="prompts read side by side (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for everything (default: eval/needles-STEP-TASK-HAY and tensorboard/eval of the run)",
    )
    parser.add_argument("--overwrite", action="store_true", help="drop the answers that are there")
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
    check_folder(options.out)
    from infini_train.parallel import device

    device.prepare()
    from infini_train.eval.loading import open_trained
    from infini_train.eval.needle_report import evaluate_needles, format_results

    results = evaluate_needles(
        open_trained(options.model, options.precision),
        grid,
        lanes=options.lanes,
        out=options.out,
        overwrite=options.overwrite,
        precision=options.precision,
        say=lambda line: print(line, file=sys.stderr if options.json else sys.stdout, flush=True),
    )
    print(json.dumps(results) if options.json else f"\n{format_results(grid, results)}")
