"""What a program prints: sources written `pipe:COMMAND`, as in webdataset, and named pipes.

No shell ever sees the command.
"""

import errno
import io
import os
import re
import select
import shlex
import shutil
import subprocess
import time
from typing import Any, BinaryIO, cast

from infini_train.child_processes import ending_with_parent
from infini_train.config.errors import ConfigError

PREFIX = "pipe:"
_OPERATORS = re.compile(r"[();<>|&]+")
_QUOTED = re.compile(r"""\\.|'[^']*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)
_PATIENCE_S = 5.0  # for a command to end when its output is no longer wanted
_WRITER_PATIENCE_S = 5.0  # for a program to open the named pipe that it writes into
_POLL_S = 0.05
_BUFFER_BYTES = 1 << 20


def is_pipe(path: str) -> bool:
    """Whether a source is a command."""
    return path.startswith(PREFIX)


def split_command(source: str) -> list[str]:
    """The program and arguments of a source `pipe:COMMAND`, quoted as for a shell.

    Raises:
        ConfigError: no such program, an open quotation, or an operator that only a shell understands.
    """
    command = source.removeprefix(PREFIX)
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{source}: {str(error).lower()}") from error
    if not words:
        raise ConfigError(f"{source}: names no program; write it as in 'pipe:zcat corpus.tar.gz'")
    if operator := _shell_operator(command):
        hint = "quote it, or put the pipeline into a script"
        raise ConfigError(f"{source}: {operator} needs a shell, and a pipe: source runs one program; {hint}")
    if shutil.which(words[0]) is None:
        raise ConfigError(f"{source}: no program {words[0]} found")
    return words


def _shell_operator(command: str) -> str | None:
    """The first operator of a shell outside quotations, which would otherwise become an argument unnoticed."""
    found = _OPERATORS.search(_QUOTED.sub(" ", command))
    return found[0] if found else None


def open_pipe(source: str) -> BinaryIO:
    """What the command prints. Its end is an error (OSError) unless the exit status is 0.

    Raises:
        ConfigError: as `split_command`.
        OSError: it can't be started.
    """
    return cast(BinaryIO, io.BufferedReader(_Output(split_command(source)), _BUFFER_BYTES))


class _Output(io.RawIOBase):
    """Standard output of a process, which ends when this is closed."""

    def __init__(self, words: list[str]) -> None:
        self._process: subprocess.Popen[bytes] = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, preexec_fn=ending_with_parent()
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        assert self._process.stdout is not None
        data = self._process.stdout.read1(len(buffer))  # type: ignore[attr-defined]
        buffer[: len(data)] = data
        if not data and (status := self._process.wait()) != 0:
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            raise OSError(errno.EIO, f"the command {how}")
        return len(data)

    def close(self) -> None:
        if not self.closed:
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process.terminate()
            try:
                self._process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        super().close()


def open_named_pipe(path: str) -> BinaryIO:
    """What a program writes into a named pipe; also of a shell's `<(command)`.

    Raises:
        OSError: it can't be opened, or no program opens it for writing within seconds.
    """
    return cast(BinaryIO, io.BufferedReader(_NamedPipe(path), _BUFFER_BYTES))


class _NamedPipe(io.RawIOBase):
    """The reader's end of a named pipe. A plain `open` would wait for a writer for ever."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._first = self._wait_for_writer(path)
            os.set_blocking(self._descriptor, True)
        except BaseException:
            self.close()
            raise

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._first:
            return os.readv(self._descriptor, [buffer])
        size = min(len(buffer), len(self._first))
        buffer[:size], self._first = self._first[:size], self._first[size:]
        return size

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()

    def _wait_for_writer(self, path: str) -> bytes:
        """The first bytes, if there are some already."""
        until = time.monotonic() + _WRITER_PATIENCE_S
        poll = select.poll()  # select() can't ask about descriptors above 1023
        poll.register(self._descriptor, select.POLLIN)
        while True:
            try:
                first = os.read(self._descriptor, _BUFFER_BYTES)
            except BlockingIOError:  # a program has opened it, and has not written yet
                return b""
            if first or poll.poll(0) == [(self._descriptor, select.POLLIN)]:  # readable without bytes: its end
                return first
            if time.monotonic() > until:
                raise OSError(errno.ETIMEDOUT, "is a named pipe that no program writes into; start that first", path)
            time.sleep(_POLL_S)
