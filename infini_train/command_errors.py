"""What a command makes of an error that reaches its end: one line and an exit code. Imports no torch.

Where a file or a field is known to be at fault, the code that reads it raises `ConfigError` and says so. Here is the
last place, for what the operating system and libraries raise. A fault of the program itself keeps its traceback.
"""

import contextlib
import os
import sys
from collections.abc import Callable

from infini_train import exit_codes, interrupts
from infini_train.config.errors import ConfigError
from infini_train.redaction import redact_message

NULL = "embedded null"  # in what Python raises
OUT_OF_MEMORY = (  # in what torch raises
    "can't allocate memory",
    "out of memory",
    "Cannot allocate memory",
    "Storage size calculation overflowed",
    "numel: integer multiplication overflow",
)
MAX_CHARACTERS = 2000  # of an error's line: some hold what was given


def run_command(
    command: Callable[[], int | None],
    *,
    explain: Callable[[ConfigError], str] = str,
    interrupted: str = "interrupted",
) -> int:
    """Runs a command to its end.

    Args:
        command: does the work; what it returns is the exit code, None being 0.
        explain: the line for a user's mistake.
        interrupted: the line after Ctrl-C.

    Returns:
        The exit code. Errors that say something about the command's input or machine were printed in one line.
    """
    try:
        code = command() or exit_codes.DONE
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        interrupts.end_at_the_next()
        return fail(interrupted, exit_codes.INTERRUPTED)
    except BrokenPipeError:  # the reader of our output (head, say) has gone
        _silence_stdout()
        return exit_codes.DONE
    except Exception as error:
        message = explain(error) if isinstance(error, ConfigError) else translate(error)
        if message is None:
            raise
        return fail(message, exit_codes.MISTAKE)
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # Python would report it once more at its end
            _silence_stdout()


def translate(error: BaseException) -> str | None:
    """One line for an error of the operating system or of the machine's limits; None for any other."""
    if isinstance(error, OSError):  # a library's own may have no number and no file
        name = error.filename
        where = f"{os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else name}: " if name else ""
        return f"{where}{error.strerror or first_line(error)}; fix it and rerun"
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY):
        return f"out of memory: {first_line(error)}; ask for less, or run it where there is more"
    if isinstance(error, ValueError) and NULL in str(error):
        return "a file name holds a null character; remove it and rerun"
    if isinstance(error, RecursionError):
        return "the input is nested too deeply to be read"
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[error.start : error.end]!a} can't be written as UTF-8; remove it and rerun"
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut at 300 characters; its class where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def escape(text: str) -> str:
    """The text on one line, with backslashes for what would break it or steer a terminal, as a file's name may."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def fail(message: str, code: int) -> int:
    """Prints an error's line, without the secrets of URLs and commands, cut where it is endless; returns the code."""
    message = redact_message(message)
    message = escape(message)
    if len(message) > MAX_CHARACTERS:
        message = f"{message[: MAX_CHARACTERS // 2]} ... {message[-MAX_CHARACTERS // 2 :]}"
    with contextlib.suppress(OSError):  # standard error is full, or its reader has gone
        print(f"error: {message}", file=sys.stderr, flush=True)
    return code


def open_missing_streams() -> None:
    """Gives a process that was started without standard input, output or error an empty one.

    Otherwise the next file that is opened takes the number of the stream, and what libraries print goes into it.
    Text that the streams can't encode is shown with backslashes.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            assert os.open(os.devnull, os.O_RDWR) == number
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
        elif mode == "w" and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _silence_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
