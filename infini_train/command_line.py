"""What the parsers of all commands share: help, types of values, renamed options, a spinner. Imports no torch."""

import argparse
import itertools
import re
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from infini_train import exit_codes
from infini_train.config.errors import ConfigError
from infini_train.config.paths import expand_home
from infini_train.logs import is_quiet

CLEAR_LINE = "\r\x1b[2K"
MAX_NUMBER = 2**60
MAX_SEED = 2**63 - 1
MAX_PROCESSES = 1024  # on one machine
MAX_LENGTH = 2**30  # tokens
_UNITS = {"": 1, "K": 2**10, "M": 2**20}


class CommandParser(argparse.ArgumentParser):
    """A parser whose arguments may leave out the command's name, and which reports a mistake in one line.

    Attributes:
        commands: parsers by the names of the commands.
        default: parses arguments that don't begin with one of these names.
    """

    commands: dict[str, argparse.ArgumentParser] | None = None
    default: argparse.ArgumentParser | None = None

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def,override]
        """As argparse does, by the parser that the first argument asks for.

        argparse has no default subcommand: a subparser is chosen by a positional argument, which here may as well be
        the first positional of the default command. So the choice is made before either parser begins.
        """
        if self.default is None or not args or args[0] in (self.commands or {}) or args[0] in ("-h", "--help"):
            return super().parse_known_args(args, namespace)
        return self.default.parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends the process; argparse would print the usage first, often more lines than a terminal shows."""
        self.exit(exit_codes.MISTAKE, f"error: {message.removeprefix('argument ')}; see {self.prog} --help\n")


def describe(parser: argparse.ArgumentParser, description: str, examples: str) -> None:
    """Gives a command's help its description, wrapped, and its examples, as they are."""
    parser.description, parser.epilog = textwrap.fill(description, 100), examples
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


# -------------------------------------------------------------------------------------------------- types of values


def _whole(text: str, least: int, most: int, below: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text[:40]!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(below)
    if value > most:
        raise argparse.ArgumentTypeError(f"must be at most {most}")
    return value


def positive(text: str) -> int:
    """A whole number above 0, as the type of an option's value."""
    return _whole(text, 1, MAX_NUMBER, "must be positive")


def non_negative(text: str) -> int:
    """A whole number, 0 or above, as the type of an option's value."""
    return _whole(text, 0, MAX_NUMBER, "must not be negative")


def seed(text: str) -> int:
    """A random seed, as the type of an option's value."""
    return _whole(text, 0, MAX_SEED, "must not be negative")


def processes(text: str) -> int:
    """How many processes to start on this machine, as the type of an option's value."""
    return _whole(text, 1, MAX_PROCESSES, "must be positive")


def workers(text: str) -> int:
    """How many processes or threads share work on this machine, as the type of an option's value; 0: one per core."""
    return _whole(text, 0, MAX_PROCESSES, "must not be negative")


def positive_float(text: str) -> float:
    """A finite number above 0, as the type of an option's value."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be positive")
    return value


def location(text: str) -> str:
    """A path or URL, or - for a standard stream, as the type of an option's value; ~ is the home folder.

    A shell leaves the ~ of --out=~/x as it is.
    """
    try:
        return expand_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path(text: str) -> Path:
    """A path, as the type of an option's value; see `location`."""
    return Path(location(text))


FILE: dict[str, Any] = {"type": location, "metavar": "FILE"}  # for `add_argument`
DIR: dict[str, Any] = {"type": location, "metavar": "DIR"}


def add_device(parser: argparse.ArgumentParser) -> None:
    """Gives a parser --device; in training it is a field of the config."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="cuda: a GPU, or an error; auto: a GPU where there is one (default: %(default)s)",
    )


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Gives every command below a parser --quiet and --verbose (see `infini_train.logs`)."""
    for command in _commands(parser):
        group = command.add_mutually_exclusive_group()
        group.add_argument(
            "-q", "--quiet", action="store_true", help="print only warnings and results, no progress or notes"
        )
        group.add_argument(
            "-v", "--verbose", action="store_true", help="also print what each rank is doing, with time and rank"
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


def parse_length(text: str, option: str = "--lengths") -> int:
    """Tokens of a length such as 5000, 32K or 1M (K: 1024, M: 1024 K), given with an option.

    Raises:
        ConfigError: it is none, or beyond what any measurement reads.
    """
    match = re.fullmatch(r"([0-9]+)([KM]?)", text.upper())
    if match is None:
        raise ConfigError(f"{option}: {text[:40]} is no length; write tokens as 5000, 32K or 1M")
    tokens = int(match[1][:20]) * _UNITS[match[2]]
    if tokens > MAX_LENGTH:
        raise ConfigError(f"{option}: {text[:40]} is too long; at most {format_length(MAX_LENGTH)}")
    return tokens


def format_length(tokens: int) -> str:
    """32K, 1M; other numbers in full."""
    unit = next(unit for unit in ("M", "K", "") if tokens % _UNITS[unit] == 0)
    return f"{tokens // _UNITS[unit]}{unit}"


# --------------------------------------------------------------------------------------------------- renamed options


class RenamedOption(argparse.Action):
    """An option's old name: does what the new one does, and says so in one line on standard error.

    Args:
        option_strings: the old name.
        dest: where the new option puts its value.
        new: the new name.
        options: of `argparse.Action`.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, *, new: str, **options: Any) -> None:
        # without a default of its own: that of the new option holds
        super().__init__(option_strings, dest, help=argparse.SUPPRESS, default=argparse.SUPPRESS, **options)
        self.new = new

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        print(f"note: {option} is now called {self.new}", file=sys.stderr)
        setattr(namespace, self.dest, values)


# ------------------------------------------------------------------------------------------------------------ spinner


class Spinner:
    """A context whose text and seconds a terminal shows on standard error; with --quiet, or elsewhere, nothing.

    Args:
        text: what goes on; assign to `text` to change it.
        after_s: for how long nothing is shown.
        interval_s: between two pictures.
    """

    def __init__(self, text: str, after_s: float = 0.0, interval_s: float = 0.1) -> None:
        self.text, self._after_s, self._interval_s = text, after_s, interval_s
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and not is_quiet():
            self._thread = threading.Thread(target=self._spin, name="spinner", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _spin(self) -> None:
        begin = time.monotonic()
        if self._done.wait(self._after_s):
            return
        for frame in itertools.cycle("|/-\\"):
            # the cursor waits at the line's beginning, so that whatever else is printed replaces the picture
            sys.stderr.write(f"{CLEAR_LINE}{frame} {self.text} ({time.monotonic() - begin:.0f} s)\r")
            sys.stderr.flush()
            if self._done.wait(self._interval_s):
                break
        sys.stderr.write(CLEAR_LINE)
        sys.stderr.flush()
