"""`infini-train eval` and its evaluations, each of which brings its own command. Imports torch only when one runs."""

from infini_train.command_line import CommandParser, describe
from infini_train.eval import babilong, context, gates, harness, needles, passkey, perplexity_command, ruler, summaries

EXAMPLES = """\
examples:
  infini-train eval runs/demo                            perplexity of the newest checkpoint; short for:
  infini-train eval perplexity runs/demo
  infini-train eval runs/demo --stream --data data/books/validation
  infini-train eval context runs/demo                    by position in the document, and by visible context
  infini-train eval passkey runs/demo --lengths 4K 32K   a key hidden in 4K and 32K tokens
  infini-train eval needles runs/demo --task multikey    several things to remember
  infini-train eval ruler runs/demo --lengths 4K 16K     the tasks of RULER
  infini-train eval babilong runs/demo --tasks qa2       follow facts scattered in other text
  infini-train eval gates runs/demo                      which heads read the memory, over training
  infini-train eval summarise runs/stories --data test.jsonl       summaries of whole books
  infini-train eval harness runs/demo --include-path tasks --tasks questions    of lm-evaluation-harness

Each command has its own help: infini-train eval passkey --help
"""
EVALUATIONS = {  # by command: the module with add_command and EXAMPLES, and a line of help
    "perplexity": (perplexity_command, "measure perplexity of held-out text, at any length in constant memory"),
    "passkey": (passkey, "recall a key hidden in up to millions of tokens of filler"),
    "needles": (needles, "recall several things hidden in hay (filler) or prose, after RULER"),
    "ruler": (ruler, "run the 13 tasks of RULER at any length"),
    "babilong": (babilong, "answer questions about facts scattered in up to millions of tokens (BABILong)"),
    "context": (context, "measure loss by position in the document and by visible context"),
    "harness": (harness, "run local tasks of lm-evaluation-harness"),
    "summarise": (summaries, "write summaries of whole books, scored by ROUGE"),
    "gates": (gates, "show how the gates moved over training, from a run's metrics"),
}


def add_commands(parser: CommandParser) -> None:
    """Gives the parser of `infini-train eval` its commands; perplexity is the one that may be left out."""
    describe(parser, "Measure a trained model. Without a command: perplexity.", EXAMPLES)
    parser.usage = f"{parser.prog} [COMMAND] RUN ..."
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, prog=parser.prog)
    for name, (evaluation, summary) in EVALUATIONS.items():
        evaluation.add_command(commands.add_parser(name, help=summary))
    parser.commands, parser.default = dict(commands.choices), commands.choices["perplexity"]
