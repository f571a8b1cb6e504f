"""The hay of a test, by its name: what its results say of it, and the option that chooses it. Imports no torch."""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

from infini_train.command_line import location
from infini_train.data.synthetic.haystack import HAYSTACKS


def name_hay(haystack: str) -> str:
    """Its name in results; prose, where it is a file."""
    return haystack if haystack in HAYSTACKS else "prose"


def hash_prose(haystack: str) -> str | None:
    """sha256 of the file; None for generated hay."""
    return None if haystack in HAYSTACKS else hashlib.sha256(Path(haystack).read_bytes()).hexdigest()


def note_repeats(prose_tokens: int | None, lengths_tokens: Sequence[int]) -> list[str]:
    """A line where prompts are longer than the prose, which None says is endless."""
    if prose_tokens is None or prose_tokens >= max(lengths_tokens):
        return []
    return [f"the haystack has {prose_tokens:,} tokens; longer prompts meet parts of it again"]


def add_haystack(parser: argparse.ArgumentParser, default: str) -> None:
    """Gives a parser --haystack."""
    parser.add_argument(
        "--haystack",
        type=location,
        default=default,
        metavar="HAY",
        help=f"the hay: {', '.join(HAYSTACKS)}, or a text or .jsonl file of prose (default: %(default)s)",
    )
