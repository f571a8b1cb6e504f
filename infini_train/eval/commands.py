"""infini-train eval and its commands; those of perplexity and passkey here. Imports torch only when a command runs."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from infini_train.command_line import describe, positive
from infini_train.data.synthetic.wordings import WORDINGS
from infini_train.eval.context_commands import add_context, add_gates
from infini_train.eval.needle_commands import add_needles
from infini_train.eval.passkey_scores import LENGTHS, POSITIONS, PasskeyGrid, parse_length, parse_positions
from infini_train.eval.runner import add_lanes, add_out, prepare, run
from infini_train.eval.task_commands import add_harness, add_summarise

EXAMPLES = """\
examples:
  infini-train eval runs/demo                            perplexity of the newest checkpoint; short for:
  infini-train eval perplexity runs/demo
  infini-train eval runs/demo --stream --data data/books/validation
  infini-train eval context runs/demo                    by position in the document, and by visible context
  infini-train eval passkey runs/demo --lengths 4K 32K   a key hidden in 4K and 32K tokens
  infini-train eval needles runs/demo --task multikey    several things to remember
  infini-train eval gates runs/demo                      which heads read the memory, over training
  infini-train eval summarise runs/stories --data test.jsonl       summaries of whole books
  infini-train eval harness runs/demo --include-path tasks --tasks questions    of lm-evaluation-harness

Each has a help of its own: infini-train eval passkey --help
"""
PERPLEXITY_EXAMPLES = """\
examples:
  infini-train eval perplexity runs/demo                 the newest checkpoint on the run's validation data
  infini-train eval perplexity runs/demo --stream --data data/books/validation
  infini-train eval perplexity runs/demo/checkpoints/step-00000100 --window-tokens 4096 --json
  infini-train eval perplexity runs/demo --window-tokens 128 --forget    the same without memory, to compare

infini-train eval RUN is short for infini-train eval perplexity RUN
"""
PASSKEY_EXAMPLES = """\
examples:
  infini-train eval passkey runs/demo                    the paper's grid: 32K to 1M tokens; start, middle, end
  infini-train eval passkey runs/demo --lengths 4K 32K --positions 11 --samples 20
  infini-train eval passkey runs/demo --wording harbour --seed 1    filler and keys that training did not see
  infini-train eval passkey runs/demo --lengths 4M 10M --samples 3 --lanes 9

