"""Ctrl-C during the imports of a program, and once more while it ends: one line, exit code 130."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infini_train.interrupts import ending_at_once

ROOT = Path(__file__).resolve().parent.parent
SLOW = """
import os, signal, sys, time
class Slow:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
from {program} import main
"""
TWICE = """
import atexit, os, signal
from infini_train.command_errors import run_command
def again():
    os.kill(os.getpid(), signal.SIGINT)
atexit.register(again)
def command():
    os.kill(os.getpid(), signal.SIGINT)
raise SystemExit(run_command(command))
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("program", "module"),
    [
        ("infini_train.cli", "infini_train.config.files"),
        ("data_tools.cli", "data_tools.encode"),
        ("launch.cli", "launch.watch"),
    ],
)
def test_an_interrupted_import_is_one_line(program: str, module: str) -> None:
    done = run(SLOW.format(module=module, program=program))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_a_second_ctrl_c_ends_without_a_traceback() -> None:
    done = run(TWICE)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "error: interrupted\n")


def test_an_ignored_ctrl_c_stays_ignored_and_the_usual_one_comes_back() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ending_at_once():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with ending_at_once():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
