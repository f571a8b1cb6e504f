"""Errors of the machine become one line and an exit code; faults of the program keep their traceback."""

import errno
import subprocess
import sys

import pytest

from infini_train import exit_codes
from infini_train.command_errors import run_command
from infini_train.config.errors import ConfigError


def failing(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("seed: must be a whole number"), "error: seed: must be a whole number\n"),
        (
            OSError(errno.ESTALE, "Stale file handle", "/data/x"),
            "error: /data/x: Stale file handle; fix it and rerun\n",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", b"y"), "error: y: File name too long; fix it and rerun\n"),
        (OSError(errno.EBADF, "Bad file descriptor", 7), "error: 7: Bad file descriptor; fix it and rerun\n"),
        (OSError("can't load it\nfor a reason"), "error: can't load it; fix it and rerun\n"),
        (ValueError("embedded null byte"), "error: a file name holds a null character; remove it and rerun\n"),
        (ConfigError("a\nb\x1b[2J: no such folder"), "error: a\\nb\\x1b[2J: no such folder\n"),
        (RecursionError("maximum depth"), "error: the input is nested too deeply to be read\n"),
        (UnicodeEncodeError("utf-8", "a\ud800", 1, 2, "surrogates"), "error: '\\ud800' can't be written as UTF-8"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes\nstack"), "error: out of memory"),
    ],
)
def test_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(failing(error)) == exit_codes.MISTAKE
    shown = capsys.readouterr().err
    assert shown.startswith(line) and shown.count("\n") == 1


def test_a_fault_of_the_program_is_not_hidden() -> None:
    with pytest.raises(AssertionError):
        run_command(failing(AssertionError("a bug")))


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_missing_streams_are_not_replaced_by_files(closed: str, tmp_path) -> None:
    program = (
        "import sys; from infini_train.command_errors import open_missing_streams as o; o();"
        f"f = open({str(tmp_path / 'file')!r}, 'w'); print('noise'); print('noise', file=sys.stderr); f.close()"
    )
    done = subprocess.run(["bash", "-c", f'exec {closed}; exec "$@"', "-", sys.executable, "-c", program], timeout=60)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == ""
