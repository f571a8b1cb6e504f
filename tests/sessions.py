"""Processes in sessions of their own, as a terminal starts them, and a program that saves when it is asked to stop."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAVES = """
import os, signal, sys, time
seen = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: seen.append(number))
print("ready", os.getpid(), flush=True)
while not seen:
    time.sleep(0.01)
time.sleep(0.3)  # a second delivery would come in here
print("saved", *seen, flush=True)
sys.exit(128 + seen[0])
"""


@contextlib.contextmanager
def sessions(stderr: int = subprocess.PIPE) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Gives a function that starts a command, by its words; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            # nohup, or a shell's background job, would have it ignore some
            ["env", "--default-signal=INT,HUP,TERM", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
