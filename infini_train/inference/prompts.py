"""Prompts as a command line gives them. Imports no torch."""

import sys
from pathlib import Path

from infini_train.config.errors import ConfigError

MAX_PROMPT_BYTES = 2**28


def read_prompt(text: str, file: Path | None) -> str:
    """The prompt of --prompt, or of --prompt-file if there is one: a file, a pipe, or - for standard input.

    Raises:
        ConfigError: it can't be read, is not UTF-8 or longer than `MAX_PROMPT_BYTES`.
    """
    if file is None:
        return check_text(text, "--prompt")
    try:
        if str(file) == "-":
            data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        else:
            with file.open("rb") as stream:
                data = stream.read(MAX_PROMPT_BYTES + 1)
        if len(data) > MAX_PROMPT_BYTES:
            raise ConfigError(f"--prompt-file: {file} holds more than {MAX_PROMPT_BYTES >> 20} MiB; give less")
        return data.decode("utf-8-sig")  # without the mark that some editors put first
    except OSError as error:
        raise ConfigError(f"--prompt-file: {file} can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt-file: {file} is not UTF-8 (byte {error.start}); convert it") from error


def check_text(text: str, option: str) -> str:
    """A text of the command line, read as UTF-8 whatever the locale.

    Raises:
        ConfigError: it holds bytes that are not; the message begins with the option.
    """
    try:
        return text.encode("utf-8", errors="surrogateescape").decode("utf-8")
    except UnicodeError as error:
        assert isinstance(error, UnicodeDecodeError | UnicodeEncodeError)
        raise ConfigError(f"{option}: is not UTF-8 (byte {error.start}); convert it") from error
