"""What the parsers of all commands share. Imports no torch."""

import argparse
import textwrap
from collections.abc import Iterator


def describe(parser: argparse.ArgumentParser, description: str, examples: str) -> None:
    """Gives a command's help its description, wrapped, and its examples, as they are."""
    parser.description, parser.epilog = textwrap.fill(description, 100), examples
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def positive(text: str) -> int:
    """An option's value that must be a whole number above 0."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError("must be positive")
    return value


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Gives every command below a parser --quiet and --verbose (see `infini_train.logs`)."""
    for command in _commands(parser):
        group = command.add_mutually_exclusive_group()
        group.add_argument("-q", "--quiet", action="store_true", help="no progress or notes, only warnings and results")
        group.add_argument(
            "-v", "--verbose", action="store_true", help="also what each rank is doing, with time and rank"
        )


def repeat_verbosity(options: argparse.Namespace) -> list[str]:
    """The arguments that give another process the same verbosity."""
    return [f"--{name}" for name in ("quiet", "verbose") if getattr(options, name)]


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser, or the commands below it that have no commands of their own."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield parser
    for action in nested:
        for command in action.choices.values():
            yield from _commands(command)
