"""One call of a command in a process of its own, with limits, and whether it ended as a command should."""

import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

Main = Callable[[Sequence[str]], object]
CODES = {0, 1, 2, 3, 4}  # documented ones of a command that nobody stops
UNCAUGHT = 99
LIMIT_S, MEMORY_MB, ADDRESS_BYTES = 30.0, 2048, 4 * 2**30
SHOWN = 200_000  # characters of a call's output that are looked at


class Outcome(NamedTuple):
    """How a call ended."""

    code: int
    text: str  # standard output and error
    errors: str  # standard error
    seconds: float
    memory_mb: float  # more than the parent had
    hangs: bool


def call(
    main: Main, arguments: Sequence[str], work: Path, environment: Mapping[str, str], limit_s: float = LIMIT_S
) -> Outcome:
    """Calls a command in a process forked from this one, and ends everything that it started.

    Args:
        main: the command's, which ends like one.
        arguments: of it.
        work: the folder in which it runs, and its HOME.
        environment: further variables.
        limit_s: when it is killed.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begin = time.monotonic()
        sys.stdout.flush()
        own_mb = _anonymous_mb()
        pid = os.fork()
        if pid == 0:
            _enter(work, environment, out.fileno(), err.fileno())
            _run(main, arguments)
        done, hangs = 0, False
        while not done:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if not done and time.monotonic() - begin > limit_s:
                hangs = True
                _end(pid)
                done, status, usage = os.wait4(pid, 0)
            time.sleep(0 if done else 0.002)
        _end(pid)  # whatever it left in its session
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read(SHOWN).decode("utf-8", "replace"))
    code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - begin
    return Outcome(code, "".join(texts), texts[1], seconds, usage.ru_maxrss / 1024 - own_mb, hangs)


def _end(session: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


def _enter(work: Path, environment: Mapping[str, str], out: int, err: int) -> None:
    """The child becomes like a process of its own."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", errors="backslashreplace")  # noqa: SIM115
    os.chdir(work)
    os.environ.update({"HOME": str(work), "PATH": "/usr/bin:/bin", **environment})
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _run(main: Main, arguments: Sequence[str]) -> NoReturn:
    code = UNCAUGHT
    try:
        main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 255)


def _anonymous_mb() -> float:
    """What a process forked from this one begins with; pages of files come as it needs them."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def judge(outcome: Outcome) -> list[str]:
    """What is wrong with it."""
    faults = [f"killed after {outcome.seconds:.0f} s"] if outcome.hangs else []
    if "Traceback (most recent call last)" in outcome.text:
        lines = [line for line in outcome.text.splitlines() if line and not line.startswith((" ", "Traceback"))]
        places = [line.strip() for line in outcome.text.splitlines() if line.startswith('  File "')]
        faults.append(f"traceback: {lines[-1][:160] if lines else ''} ({places[-1][-90:] if places else ''})")
    elif outcome.code not in CODES and not outcome.hangs:
        faults.append(f"exit code {outcome.code}")
    if outcome.code == 2 and "error: " not in outcome.errors:
        faults.append("exit code 2 without an error line")
    if outcome.memory_mb > MEMORY_MB:
        faults.append(f"{outcome.memory_mb:.0f} MB")
    if any(len(line) > 20_000 for line in outcome.errors.splitlines()):
        faults.append("an error line of more than 20,000 characters")
    return faults
