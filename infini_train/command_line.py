"""What the parsers of all commands share. Imports no torch."""

import argparse
import textwrap


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
