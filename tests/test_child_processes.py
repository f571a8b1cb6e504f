"""Children end with their parent, get its signals once, and leave an ignored SIGHUP ignored."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infini_train.child_processes import run_child, stop_signals
from tests.sessions import SAVES, sessions

PARENT = """\
import sys
from infini_train.child_processes import run_child
code, printed = run_child([sys.executable, "-c", sys.argv[1]])
print("parent ends", flush=True)
sys.exit(code)
"""


@pytest.fixture
def started():
    """A parent in a session of its own, and its child's id."""
    with sessions(stderr=subprocess.STDOUT) as begin:

        def start(*prefix: str) -> tuple[subprocess.Popen[str], int]:
            process = begin(*prefix, sys.executable, "-c", PARENT, SAVES)
            assert process.stdout is not None
            return process, int(process.stdout.readline().split()[-1])

        yield start


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline, f"left behind: {pid}"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("reaches", ["the parent", "its group"])
def test_a_signal_is_passed_on_once(started, number, reaches):
    process, child = started()
    (os.kill if reaches == "the parent" else os.killpg)(process.pid, number)
    printed, _ = process.communicate(timeout=60)
    assert (process.returncode, printed) == (128 + number, f"saved {number.value}\nparent ends\n")
    assert not is_running(child)


def test_no_child_outlives_a_killed_parent(started):
    process, child = started()
    process.kill()
    wait_until_gone(child)


def test_nohup_is_respected(started):
    process, child = started("env", "--ignore-signal=HUP")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert (process.returncode, printed) == (143, f"saved {signal.SIGTERM.value}\nparent ends\n")


def test_output_and_exit_code_are_returned(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP)]
    assert run_child([sys.executable, "-c", "print('x'); raise SystemExit(3)"], capture=True) == (3, "x\n")
    assert run_child(["sh", "-c", "kill -9 $$"], environment={"PATH": os.environ["PATH"]}) == (137, "")
    assert before == [
        signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP)
    ]


def test_an_ignored_hangup_is_no_request_to_stop():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert set(stop_signals()) == {signal.SIGINT, signal.SIGTERM}
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in stop_signals() or before == signal.SIG_IGN