Stopped by Ctrl-C? The same command goes on where it stopped. More lengths, positions or samples add to
what is there.
"""


class CommandParser(argparse.ArgumentParser):
    """A parser of commands, one of which may be left out."""

    default_command: tuple[str, Sequence[str]] | None = None  # it, and the words that are no start of its arguments

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def,override]
        """As argparse has it, behind the command that was left out."""
        if self.default_command is not None and args:
            command, others = self.default_command
            args = list(args) if args[0] in others else [command, *args]
        return super().parse_known_args(args, namespace)


def add_commands(parser: CommandParser) -> None:
    """Gives the parser of `infini-train eval` its commands; perplexity is the one that may be left out."""
    describe(parser, "Measure a trained model. Without a command: perplexity.", EXAMPLES)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    perplexity = commands.add_parser("perplexity", help="of held-out text, at any length in constant memory")
    passkey = commands.add_parser("passkey", help="a key hidden in up to millions of tokens of filler")
    needles = commands.add_parser("needles", help="several things hidden in hay or prose, after RULER")
    context = commands.add_parser("context", help="loss by position in the document and by visible context")
    harness = commands.add_parser("harness", help="local tasks of lm-evaluation-harness")
    summarise = commands.add_parser("summarise", help="summaries of whole books, by ROUGE")
    measures = (perplexity, passkey, needles, context, harness, summarise)
    for command in measures:
        command.add_argument(
            "model", type=Path, metavar="RUN", help="a run's folder (its newest checkpoint) or one checkpoint"
        )
    _add_perplexity(perplexity)
    _add_passkey(passkey)
    add_needles(needles)
    add_context(context)
    add_harness(harness)
    add_summarise(summarise)
    for command in measures:
        command.add_argument(
            "--precision", choices=("fp32", "bf16"), default="fp32", help="of weights and activations (default: fp32)"
        )
        command.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    add_gates(commands.add_parser("gates", help="how the gates moved over training, from a run's metrics"))
    parser.default_command = "perplexity", (*commands.choices, "-h", "--help")


# ---------------------------------------------------------------------------------------------------------- perplexity


def _add_perplexity(parser: argparse.ArgumentParser) -> None:
    description = (
        "Loss and perplexity of held-out text, beside the unigram entropy of the same tokens (both in nats a token: a"
        " model that uses context gets below the entropy)."
    )
    describe(parser, description, PERPLEXITY_EXAMPLES)
    parser.add_argument(
        "--data", metavar="DIR", help="folder written by infini-data encode (default: the run's validation data)"
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="documents one after the other, a few segments at a time: constant memory at any length",
    )
    parser.add_argument(
        "--lanes",
        type=positive,
        metavar="N",
        help="documents read side by side (default: one micro-batch of training)",
    )
    parser.add_argument(
        "--window-tokens",
        type=positive,
        metavar="N",
        help="tokens of a document in one forward, a multiple of the segment (default: as in training; four segments"
        " with --stream)",
    )
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="stop after about N tokens (default: all)")
    parser.add_argument("--forget", action="store_true", help="forget the memory at each window's edge")
    parser.set_defaults(command=_perplexity)


def _perplexity(options: argparse.Namespace) -> None:
    prepare(options)
    from infini_train.eval.loading import open_trained
    from infini_train.eval.report import evaluate_run

    trained = open_trained(options.model, options.precision)
    values = evaluate_run(
        trained,
        options.data,
        lanes=1 if options.stream else options.lanes,
        window_tokens=options.window_tokens,
        stream=options.stream,
        max_tokens=options.max_tokens,
        forget=options.forget,
    )
    if options.json:
        print(json.dumps(values))
        return
    for name, value in values.items():
        shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        print(f"{name:<18}{shown}")


# ------------------------------------------------------------------------------------------------------------- passkey


def _add_passkey(parser: argparse.ArgumentParser) -> None:
    description = (
        "Hides a key in filler, asks for it at the end, and lets the model write the answer, always the most likely"
        " token. Exact match of all digits and accuracy of single digits, by length and by the key's position, with"
        " Wilson's 95 % intervals. Prompts stream through the model in constant memory."
    )
    describe(parser, description, PASSKEY_EXAMPLES)
    parser.add_argument(
        "--lengths",
        nargs="+",
        metavar="N",
        help=f"tokens of prompt and answer; K is 1024, M is 1024 K (default: {' '.join(LENGTHS)})",
    )
    parser.add_argument(
        "--positions",
        nargs="+",
        metavar="P",
        help="of the key in the filler, 0 start, 1 end; one whole number above 1: so many, evenly from start to end"
        f" (default: {' '.join(POSITIONS)})",
    )
    parser.add_argument(
        "--samples", type=int, default=10, metavar="N", help="prompts a length and position (default: %(default)s)"
    )
    parser.add_argument("--digits", type=int, default=5, metavar="N", help="of a key (default: %(default)s)")
    parser.add_argument(
        "--wording", default="paper", metavar="NAME", help=f"{', '.join(WORDINGS)} (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of keys and places (default: %(default)s)")
    add_lanes(parser, "prompts")
    add_out(parser, "eval/passkey-STEP", "the answers that are there")
    parser.set_defaults(command=_passkey)


def _passkey(options: argparse.Namespace) -> None:
    grid = PasskeyGrid(
        lengths_tokens=tuple(map(parse_length, options.lengths or LENGTHS)),
        positions=parse_positions(options.positions or POSITIONS),
        samples=options.samples,
        seed=options.seed,
        digits=options.digits,
        wording=options.wording,
    )
    prepare(options)
    from infini_train.eval.passkey_report import PasskeyTest, format_results

    run(options, lambda trained: PasskeyTest(trained, grid, lanes=options.lanes), format_results)
