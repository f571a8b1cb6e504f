"""infini-train eval: context, gates. Imports torch only when a command runs."""

import argparse
import json
from pathlib import Path

from infini_train.command_line import describe, positive
from infini_train.eval.passkey_scores import parse_length
from infini_train.eval.runner import add_out, check_folder, prepare, run

CONTEXTS = ("256", "1K", "4K")
CONTEXT_EXAMPLES = """\
examples:
  infini-train eval context runs/books                       the run's validation data
  infini-train eval context runs/books --data data/books/validation --contexts 256 1K 4K 16K --targets 16
  infini-train eval context runs/books --documents 10 --json

Stopped by Ctrl-C? The same command goes on with the next document. More documents add to what is there.
"""
GATES_EXAMPLES = """\
examples:
  infini-train eval gates runs/books
"""


def add_context(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train eval context` its options."""
    description = (
        "Loss and perplexity over whole documents, streamed in constant memory: by tokens since the document's start,"
        " and, for a sample of targets, by how many tokens before them are visible (what is older is forgotten)."
        " 95 % intervals by bootstrap over documents."
    )
    describe(parser, description, CONTEXT_EXAMPLES)
    parser.add_argument(
        "--data", metavar="DIR", help="folder written by infini-data encode (default: the run's validation data)"
    )
    parser.add_argument(
        "--contexts",
        nargs="+",
        default=CONTEXTS,
        metavar="N",
        help=f"tokens visible before a target; K is 1024, M is 1024 K (default: {' '.join(CONTEXTS)})",
    )
    parser.add_argument(
        "--targets", type=int, default=8, metavar="N", help="in each document that is long enough (default: 8)"
    )
    parser.add_argument(
        "--target-tokens", type=int, default=64, metavar="N", help="tokens of a target (default: %(default)s)"
    )
    parser.add_argument("--documents", type=positive, metavar="N", help="the first N documents (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the targets' places (default: 0)")
    add_out(parser, "eval/context-STEP", "what is there")
    parser.set_defaults(command=_context)


def _context(options: argparse.Namespace) -> None:
    prepare(options)
    from infini_train.eval.context import ContextPlan
    from infini_train.eval.context_report import ContextTest, format_results

    plan = ContextPlan(
        contexts_tokens=tuple(parse_length(text, "--contexts") for text in options.contexts),
        targets=options.targets,
        target_tokens=options.target_tokens,
        seed=options.seed,
    )
    data, documents = options.data, options.documents
    run(
        options,
        lambda trained: ContextTest(trained, plan, data=data, max_documents=documents),
        format_results,
    )


def add_gates(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train eval gates` its options."""
    description = (
        "The gates over training, from the run's metrics: share of heads that became local (gate below 0.1) or read the"
        " memory (above 0.9), mean, lowest and highest; as a picture and in TensorBoard."
    )
    describe(parser, description, GATES_EXAMPLES)
    parser.add_argument("model", type=Path, metavar="RUN", help="a run's folder")
    add_out(parser, "eval/")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.set_defaults(command=_gates)


def _gates(options: argparse.Namespace) -> None:
    check_folder(options.out)
    from infini_train.eval.gates import report_gates

    found = report_gates(options.model, options.out)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<18}{f'{value:.4f}' if isinstance(value, float) else value}")
